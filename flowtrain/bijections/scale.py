"""Elementwise affine maps: ActNorm, BatchNorm and standardisation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.bijections.base import Bijection, check_sample, elements_per_channel, per_channel, var_mean, varies
from flowtrain.utils.arguments import shape_of
from flowtrain.utils.autograd import differentiable_vjp, needs_autograd, transforms_active
from flowtrain.utils.errors import DataError

# the smallest standard deviation that ActNorm divides a channel by
LEAST = 1e-6


class ActNorm(Bijection):
    """The map x = z exp(s) + m per channel, for vectors (B, C) and images (B, C, H, W).

    log|det dx/dz| = H W sum_c s_c (Kingma and Dhariwal 2018, Glow, section 3.1 and table 1). `initialize` sets s and m
    such that z has zero mean and unit variance for the given data. Afterwards s and m are ordinary parameters.

    Args:
        shape: C, or (C, H, W) for a separate scale and shift of each pixel.

    Example:
        >>> norm = ActNorm(1)
        >>> norm.initialize(torch.tensor([[1.0], [3.0]]))
        tensor([[-1.],
                [ 1.]])
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # `map_forward` of a subclass may call `forward`
        return ActNorm.map_forward(self, z), self.log_det(z)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.over(self.shift, z), z, self.over(self.log_scale.exp(), z))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if needs_autograd(x) or x.dtype != self.shift.dtype:
            return (x - self.over(self.shift, x)) * self.over((-self.log_scale).exp(), x), -self.log_det(x)
        if not torch.is_grad_enabled():
            return (x - self.over(self.shift, x)).mul_(self.over((-self.log_scale).exp_(), x)), -self.log_det(x)
        return _Normalize.apply(x, self.shift, self.log_scale)  # type: ignore[no-untyped-call,no-any-return]

    def log_det(self, x: Tensor) -> Tensor:
        """Returns log|det dx/dz| for each row of x, (B,)."""
        return (_shared(self.log_scale, x) * self.log_scale.sum()).expand(x.shape[0])

    def over(self, v: Tensor, x: Tensor) -> Tensor:
        """Reshapes a parameter, (C,) or (C, H, W), so that it broadcasts over x (B, C, ...)."""
        return _over(v, x)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        check_sample(x)
        shared = (0, *range(2, x.dim())) if self.shift.dim() == 1 else (0,)
        variance, mean = var_mean(x, shared, weights)
        std = variance.sqrt()
        self.shift.copy_(mean)
        self.log_scale.copy_(std.clamp_min(LEAST).log().where(varies(std, self.shift), 0))
        return self.map_inverse(x, context)


