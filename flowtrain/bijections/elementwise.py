"""Monotone elementwise maps with parameters from a network, as used in couplings."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.utils.recorded import Recorded

# exp(x) = 2^(x LOG2_E)
LOG2_E = 1 / math.log(2)
# the least number of elements for which `_slopes` replaces tanh and exp by sigmoid and exp2
MANY = 1024
# looked up once, because the lookup takes as long as a small operation
_SIGMOID_GRADIENT: Any = torch.ops.aten.sigmoid_backward.grad_input


class Elementwise(Recorded, nn.Module, ABC):
    """An elementwise map x_i = f(z_i; theta_i), increasing in z_i. theta_i has `size` numbers.

    Couplings and autoregressive bijections compute theta with a network. The map itself has no parameters. f is the
    identity if theta is zero. So if the output of the network is initially zero, the bijection is the identity.

    theta is (B, size * n, ...) for n elements. Number j of element i is at index j * n + i of dimension 1.
    """

    size: int
    # whether the class has `columns_to_base` and `columns_gradient`
    has_gradient = False

    def columns_to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Computes `to_base` for vectors without autograd.

        Returns (z, log dz/dx, tensors for `columns_gradient`) for contiguous x (n, B) and theta (size * n, B). It may
        overwrite theta.
        """
        raise NotImplementedError

    def columns_gradient(self, kept: Sequence[Tensor], g_z: Tensor, g_log: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x (n, B) and theta (size * n, B).

        Args:
            kept: tensors of `columns_to_base`.
            g_z: the gradient of z, (n, B).
            g_log: the gradient of the sum of log dz/dx over the elements, (B,).
        """
        raise NotImplementedError

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
    has_gradient = True

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

    def columns_to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        raw, shift = theta.chunk(2)
        # see `_slopes`
        sigmoid = (raw * (2 / self.cap)).sigmoid_()
        log_slope = torch.rsub(sigmoid, self.cap, alpha=2 * self.cap)
        slope = (log_slope * LOG2_E).exp2_()
        z = (x - shift).mul_(slope)
        return z, log_slope, (sigmoid, slope, z)

    def values_to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (z, log dz/dx) for x (n, B) and theta (2 n, B), without a gradient."""
        raw, shift = theta.chunk(2)
        log_slope, slope = _slopes(raw, -self.cap)
        return (x - shift).mul_(slope), log_slope

    def values_to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (x, log dx/dz) for z (n, B) and theta (2 n, B), without a gradient."""
        raw, shift = theta.chunk(2)
        log_slope, slope = _slopes(raw, self.cap)
        return torch.addcmul(shift, z, slope), log_slope

    def columns_gradient(self, kept: Sequence[Tensor], g_z: Tensor, g_log: Tensor) -> tuple[Tensor, Tensor]:
        sigmoid, slope, z = kept
        n = len(z)
        g_theta = z.new_empty(2 * n, *z.shape[1:])
        g_x = g_z * slope
        torch.neg(g_x, out=g_theta[n:])
        # dz/ds = -z, d log(dz/dx)/ds = -1, and ds/draw is 4 times the derivative of the sigmoid
        four_g_s = torch.addcmul(g_log * -4, g_z, z, value=-4)
        _SIGMOID_GRADIENT(four_g_s, sigmoid, grad_input=g_theta[:n])
        return g_x, g_theta


def _slopes(raw: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Returns (s, exp(s)) for s = cap tanh(raw / |cap|).

    For at least MANY elements, tanh(y) = 2 sigmoid(2 y) - 1 and exp(s) = 2^(s LOG2_E) are used, which are ten and four
    times as fast on a CPU. The absolute error of this tanh is at most 2e-7.
    """
    if raw.numel() < MANY:
        log_slope = (raw / abs(cap)).tanh_().mul_(cap)
        return log_slope, log_slope.exp()
    log_slope = (raw * (2 / abs(cap))).sigmoid_().mul_(2 * cap).sub_(cap)
    return log_slope, (log_slope * LOG2_E).exp2_()
