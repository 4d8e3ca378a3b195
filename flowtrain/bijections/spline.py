"""Monotone rational-quadratic splines (Durkan et al. 2019, Neural Spline Flows)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from flowtrain.bijections.elementwise import LOG2_E, Elementwise
from flowtrain.utils.autograd import differentiable_vjp, transforms_active
from flowtrain.utils.errors import FlowtrainError


class Spline(Elementwise):
    """A rational-quadratic spline z = g(x) with K bins on [-B, B], and z = x outside.

    A bin has the corners (x_k, z_k) and (x_{k+1}, z_{k+1}), the slopes d_k and d_{k+1} at the corners, and the slope
    s = (z_{k+1} - z_k) / (x_{k+1} - x_k) of the chord. With t = (x - x_k) / (x_{k+1} - x_k),

        g(x) = z_k + (z_{k+1} - z_k) (s t^2 + d_k t (1 - t)) / (s + (d_k + d_{k+1} - 2 s) t (1 - t))

    (Gregory and Delbourgo 1982). The slopes at -B and B are 1, so g has a continuous derivative everywhere.
    g maps data to base, the direction of training. Its inverse is the root of a quadratic.

    theta has 3 K - 1 numbers for each element: K widths and K heights before a softmax, and the logarithms of K - 1
    inner slopes. Each number v is first bounded to v / (1 + |v| / c), as in zuko. This bounds the slopes at the knots
    and, up to a factor K, the slopes of the chords. The spline is then invertible in float32: its inverse divides a
    rounding error of z by the slope.

    Args:
        bins: K, at least 2.
        bound: B.
        least_slope: the smallest slope at a knot, between 0 and 1; 1 / least_slope is the largest.

    Raises:
        FlowtrainError: a setting out of range.

    Example:
        >>> spline = Spline(bins=4, bound=3.0)
        >>> theta = torch.randn(1, 11, generator=torch.Generator().manual_seed(0))
        >>> z, log_slope = spline.to_base(torch.tensor([[0.5]]), theta)
        >>> x, back = spline.to_data(z, theta)
        >>> round(x.item(), 4), abs(float(log_slope + back)) < 1e-4
        (0.5, True)
    """

    has_gradient = True

    def __init__(self, bins: int = 8, bound: float = 5.0, least_slope: float = 1e-3) -> None:
        super().__init__()
        if bins < 2 or not bound > 0 or not 0 < least_slope < 1:
            raise FlowtrainError(
                f"a spline with bins={bins}, bound={bound:g} and least_slope={least_slope:g}: give at least 2 bins, a "
                "positive bound, and a least_slope between 0 and 1"
            )
        self.bins, self.bound, self.least_slope = bins, bound, least_slope
        self.size = 3 * bins - 1
        # the size of the first axis of the result of `first_axis`
        self.n_numbers = self.size
        # the index of the first knot that has a number in theta
        self.first_knot = 1
        # 1 / c. The slope of a chord is a ratio of two softmax outputs, so c is half as large for widths and heights
        self.clip_slope = -1 / math.log(least_slope)
        self.clip_size = 2 * self.clip_slope

    def to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if _is_empty(x):
            return _empty_result(x, theta)
        y, theta = self.first_axis(x, theta)
        # _ToBase is used also without gradients, so that values are the same to the last bit
        found = self.evaluated(y, theta) if _transformed() else _ToBase.apply(y, theta, self)  # type: ignore[no-untyped-call]
        return (found[0].T, found[1].T) if x.dim() == 2 else found

    def to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if _is_empty(z):
            return _empty_result(z, theta)
        y, theta = self.first_axis(z, theta)
        inside = y.abs() <= self.bound
        found = self.bin_of(y.clamp(-self.bound, self.bound), theta, axis=1)
        # the root in [0, 1] of a t^2 + b t + c, in the formula without cancellation
        bend = found.offset * found.bend
        a, b = found.height * (found.chord - found.left) + bend, found.height * found.left - bend
        c = -found.chord * found.offset
        # the derivative of sqrt is infinite at 0
        root = (b.square() - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        t = (-2 * c / (b + root)).clamp(0, 1)
        # one step of Newton's method corrects the rounding errors of a, b and c
        u = t * (1 - t)
        denominator = found.chord + found.bend * u
        excess = found.height * (found.chord * t.square() + found.left * u) / denominator - found.offset
        t = (t - excess / (found.width * _log_slope(found, t).exp())).clamp(0, 1)
        log_slope = -_log_slope(found, t)
        x = torch.where(inside, torch.addcmul(found.x, t, found.width), y)
        log_slope = torch.where(inside, log_slope, torch.zeros_like(log_slope))
        return (x.T, log_slope.T) if z.dim() == 2 else (x, log_slope)

    def values_to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (z, log dz/dx) for x (n, B) and theta (size * n, B), without a gradient."""
        found = _searched(self, x, theta, axis=0)
        t = found.offset.div_(found.own).clamp_(0, 1)
        ratio, log_slope = _ratio_and_log_slope(found, t)
        z = torch.addcmul(found.corner, found.size, ratio)
        # outside, the spline is the identity
        return torch.where(found.inside, z, x), log_slope.mul_(found.inside)

    def values_to_data(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (x, log dx/dz) for z (n, B) and theta (size * n, B), without a gradient, see `to_data`."""
        found = _searched(self, z, theta, axis=1)
        offset, height, chord, left = found.offset, found.own, found.chord, found.left
        bend = offset * found.bend
        a, b = (chord - left).mul_(height).add_(bend), (height * left).sub_(bend)
        c = chord * offset
        root = b.square().addcmul_(a, c, value=4).clamp_min_(torch.finfo(z.dtype).tiny).sqrt_()
        t = c.mul_(2).div_(root.add_(b)).clamp_(0, 1)
        # one step of Newton's method. The derivative by t is the slope times the width
        ratio, log_slope = _ratio_and_log_slope(found, t)
        slope = log_slope.mul_(LOG2_E).exp2_().mul_(found.size).div_(2 * self.bound)
        t = t.addcdiv_(ratio.mul_(height).sub_(offset), slope, value=-1).clamp_(0, 1)
        _, log_slope = _ratio_and_log_slope(found, t)
        x = torch.addcmul(found.corner, found.size, t)
        return torch.where(found.inside, x, z), log_slope.mul_(found.inside).neg_()

    def columns_to_base(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return _values(self, x, theta.view(self.n_numbers, *x.shape), overwrite=True)

    def columns_gradient(self, kept: Sequence[Tensor], g_z: Tensor, g_log: Tensor) -> tuple[Tensor, Tensor]:
        g_x, g_theta = _gradients(self, kept, g_z, g_log)
        assert g_x is not None
        assert g_theta is not None
        return g_x, g_theta.flatten(0, 1)

    def first_axis(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and theta (n_numbers, *y.shape).

        Torch is several times faster if the numbers of theta are along the first axis. For vectors x (B, n), y is
        (n, B). If theta is stored in column-major order, as by `ResidualMLP`, no copy is needed.
        """
        if x.dim() == 2:
            return x.T.contiguous(), theta.T.reshape(self.n_numbers, *x.T.shape).contiguous()
        return x, theta.reshape(x.shape[0], self.n_numbers, *x.shape[1:]).movedim(1, 0).contiguous()

    def at_knots(self, inner: Tensor) -> Tensor:
        """Returns a number for each knot, (K + 1, ...), from the last numbers in theta, which give the slopes.

        The slope at a knot is the exponential of this number, so that a zero gives the slope 1.
        """
        return F.pad(inner, ((0, 0) * (inner.dim() - 1) + (1, 1)))

    def fill_knots(self, knots: Tensor) -> None:
        """Sets the numbers of `at_knots`, (K + 1, ...), that are not in theta. The others have been set."""
        knots[0], knots[-1] = 0, 0

    def add_equal_knots(self, gradient: Tensor) -> None:
        """Adds up the gradients, (K + 1, ...), of knots that have the same number in theta, in place."""

    def evaluated(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Computes (z, log dz/dx) by differentiable operations of torch. theta is (3 K - 1, *x.shape)."""
        inside = x.abs() <= self.bound
        found = self.bin_of(x.clamp(-self.bound, self.bound), theta, axis=0)
        t = (found.offset / found.width).clamp(0, 1)
        u = t * (1 - t)
        ratio = (found.chord * t.square() + found.left * u) / (found.chord + found.bend * u)
        z = torch.addcmul(found.z, found.height, ratio)
        log_slope = _log_slope(found, t)
        return torch.where(inside, z, x), torch.where(inside, log_slope, torch.zeros_like(log_slope))

    def bin_of(self, y: Tensor, theta: Tensor, axis: int) -> "_Bin":
        """Finds the bin that contains y, which is x for axis 0 and z for axis 1, -B <= y <= B."""
        k = self.bins
        theta_of_shares, theta_of_slopes = theta[: 2 * k], theta[2 * k :]
        bounded = theta_of_shares / (theta_of_shares.abs() * self.clip_size + 1)
        share = bounded.reshape(2, k, *y.shape).softmax(1)
        sums = share.cumsum(1)
        index = (sums[axis, :-1] <= (y + self.bound) / (2 * self.bound)).sum(0, keepdim=True)
        ends = torch.cat([index, index + 1])
        padding = (0, 0) * y.dim()
        # (2 axes, 2 ends, ...)
        sums = F.pad(sums, (*padding, 1, 0)).gather(1, ends.expand(2, *ends.shape))
        corners = sums * (2 * self.bound) - self.bound
        raw = self.at_knots(theta_of_slopes / (theta_of_slopes.abs() * self.clip_slope + 1))
        left, right = raw.gather(0, ends).exp()
        x, z = corners[:, 0]
        width, height = corners[:, 1] - corners[:, 0]
        chord = height / width
        bend = left + right - 2 * chord
        offset = y - (z if axis else x)
        return _Bin(x, z, width, height, left, right, chord, bend, offset)


class _Bin(NamedTuple):
    """The bin of each element.

    Attributes:
        x, z: the lower left corner.
        width, height: the size.
        left, right: the slopes at the two knots.
        chord: height / width.
        bend: left + right - 2 chord.
        offset: the distance of the given value from the lower end of the bin.
    """

    x: Tensor
    z: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    right: Tensor
    chord: Tensor
    bend: Tensor
    offset: Tensor


class _Searched(NamedTuple):
    """The bin of each element for `values_to_base` and `values_to_data`, (n, B) each.

    Attributes:
        inside: whether the given value is in [-B, B].
        offset: the distance of the given value from the lower end of the bin, divided by 2 B.
        own: the size of the bin on the axis of the given value, divided by 2 B.
        corner, size: the lower end and the size of the bin on the other axis.
        left, right, chord, bend: as in `_Bin`.
    """

    inside: Tensor
    offset: Tensor
    own: Tensor
    corner: Tensor
    size: Tensor
    left: Tensor
    right: Tensor
    chord: Tensor
    bend: Tensor


# the number of elements from which adding the shares one by one is faster than torch.cumsum on a CPU
MANY = 4096


def _searched(spline: Spline, y: Tensor, theta: Tensor, axis: int) -> _Searched:
    """Finds the bin that contains y (n, B), for theta (size * n, B). y is x for axis 0, and z for axis 1.

    The function has fewer operations than `Spline.bin_of`, and no gradient.
    """
    k, bound = spline.bins, spline.bound
    theta = theta.view(spline.n_numbers, *y.shape)
    numbers = theta[: 2 * k]
    clipped = numbers.abs().mul_(spline.clip_size).add_(1)
    share = torch.div(numbers, clipped, out=clipped).view(2, k, *y.shape).softmax(1)
    sums = _sums(share)
    target = y.clamp(-bound, bound).add_(bound).div_(2 * bound)
    # a comparison with a float result is three times as fast as with a bool result
    below = torch.le(sums[axis, :-1], target, out=torch.empty_like(sums[axis, :-1]))
    index = below.sum(0, keepdim=True).to(torch.int64)
    both = index.expand(2, 1, *y.shape)
    own = share.gather(1, both).squeeze(1)
    low = sums.gather(1, both).squeeze(1).sub_(own)
    raw = spline.at_knots(theta[2 * k :]).gather(0, torch.cat([index, index + 1]))
    left, right = raw.div_(raw.abs().mul_(spline.clip_slope).add_(1)).mul_(LOG2_E).exp2_()
    chord = own[1] / own[0]
    return _Searched(
        y.abs() <= bound,
        target.sub_(low[axis]),
        own[axis],
        low[1 - axis].mul(2 * bound).sub_(bound),
        own[1 - axis] * (2 * bound),
        left,
        right,
        chord,
        torch.add(left + right, chord, alpha=-2),
    )


def _sums(share: Tensor) -> Tensor:
    """Returns the cumulative sums of share (2, K, n, B) over dimension 1."""
    if share.device.type != "cpu" or share[0, 0].numel() < MANY:
        return share.cumsum(1)
    sums = torch.empty_like(share)
    parts, found = share.unbind(1), sums.unbind(1)
    found[0].copy_(parts[0])
    for i in range(1, len(parts)):
        torch.add(found[i - 1], parts[i], out=found[i])
    return sums


def _ratio_and_log_slope(found: _Searched, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (z - z_k) / (z_(k+1) - z_k) and log dz/dx at t."""
    v = 1 - t
    u, square = t * v, t.square()
    denominator = torch.addcmul(found.chord, found.bend, u)
    top = (found.left * u).addcmul_(found.chord, square)
    slopes = (found.chord * u).mul_(2).addcmul_(found.right, square).addcmul_(found.left, v.square_())
    log_slope = slopes.mul_((found.chord / denominator).square_()).log_()
    return top.div_(denominator), log_slope


def _is_empty(x: Tensor) -> bool:
    """Whether x has no elements. The result is False during tracing, which must not branch on the number of rows."""
    return not _transformed() and x.numel() == 0


def _empty_result(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the result for an empty x, with a graph to x and theta. Torch before 2.9 cannot pad empty tensors."""
    y = x + 0 * theta.sum()
    return y, torch.zeros_like(y)


def _transformed() -> bool:
    """Whether torch.func or a compiler is active. Both need differentiable operations of torch."""
    return transforms_active() or torch.compiler.is_compiling()


def _log_slope(found: _Bin, t: Tensor) -> Tensor:
    """Returns log dz/dx at t."""
    u = t * (1 - t)
    slopes = found.right * t.square() + 2 * found.chord * u + found.left * (1 - t).square()
    return slopes.log() + 2 * (found.chord / (found.chord + found.bend * u)).log()


class _ToBase(torch.autograd.Function):
    """`Spline.evaluated` with a hand-written gradient, for speed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, spline: Spline) -> tuple[Tensor, Tensor]:
        z, log_slope, kept = _values(spline, x, theta)
        ctx.spline = spline
        ctx.save_for_backward(x, theta, *kept)
        return z, log_slope

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        batched = any(_functorch.is_legacy_batchedtensor(g) for g in (grad_z, grad_log))
        if torch.is_grad_enabled() or batched or _transformed():
            return _ToBase.by_autograd(ctx, grad_z, grad_log)
        kept = ctx.saved_tensors[2:]
        grad_x, grad_theta = _gradients(ctx.spline, kept, grad_z, grad_log, *ctx.needs_input_grad[:2])
        return grad_x, grad_theta, None

    @staticmethod
    def by_autograd(ctx: Any, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""
        inputs, needed = ctx.saved_tensors[:2], ctx.needs_input_grad[:2]
        x, theta = differentiable_vjp(ctx.spline.evaluated, inputs, needed, [grad_z, grad_log])
        return x, theta, None


def _values(
    spline: Spline, x: Tensor, theta: Tensor, overwrite: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Returns z, log dz/dx and tensors for `_gradients`, for theta (n_numbers, *x.shape).

    The results are those of `Spline.evaluated`, with fewer operations. For the batches of tables, the time of an
    operation hardly depends on its size. If `overwrite`, theta is overwritten.
    """
    k, bound = spline.bins, spline.bound
    # v is bounded to v / (1 + |v| / c)
    divisor = theta.abs()
    divisor[: 2 * k].mul_(spline.clip_size)
    divisor[2 * k :].mul_(spline.clip_slope)
    divisor.add_(1)
    bounded = theta.div_(divisor) if overwrite else theta / divisor
    share = bounded[: 2 * k].view(2, k, *x.shape).softmax(1)
    # for each knot: the sums of widths and heights, and the number whose exponential is the slope
    knots = theta.new_empty(3, k + 1, *x.shape)
    torch.cumsum(share, 1, out=knots[:2, 1:])
    knots[:2, 0] = 0
    knots[2, spline.first_knot :][: len(theta) - 2 * k] = bounded[2 * k :]
    spline.fill_knots(knots[2])
    y = x.clamp(-bound, bound)
    is_inside = y == x
    inside = is_inside.to(x.dtype)
    # 1 for each bin before the one that contains x
    before = torch.empty_like(share[0])
    torch.le(knots[0, 1:], (y + bound).div_(2 * bound), out=before)
    before[-1] = 0
    index = before.sum(0, keepdim=True).to(torch.int64)
    ends = torch.cat([index, index + 1])
    at_ends = knots.gather(1, ends.expand(3, *ends.shape))
    end_slopes = at_ends[2].exp()
    left, right = end_slopes
    corners = (at_ends[:2] * (2 * bound)).sub_(bound)
    size = corners[:, 1] - corners[:, 0]
    width, height = size
    chord = height / width
    bend = (left + right).sub_(chord, alpha=2)
    # rounding may put x outside of its bin
    t = y.sub_(corners[0, 0]).div_(width).clamp_(0, 1)
    v = 1 - t
    u, t2, v2 = t * v, t * t, v * v
    denominator = torch.addcmul(chord, bend, u)
    ratio = (left * u).addcmul_(chord, t2).div_(denominator)
    slopes = (right * t2).addcmul_(chord, u, value=2).addcmul_(left, v2)
    z = torch.addcmul(corners[1, 0], height, ratio)
    log_slope = (chord / denominator).square_().mul_(slopes).log_().mul_(inside)
    kept = (
        inside, t, u, v, t2, v2, denominator, ratio, slopes, width, height, left, right, chord, bend,
        log_slope, ends, at_ends, end_slopes, before, share, divisor,
    )  # fmt: skip
    return torch.where(is_inside, z, x), log_slope, kept


def _gradients(
    spline: Spline,
    kept: Sequence[Tensor],
    grad_z: Tensor,
    grad_log: Tensor,
    of_x: bool = True,
    of_theta: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x and theta, or None if `of_x` or `of_theta` is false."""
    inside, t, u, v, t2, v2, denominator, ratio, slopes, width, height, left, right, chord, bend, *rest = kept
    log_slope, ends, at_ends, end_slopes, *whole = rest
    gz, gl = grad_z * inside, grad_log * inside
    # gradients of `slopes`, and of the denominator of `ratio` through log_slope
    g_slopes = gl / slopes
    g_log_denominator = (gl / denominator).mul_(-2)
    w = v - t
    g_t = (chord * w).addcmul_(right, t).addcmul_(left, v, value=-1).mul_(g_slopes)
    g_t = (g_log_denominator * bend).mul_(w).add_(g_t, alpha=2)
    # dz/dx is 1 outside
    grad_x = log_slope.exp().mul_(grad_z).addcdiv_(g_t, width)
    if not of_theta:
        return grad_x, None
    # gradients of the numerator and of the denominator of `ratio`
    g_top = (gz * height).div_(denominator)
    g_bottom = g_log_denominator.addcmul_(g_top, ratio, value=-1)
    slope = torch.empty_like(end_slopes)
    torch.add(g_top, g_bottom, out=slope[0]).mul_(u).addcmul_(g_slopes, v2)
    torch.mul(g_bottom, u, out=slope[1]).addcmul_(g_slopes, t2)
    slope.mul_(end_slopes)
    g_chord = gl.div_(chord).mul_(2).add_(g_bottom).addcmul_(g_top, t2).addcmul_(u, g_slopes.sub_(g_bottom), value=2)
    # gradients of the corner of the bin (the sum of the shares before the bin) and of its size (one share)
    moved = grad_x.new_empty(4, *grad_x.shape)
    torch.mul(grad_x, inside, out=moved[0])
    moved[1] = gz
    per_width = g_chord.div_(width)
    torch.mul(per_width, chord, out=moved[2]).addcmul_(moved[0], t)
    torch.addcmul(per_width, gz, ratio, out=moved[3])
    moved.view(2, 2, *grad_x.shape)[:, 0].neg_()
    moved.mul_(2 * spline.bound)
    found = _gradient_of_theta(spline, ends, at_ends[:2], moved[:2], moved[2:], slope, *whole)
    return grad_x if of_x else None, found


def _gradient_of_theta(
    spline: Spline,
    ends: Tensor,
    sums: Tensor,
    g_before: Tensor,
    g_own: Tensor,
    g_slope: Tensor,
    before: Tensor,
    share: Tensor,
    divisor: Tensor,
) -> Tensor:
    """Returns the gradient of theta, (n_numbers, ...).

    Args:
        spline: the spline.
        ends: the indices of the two knots of the bin, (2, ...).
        sums: the sums of widths and heights up to these knots, (2, 2, ...).
        g_before, g_own, g_slope: gradients of the shares before the bin, of the shares of the bin, and of the numbers
            of `Spline.at_knots` at the bin, each (2, ...).
        before: 1 for each bin before the bin that contains x, else 0, (K, ...).
        share: the softmax of widths and heights, (2, K, ...).
        divisor: 1 + |v| / c for the numbers v in theta.
    """
    k, rest = share.shape[1], divisor.shape[1:]
    # through the softmax: share_j (g_j - sum_i share_i g_i)
    low, high = sums.unbind(1)
    mean = (g_before - g_own).mul_(low).addcmul_(g_own, high)
    # the numbers of the first knots that are not in theta are overwritten by the gradients of the shares
    found = divisor.new_empty(2 * k + 1 + k, *rest)[: 3 * k + 1 - spline.first_knot]
    of_knots = found[2 * k - spline.first_knot :]
    of_knots.zero_()
    of_knots.scatter_(0, ends, g_slope)
    spline.add_equal_knots(of_knots)
    found = found[: len(divisor)]
    parts = found[: 2 * k].view(2, k, *rest)
    torch.mul(before, g_before.unsqueeze(1), out=parts)
    parts.sub_(mean.unsqueeze(1)).scatter_add_(1, ends[:1].expand(2, 1, *rest), g_own.unsqueeze(1)).mul_(share)
    return found.div_(divisor).div_(divisor)
