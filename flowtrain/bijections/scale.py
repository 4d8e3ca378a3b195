"""Per-dimension scale and shift: learned from the first data (ActNorm), or fixed by statistics (Standardize)."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.errors import DataError


class ActNorm(Bijection):
    """x = z exp(s) + m per dimension (Kingma and Dhariwal 2018, Glow, section 3.1).

    `initialize` makes the base side of the data it is given zero-mean and unit-variance; after that s and m are
    parameters like any other.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(d))
        self.shift = nn.Parameter(torch.zeros(d))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * self.log_scale.exp() + self.shift, self.log_scale.sum().expand(len(z))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.shift) * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(x))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        self.shift.copy_(x.mean(0))
        self.log_scale.copy_(x.std(0, correction=0).clamp_min(1e-6).log())


class Standardize(Bijection):
    """x = z * std + mean with the training set's statistics, kept as buffers: base units to data units."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))

    mean: Tensor
    std: Tensor

    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Takes statistics of shape (d,).

        Raises:
            DataError: a standard deviation that is zero or not finite.
        """
        if not bool(((std > 0) & torch.isfinite(std)).all()):
            bad = [i for i, s in enumerate(std.tolist()) if not 0 < s < float("inf")]
            raise DataError(f"columns {bad} of the training data do not vary: drop them (data.columns)")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * self.std + self.mean, self.std.log().sum().expand(len(z))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.mean) / self.std, -self.std.log().sum().expand(len(x))
