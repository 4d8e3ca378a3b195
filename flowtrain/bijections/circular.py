"""Maps of circular columns, which are angles in radians on [-pi, pi)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.elementwise import Elementwise
from flowtrain.bijections.spline import Spline
from flowtrain.utils.circle import circular_indices, wrap

# below this value of u^2 + (1 + v)^2, the phase is atan2(u, 1)
LEAST_SQUARE = 1e-12


class CircularSpline(Spline):
    """A rational-quadratic spline of angles with K bins that cover the circle, for vectors.

        z = wrap(g(wrap(x + phase)))

    g is the spline of `Spline` on [-pi, pi]. It maps -pi to -pi and pi to pi, and its slopes at both ends are equal, so
    z has a continuous derivative on the circle (Rezende et al. 2020, Normalizing flows on tori and spheres, section
    2.1.2). The phase rotates the knots of x. Without a phase, -pi would be a fixed point. z and x lie in [-pi, pi), and
    the maps are periodic in their arguments. x -> z is the direction of training.

    theta has 3 K + 2 numbers for each element: K widths and K heights before a softmax, the logarithms of K slopes, and
    two numbers (u, v) with phase = atan2(u, 1 + v). The phase can therefore make a full turn while another angle makes
    a full turn. A continuous real-valued output of a network cannot represent this.

    Args:
        bins: K, at least 2.
        least_slope: see `Spline`.

    Raises:
        FlowtrainError: a setting out of range.

    Example:
        >>> spline = CircularSpline(bins=4)
        >>> theta = torch.randn(1, 14, generator=torch.Generator().manual_seed(0))
        >>> z, log_slope = spline.to_base(torch.tensor([[0.5]]), theta)
        >>> again, _ = spline.to_base(torch.tensor([[0.5 + 2 * math.pi]]), theta)
        >>> x, back = spline.to_data(z, theta)
        >>> round(x.item(), 4), abs(float(log_slope + back)) < 1e-4, abs(float(z - again)) < 1e-4
        (0.5, True, True)
    """

    def __init__(self, bins: int = 8, least_slope: float = 1e-3) -> None:
        super().__init__(bins, math.pi, least_slope)
        self.n_numbers = 3 * bins
        self.first_knot = 0
        self.size = self.n_numbers + 2

    def at_knots(self, inner: Tensor) -> Tensor:
        return torch.cat([inner, inner[:1]])

    def fill_knots(self, knots: Tensor) -> None:
        knots[-1] = knots[0]

    def add_equal_knots(self, gradient: Tensor) -> None:
        gradient[0] += gradient[-1]

    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        numbers, phase = self._parts(x, theta)
        z, log_slope = super().to_base(wrap(x + phase), numbers)
        return wrap(z), log_slope

    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        numbers, phase = self._parts(z, theta)
        x, log_slope = super().to_data(wrap(z), numbers)
        return wrap(x - phase), log_slope

    def _parts(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers of the spline (B, n_numbers n) and the phase (B, n), for x (B, n)."""
        n = x.shape[1]
        numbers, u, v = torch.split(theta, [self.n_numbers * n, n, n], 1)
        w = 1 + v
        # the derivative of atan2 is not defined at (0, 0)
        return numbers, torch.atan2(u, torch.where(u.square() + w.square() < LEAST_SQUARE, 1.0, w))


class RealThenCircular(Elementwise):
    """An elementwise map of vectors with n real elements, followed by circular elements.

    theta has the numbers of the real elements first, and then the numbers of the circular elements. A theta of zero
    gives the identity.

    Args:
        n: the number of real elements.
        real, circular: the maps of the two kinds of elements.

    Example:
        >>> from flowtrain.bijections.elementwise import ScaleShift
        >>> both = RealThenCircular(1, ScaleShift(), CircularSpline(bins=2))
        >>> both.owners(3).tolist()  # 2 numbers for element 0, and 8 each for elements 1 and 2
        [0, 0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    """

    def __init__(self, n: int, real: Elementwise, circular: Elementwise) -> None:
        super().__init__()
        self.n, self.real, self.circular = n, real, circular

    def owners(self, n: int) -> Tensor:
        return torch.cat([self.real.owners(self.n), self.n + self.circular.owners(n - self.n)])

    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        at = self.real.size * self.n
        x, log_slope = self.real.to_data(z[:, : self.n], theta[:, :at])
        angle, log_slope_of_angle = self.circular.to_data(z[:, self.n :], theta[:, at:])
        return torch.cat([x, angle], 1), torch.cat([log_slope, log_slope_of_angle], 1)

    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        at = self.real.size * self.n
        z, log_slope = self.real.to_base(x[:, : self.n], theta[:, :at])
        angle, log_slope_of_angle = self.circular.to_base(x[:, self.n :], theta[:, at:])
        return torch.cat([z, angle], 1), torch.cat([log_slope, log_slope_of_angle], 1)


def by_kind(n_real: int, n_circular: int, real: Elementwise, circular: Elementwise) -> Elementwise:
    """Returns the map of n_real elements followed by n_circular circular elements."""
    if not n_circular:
        return real
    return RealThenCircular(n_real, real, circular) if n_real else circular


class WrapAngles(Bijection):
    """Wraps circular columns of vectors to [-pi, pi), in both directions. The log-determinant is 0.

    As a map of points of the circle it is the identity.

    Args:
        d: length of the vectors.
        circular: the indices of the circular columns.

    Raises:
        ConfigError: an invalid index.

    Example:
        >>> WrapAngles(2, [1])(torch.tensor([[4.0, 4.0]]))[0]
        tensor([[ 4.0000, -2.2832]])
    """

    is_circular: Tensor

    def __init__(self, d: int, circular: Sequence[int]) -> None:
        super().__init__()
        angles = circular_indices(circular, d)
        is_circular = torch.tensor([i in angles for i in range(d)], device="cpu")
        # checkpoints do not contain this buffer, because the arguments determine it
        self.register_buffer("is_circular", is_circular, persistent=False)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.where(self.is_circular, wrap(z), z), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(x)
