"""Monotone elementwise maps with parameters from a network, as used in couplings."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flowtrain.utils.recorded import Recorded


class Elementwise(Recorded, nn.Module, ABC):
    """An elementwise map x_i = f(z_i; theta_i), increasing in z_i. theta_i has `size` numbers.

    Couplings and autoregressive bijections compute theta with a network. The map itself has no parameters. f is the
    identity if theta is zero. So if the output of the network is initially zero, the bijection is the identity.

    theta is (B, size * n, ...) for n elements. Number j of element i is at index j * n + i of dimension 1.
    """

    size: int

    def owners(self, n: int) -> Tensor:
        """Returns the index of the element that each number in theta belongs to, for n elements, int64 on the CPU.

        The length of the result is the number of outputs of a conditioner.
        """
        return torch.arange(n, device="cpu").repeat(self.size)

    @abstractmethod
    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (x, log dx/dz), each (B, n, ...), for z (B, n, ...) and theta (B, size * n, ...)."""

    @abstractmethod
    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (z, log dz/dx), each (B, n, ...), for x (B, n, ...) and theta (B, size * n, ...)."""


class ScaleShift(Elementwise):
    """The affine map x = z exp(s) + m with s = cap tanh(raw / cap), so that |s| < cap. theta is (raw, m).

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
        """Returns (s, m)."""
        raw, shift = theta.chunk(2, 1)
        return self.cap * torch.tanh(raw / self.cap), shift

    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, m = self.scale_and_shift(theta)
        return torch.addcmul(m, z, s.exp()), s

    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, m = self.scale_and_shift(theta)
        return (x - m) * (-s).exp(), -s
