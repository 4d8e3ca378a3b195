"""Couplings: one part of the dimensions determines the map of the other (Dinh et al. 2017, Real NVP, eq. 7-8)."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.elementwise import Elementwise, ScaleShift
from flowtrain.nn.conditioners import zero


class Coupling(Bijection):
    """x_a = z_a; x_b = f(z_b; theta(z_a)) element by element; log-determinant sum_b log f'(z_b).

    f is x = z exp(s) + m by default, with |s| < `cap`, see `ScaleShift` (Real NVP), or a `Spline`. Subclasses say which
    part is a, unchanged, and which b.

    With an `input_bound` B the conditioner receives c = B tanh(z_a / B), and x_b = f(z_b; theta(c)) + W z_a. Far from
    the data the coupling is then an affine map: theta is constant, f is affine, and W keeps the linear correlations.
    -log p of a stack of such couplings grows quadratically along rays from the data, like that of a Gaussian, with a
    factor bounded by `cap`. Without a bound the conditioner extrapolates, and s reaches its cap in every coupling.

    Args:
        conditioner: (a, label) -> theta of b, see `Elementwise`; of `ScaleShift` these are the raw log-scales and the
            shifts, joined along dimension 1. A module of torch, such as `nn.Sequential`, is called without the label.
        cap: bound on the log-scale of the default f.
        input_bound: B. None passes z_a to the conditioner unchanged and omits W.
        sizes: the numbers of elements of a and b, for W; needed with an `input_bound`.
        transform: f; None for `ScaleShift(cap)`.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        sizes: tuple[int, int] | None = None,
        transform: Elementwise | None = None,
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.input_bound = input_bound
        self.transform = ScaleShift(cap) if transform is None else transform
        if input_bound is not None:
            assert sizes is not None
            self.linear = zero(nn.Linear(*sizes, bias=False))

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each (B, n, ...)."""

    @abstractmethod
    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """x (B, C, ...) whose part b is now `b`."""

    def theta(self, a: Tensor, label: Tensor | None) -> Tensor:
        """Parameters of f. Under autocast the conditioner may answer in a narrower dtype; what follows does not."""
        return conditioned(self.conditioner, bounded(a, self.input_bound), label).to(a.dtype)

    def of_b(self, log_slope: Tensor) -> Tensor:
        """The log-slopes of elements that belong to b, with zeros elsewhere."""
        return log_slope

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.split(z)
        b, log_slope = self.transform.to_data(b, self.theta(a, label))
        if self.input_bound is not None:
            b = b + self.linear(a).to(b.dtype)
        return self.join(z, a, b), self.of_b(log_slope).flatten(1).sum(1)

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.split(x)
        if self.input_bound is not None:
            b = b - self.linear(a).to(b.dtype)
        b, log_slope = self.transform.to_base(b, self.theta(a, label))
        return self.join(x, a, b), self.of_b(log_slope).flatten(1).sum(1)


# the name that users' classes derive from
AffineCoupling = Coupling


def bounded(x: Tensor, bound: float | None) -> Tensor:
    """bound * tanh(x / bound), or x."""
    return x if bound is None else bound * torch.tanh(x / bound)


def conditioned(conditioner: nn.Module, x: Tensor, label: Tensor | None) -> Tensor:
    """The answer of a conditioner; modules of torch do not take the label."""
    of_torch = type(conditioner).__module__.startswith("torch.nn.")
    answer: Tensor = conditioner(x) if of_torch else conditioner(x, label)
    return answer


class IndexCoupling(Coupling):
    """The part a of vectors is where a mask is true.

    Args:
        mask: bool (d,); saved as two buffers of indices.
    """

    def __init__(
        self,
        mask: Tensor,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        transform: Elementwise | None = None,
    ) -> None:
        super().__init__(conditioner, cap, input_bound, (int(mask.sum()), int((~mask).sum())), transform)
        self.register_buffer("kept", mask.nonzero().squeeze(1))
        self.register_buffer("changed", (~mask).nonzero().squeeze(1))

    kept: Tensor
    changed: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.kept], x[:, self.changed]

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x.index_copy(1, self.changed, b)


class HalfCoupling(Coupling):
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
        self,
        channels: int,
        swap: bool,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        transform: Elementwise | None = None,
    ) -> None:
        first = (channels + 1) // 2
        second = channels - first
        super().__init__(conditioner, cap, input_bound, (second, first) if swap else (first, second), transform)
        self.sizes, self.swap = [first, second], swap

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.split(x, self.sizes, 1)
        return (second, first) if self.swap else (first, second)

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([b, a] if self.swap else [a, b], 1)


class CheckerboardCoupling(Coupling):
    """The part a of images is where row + column is even, or with `swap` odd, for sides that cannot be halved.

    The conditioner sees whole images with zeros in place of b (Dinh et al. 2017, section 3.4).

    Args:
        size: (H, W).
    """

    def __init__(
        self,
        size: tuple[int, int],
        swap: bool,
        conditioner: nn.Module,
        cap: float = 2.0,
        transform: Elementwise | None = None,
    ) -> None:
        super().__init__(conditioner, cap, transform=transform)
        rows, columns = (torch.arange(n) for n in size)
        even = (rows.unsqueeze(1) + columns) % 2 == 0
        self.register_buffer("mask", even ^ swap)

    mask: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.mask, x

    def of_b(self, log_slope: Tensor) -> Tensor:
        return log_slope * ~self.mask

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(self.mask, x, b)
