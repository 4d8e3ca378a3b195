"""Affine coupling: one part of the dimensions scales and shifts the other (Dinh et al. 2017, Real NVP, eq. 7-8)."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.nn.conditioners import zero


class AffineCoupling(Bijection):
    """x_a = z_a; x_b = z_b exp(s(z_a)) + m(z_a), with |s| < `cap` by s = cap tanh(raw / cap); log-determinant sum s.

    Subclasses say which part is a, unchanged, and which b.

    With an `input_bound` B the conditioner receives c = B tanh(z_a / B), and m(z_a) = m_c(c) + W z_a. Far from the data
    the coupling is then an affine map: s and m_c are constant, and W keeps the linear correlations. -log p of a stack
    of such couplings grows quadratically along rays from the data, like that of a Gaussian, with a factor bounded by
    `cap`. Without a bound the conditioner extrapolates, and s reaches its cap in every coupling.

    Args:
        conditioner: (a, label) -> raw log-scales and shifts of b, joined along dimension 1. A module of torch, such as
            `nn.Sequential`, is called without the label.
        cap: bound on the log-scale.
        input_bound: B. None passes z_a to the conditioner unchanged and omits W.
        sizes: the numbers of elements of a and b, for W; needed with an `input_bound`.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.cap, self.input_bound = cap, input_bound
        if input_bound is not None:
            assert sizes is not None
            self.linear = zero(nn.Linear(*sizes, bias=False))

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each (B, n, ...)."""

    @abstractmethod
    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """x (B, C, ...) whose part b is now `b`."""

    def scale_and_shift(self, a: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """(s, m) of b. Under autocast the conditioner may answer in a narrower dtype; what follows does not."""
        c = a if self.input_bound is None else self.input_bound * torch.tanh(a / self.input_bound)
        of_torch = type(self.conditioner).__module__.startswith("torch.nn.")
        answer = self.conditioner(c) if of_torch else self.conditioner(c, label)
        raw, shift = answer.to(a.dtype).chunk(2, 1)
        if self.input_bound is not None:
            shift = shift + self.linear(a).to(a.dtype)
        return self.cap * torch.tanh(raw / self.cap), shift

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.split(z)
        s, m = self.scale_and_shift(a, label)
        return self.join(z, a, torch.addcmul(m, b, s.exp())), s.flatten(1).sum(1)

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.split(x)
        s, m = self.scale_and_shift(a, label)
        return self.join(x, a, (b - m) * (-s).exp()), -s.flatten(1).sum(1)


class IndexCoupling(AffineCoupling):
    """The part a of vectors is where a mask is true.

    Args:
        mask: bool (d,); saved as two buffers of indices.
    """

    def __init__(
        self, mask: Tensor, conditioner: nn.Module, cap: float = 2.0, input_bound: float | None = None
    ) -> None:
        super().__init__(conditioner, cap, input_bound, (int(mask.sum()), int((~mask).sum())))
        self.register_buffer("kept", mask.nonzero().squeeze(1))
        self.register_buffer("changed", (~mask).nonzero().squeeze(1))

    kept: Tensor
    changed: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.kept], x[:, self.changed]

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x.index_copy(1, self.changed, b)


class HalfCoupling(AffineCoupling):
    """The part a is the first half of the channels, or with `swap` the second.

    After a squeeze that puts the squares of one colour first (see `flowtrain.bijections.squeeze`) this is a coupling
    by a checkerboard mask, whose conditioner sees the squares of one colour alone and spends nothing on the others.

    Args:
        channels: C; with an odd one the first half is the larger.

    Example:
        >>> from flowtrain.nn.conditioners import MLP
        >>> coupling = HalfCoupling(3, swap=False, conditioner=MLP(2, [8], 2, "relu"))
        >>> x, log_det = coupling(torch.tensor([[1.0, 2.0, 3.0]]))  # the identity, until it is trained
        >>> x.tolist(), log_det.tolist()
        ([[1.0, 2.0, 3.0]], [0.0])
    """

    def __init__(
        self, channels: int, swap: bool, conditioner: nn.Module, cap: float = 2.0, input_bound: float | None = None
    ) -> None:
        first = (channels + 1) // 2
        second = channels - first
        super().__init__(conditioner, cap, input_bound, (second, first) if swap else (first, second))
        self.sizes, self.swap = [first, second], swap

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.split(x, self.sizes, 1)
        return (second, first) if self.swap else (first, second)

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([b, a] if self.swap else [a, b], 1)


class CheckerboardCoupling(AffineCoupling):
    """The part a of images is where row + column is even, or with `swap` odd, for sides that cannot be halved.

    The conditioner sees whole images with zeros in place of b (Dinh et al. 2017, section 3.4).

    Args:
        size: (H, W).
    """

    def __init__(self, size: tuple[int, int], swap: bool, conditioner: nn.Module, cap: float = 2.0) -> None:
        super().__init__(conditioner, cap)
        rows, columns = (torch.arange(n) for n in size)
        even = (rows.unsqueeze(1) + columns) % 2 == 0
        self.register_buffer("mask", even ^ swap)

    mask: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.mask, x

    def scale_and_shift(self, a: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        s, m = super().scale_and_shift(a, label)
        return s * ~self.mask, m * ~self.mask

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return b