class _Normalize(torch.autograd.Function):
    """`ActNorm.inverse` as one operation of autograd, whose gradient needs half of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        factor = _over((-log_scale).exp_(), x)
        z = (x - _over(shift, x)).mul_(factor)
        ctx.save_for_backward(x, shift, log_scale, factor, z)
        return z, (-_shared(log_scale, x) * log_scale.sum()).expand(len(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, log_scale, factor, z = ctx.saved_tensors
        batched = any(_functorch.is_legacy_batchedtensor(g) for g in (grad, grad_log))
        if torch.is_grad_enabled() or batched or transforms_active():
            return _Normalize.by_autograd(ctx, x, shift, log_scale, grad, grad_log)
        shared = (0, *range(2, x.dim())) if shift.dim() == 1 else (0,)
        g_x = grad * factor
        g_scale = (grad * z).sum(shared).add_(grad_log.sum(), alpha=_shared(log_scale, x)).neg_()
        return g_x, g_x.sum(shared).neg_(), g_scale

    @staticmethod
    def by_autograd(
        ctx: Any, x: Tensor, shift: Tensor, log_scale: Tensor, grad: Tensor, grad_log: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""

        def evaluated(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
            z = (x - _over(shift, x)) * _over((-log_scale).exp(), x)
            return z, (-_shared(log_scale, x) * log_scale.sum()).expand(len(x))

        return tuple(differentiable_vjp(evaluated, [x, shift, log_scale], ctx.needs_input_grad, [grad, grad_log]))


def _over(v: Tensor, x: Tensor) -> Tensor:
    """Reshapes a parameter, (C,) or (C, H, W), so that it broadcasts over x (B, C, ...)."""
    return per_channel(v, x) if v.dim() == 1 else v


def _shared(v: Tensor, x: Tensor) -> int:
    """Returns the number of elements of a row of x (B, C, ...) for each element of the parameter v."""
    return math.prod(x.shape[1:]) // v.numel()


class BatchNorm(Bijection):
    """The map x = z sqrt(v + eps) + m per channel, with the mean m and the variance v of x.

    log|det dx/dz| = H W sum_c log(v_c + eps) / 2 (Dinh et al. 2017, Real NVP, section 3.7). In training mode, `inverse`
    updates the running statistics and uses the mean and variance of the batch, so log p of a row depends on the other
    rows. In evaluation mode, and in `forward`, the running statistics are used.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    mean: Tensor
    variance: Tensor

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        std = (self.variance + self.eps).sqrt()
        return torch.addcmul(per_channel(self.mean, z), z, per_channel(std, z)), self.log_det(self.variance, z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = self.mean, self.variance
        # an empty batch has no statistics
        if self.training and len(x):
            variance, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        return self.standardized(x, mean, variance), -self.log_det(variance, x)

    def standardized(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Returns (x - mean) / sqrt(variance + eps) for x (B, C, ...) and statistics (C,)."""
        return (x - per_channel(mean, x)) * per_channel((variance + self.eps).rsqrt(), x)

    def log_det(self, variance: Tensor, x: Tensor) -> Tensor:
        """Returns log|det dx/dz| for each row of x (B, C, ...) and a variance (C,). The result is (B,)."""
        return (elements_per_channel(x) * (variance + self.eps).log().sum() / 2).expand(x.shape[0])

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        check_sample(x)
        variance, mean = var_mean(x, (0, *range(2, x.dim())), weights)
        variance = variance.where(varies(variance.sqrt(), mean), 1)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        return self.standardized(x, mean, variance)


class Standardize(Bijection):
    """The map x = z * std + mean with the statistics of the training set, which are buffers.

    Data with a large mean and a small standard deviation, such as seconds since 1970, lose digits in float32. With an
    offset, x = (z * std + mean) + offset, and x and the sum are float64. float32 represents the values of `offset`
    exactly, so a cast of the module does not change them.

    Args:
        event_shape: shape of a sample.
        offset: whether to add an offset.
        circular: for vectors, the indices of circular columns. `fit` leaves them unchanged, with the mean 0 and the
            standard deviation 1.

    Example:
        >>> standardize = Standardize((2,))
        >>> standardize.fit(mean=torch.tensor([1.0, 2.0]), std=torch.tensor([2.0, 4.0]))
        >>> z, log_det = standardize.inverse(torch.tensor([[3.0, 2.0]]))
        >>> z, round(float(log_det), 4)  # -log 2 - log 4
        (tensor([[1., 0.]]), -2.0794)
    """

    def __init__(self, event_shape: int | Sequence[int], offset: bool = False, circular: Sequence[int] = ()) -> None:
        super().__init__()
        event_shape, self.circular = shape_of(event_shape), list(circular)
        self.register_buffer("mean", torch.zeros(event_shape))
        self.register_buffer("std", torch.ones(event_shape))
        self.register_buffer("offset", torch.zeros(event_shape) if offset else None)

    mean: Tensor
    std: Tensor
    offset: Tensor | None

    def fit(self, mean: Tensor, std: Tensor, offset: Tensor | None = None) -> None:
        """Sets the statistics, each of the shape event_shape. `mean` includes the offset.

        Raises:
            DataError: a standard deviation that is zero or not finite, or a mean that is not finite.
        """
        if self.circular:
            mean, std = mean.clone(), std.clone()
            mean[self.circular], std[self.circular] = 0, 1
            if offset is not None:
                offset = offset.clone()
                offset[self.circular] = 0
        if not bool(torch.isfinite(mean).all()):
            raise DataError("the mean of the training data is NaN or infinite: remove the rows with such values")
        if not bool(((std > 0) & torch.isfinite(std)).all()):
            bad = [i for i, s in enumerate(std.flatten().tolist()) if not 0 < s < math.inf]
            raise DataError(f"columns {bad} of the training data are constant: leave them out of data.columns")
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset)
            mean = mean - offset.to(mean)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z * self.std + self.mean
        if self.offset is not None:
            x = x.double() + self.offset.double()
        return x, self.std.log().sum().expand(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.offset is not None:
            x = (x.double() - self.offset.double()).to(self.mean.dtype)
        return (x - self.mean) / self.std, -self.std.log().sum().expand(x.shape[0])
