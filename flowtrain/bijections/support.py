"""The map from the real line to the support of each column: positive numbers, intervals and circles."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from flowtrain.bijections.base import Bijection
from flowtrain.utils.errors import FlowtrainError

# the place of a value at a closed end, as a fraction of the interval
AT_END = 5e-6


class _Group(NamedTuple):
    """Columns with the same map.

    Attributes:
        low, high: the ends of the support.
        is_circular: whether the ends are the same point.
        is_whole: whether values are whole numbers plus noise in [0, 1).
        scale: s of the softplus if one end is finite; 0 for the logarithm.
    """

    low: float
    high: float
    is_circular: bool
    is_whole: bool
    scale: float

    @property
    def has_both(self) -> bool:
        return math.isfinite(self.high - self.low)


class ToSupport(Bijection):
    """An elementwise map x_i = f_i(z_i) from the real line to the support [a_i, b_i] of column i.

    - a and b finite: z = log(x - a) - log(b - x), the logit of (x - a) / (b - a)
    - a finite: z = log(x - a), or with a scale s > 0, z = log(exp((x - a) / s) - 1), the inverse of s softplus(z) + a
    - b finite: -z = log(b - x), or the same with s
    - a and b infinite: z = x
    - circular: z = 2 pi (x - a) / (b - a) - pi, in [-pi, pi). Values outside of [a, b) are wrapped

    log|det dz/dx| is the sum of the logarithms of the slopes. It is -inf if a value is outside of its support, so the
    density there is 0. If a and b are finite, a value at an end is moved inwards by 5e-6 (b - a). If only one end is
    finite, it belongs to the support only if the column contains whole numbers, and a value there is moved by 5e-6.

    Args:
        low, high: a and b of each column, (d,).
        circular: the positions of circular columns.
        whole: the positions of columns that contain whole numbers plus noise in [0, 1). Samples of these columns are
            below b.
        scale: s of each column, (d,), which applies if one end is finite. 0 means the logarithm. None means 0 for all.

    Raises:
        FlowtrainError: bounds that are not in ascending order, or different numbers of bounds.

    Example:
        >>> support = ToSupport([0.0, 0.0], [math.inf, 1.0])
        >>> z, log_det = support.inverse(torch.tensor([[1.0, 0.5]]))
        >>> z, round(float(log_det), 4)  # log 1 + log 4
        (tensor([[0., 0.]]), 1.3863)
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        circular: Sequence[int] = (),
        whole: Sequence[int] = (),
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
            raise FlowtrainError(f"ToSupport(low={low}, high={high}): give the ends of each column in ascending order")
        scales = [0.0] * len(low) if scale is None else scale
        each = [
            _Group(float(a), float(b), i in circular, i in whole, float(s))
            for i, (a, b, s) in enumerate(zip(low, high, scales, strict=True))
        ]
        self.groups = tuple(dict.fromkeys(each))
        self.sizes = [each.count(group) for group in self.groups]
        order = torch.tensor([i for group in self.groups for i, other in enumerate(each) if other == group])
        # the indices follow from the arguments, so checkpoints do not contain them
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", torch.argsort(order), persistent=False)

    order: Tensor
    back: Tensor

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(_to_data, z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(_to_line, x)

    def _map(self, function: Callable[[_Group, Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        """Applies a function, which also returns log-slopes, to the columns of each group."""
        found, log_det = [], x.new_zeros(x.shape[0])
        for group, part in zip(self.groups, torch.split(x.index_select(1, self.order), self.sizes, 1), strict=True):
            y, log_slope = function(group, part)
            found.append(y)
            log_det = log_det + log_slope.sum(1)
        return torch.cat(found, 1).index_select(1, self.back), log_det


def _to_line(group: _Group, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (z, log dz/dx), each (B, k), for values x (B, k)."""
    low, high = group.low, group.high
    if group.is_circular:
        turns = torch.remainder((x - low) / (high - low), 1.0)
        return 2 * math.pi * turns - math.pi, torch.full_like(x, math.log(2 * math.pi / (high - low)))
    if not math.isfinite(low) and not math.isfinite(high):
        return x, torch.zeros_like(x)
    if group.has_both:
        end = AT_END * (high - low)
        above, below = x - low, high - x
        outside = (above < 0) | (below < 0)
        above, below = _inside(above, end), _inside(below, end)
        z, log_slope = above.log() - below.log(), math.log(high - low) - above.log() - below.log()
    else:
        distance = x - low if math.isfinite(low) else high - x
        outside = distance < 0 if group.is_whole else distance <= 0
        inside = _inside(distance, AT_END)
        if group.scale:
            # log(exp(r) - 1) = r + log(1 - exp(-r)), without overflow
            r = inside / group.scale
            log_share = (-torch.expm1(-r)).log()
            z, log_slope = r + log_share, -log_share - math.log(group.scale)
        else:
            z, log_slope = inside.log(), -inside.log()
        z = z if math.isfinite(low) else -z
    return z, torch.where(outside, -torch.inf, log_slope)


def _inside(distance: Tensor, end: float) -> Tensor:
    """Returns the distance to an end of the support, and `end` for values at this end or beyond it."""
    return torch.where(distance <= 0, end, distance)


def _to_data(group: _Group, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x, log dx/dz), each (B, k), for z (B, k)."""
    low, high = group.low, group.high
    if group.is_circular:
        turns = torch.remainder((z + math.pi) / (2 * math.pi), 1.0)
        x, log_slope = low + (high - low) * turns, torch.full_like(z, math.log((high - low) / (2 * math.pi)))
    elif not math.isfinite(low) and not math.isfinite(high):
        return z, torch.zeros_like(z)
    elif group.has_both:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        # x is computed from the nearer end, which avoids cancellation
        x = torch.where(z < 0, low + (high - low) * p, high - (high - low) * q)
        log_slope = math.log(high - low) + logsigmoid(z) + logsigmoid(-z)
    else:
        is_low = math.isfinite(low)
        y = z if is_low else -z
        if group.scale:
            distance, log_slope = group.scale * softplus(y), math.log(group.scale) + logsigmoid(y)
        else:
            # the exponential stays finite
            y = y.clamp_max(math.log(torch.finfo(z.dtype).max) - 1)
            distance, log_slope = y.exp(), y
        x = low + distance if is_low else high - distance
    return x.clamp(*_ends(group, z.dtype)), log_slope


@cache
def _ends(group: _Group, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the smallest and the largest number of a dtype in the support."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    low, high = kind(group.low), kind(group.high)
    # an end that does not belong to the support: both ends of an open support, and the upper end of other supports
    is_open = not group.has_both and not group.is_whole
    if float(low) < group.low or (is_open and math.isfinite(group.low)):
        # subnormal numbers are rounded to zero on some devices
        low = np.finfo(kind).tiny if group.low == 0 else np.nextafter(low, kind(math.inf))
    if float(high) > group.high or ((is_open or group.is_circular or group.is_whole) and float(high) == group.high):
        high = np.nextafter(high, kind(-math.inf)) if math.isfinite(group.high) else high
    return float(low), float(high)
