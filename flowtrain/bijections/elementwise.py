"""Monotone maps of single elements, whose parameters a network computes: the maps inside couplings."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flowtrain.utils.recorded import Recorded


class Elementwise(Recorded, nn.Module, ABC):
    """x_i = f(z_i; theta_i), increasing in z_i, with theta_i of `size` numbers.

    Couplings and autoregressive bijections compute theta by a network. The map itself has no parameters. f is the
    identity where theta is zero, so a network that starts at zero gives a bijection that starts as the identity.

    theta is (B, size * n, ...) for n elements: number j of element i is at j * n + i along dimension 1.
    """

    size: int

    @abstractmethod
    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(x, log dx/dz), each (B, n, ...), of z (B, n, ...) and theta (B, size * n, ...)."""

    @abstractmethod
    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(z, log dz/dx), each (B, n, ...), of x (B, n, ...) and theta (B, size * n, ...)."""


class ScaleShift(Elementwise):
    """x = z exp(s) + m with s = cap tanh(raw / cap), so |s| < cap; theta = (raw, m).

    Args:
        cap: bound on the log-scale.

    Example:
        >>> x, log_slope = ScaleShift(cap=2.0).to_data(torch.ones(1, 1), torch.tensor([[0.0, 3.0]]))
        >>> x.tolist(), log_slope.tolist()
        ([[4.0]], [[0.0]])
    """

    size = 2

    def __init__(self, cap: float = 2.0) -> None:
        super().__init__()
        self.cap = cap

    def scale_and_shift(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(s, m)."""
        raw, shift = theta.chunk(2, 1)
        return self.cap * torch.tanh(raw / self.cap), shift

    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, m = self.scale_and_shift(theta)
        return torch.addcmul(m, z, s.exp()), s

    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, m = self.scale_and_shift(theta)
        return (x - m) * (-s).exp(), -s
