"""Affine coupling: one half of the dimensions scales and shifts the other (Dinh et al. 2017, Real NVP, eq. 7-8)."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection


class AffineCoupling(Bijection):
    """x_a = z_a; x_b = z_b exp(s(z_a)) + m(z_a), with |s| < `cap` by s = cap tanh(raw / cap).

    Args:
        mask: bool (d,), true for the part a that passes unchanged; saved as a buffer.
        conditioner: maps (B, n_a) to (B, 2 n_b): raw log-scales, then shifts.
        cap: bound on the log-scale.
    """

    def __init__(self, mask: Tensor, conditioner: nn.Module, cap: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("kept", mask.nonzero().squeeze(1))
        self.register_buffer("changed", (~mask).nonzero().squeeze(1))
        self.conditioner = conditioner
        self.cap = cap

    kept: Tensor
    changed: Tensor

    def scale_and_shift(self, a: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.conditioner(a).chunk(2, -1)
        return self.cap * torch.tanh(raw / self.cap), shift

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s, m = self.scale_and_shift(z[:, self.kept])
        changed = torch.addcmul(m, z[:, self.changed], s.exp())
        return z.index_copy(1, self.changed, changed), s.sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, m = self.scale_and_shift(x[:, self.kept])
        changed = (x[:, self.changed] - m) * (-s).exp()
        return x.index_copy(1, self.changed, changed), -s.sum(1)
