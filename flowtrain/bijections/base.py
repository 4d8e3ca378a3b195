"""The base class of invertible maps, and their composition."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.errors import FlowtrainError, NonFiniteError
from flowtrain.utils.recorded import Recorded

# the size of the parts of x in which initialization applies a map; the activations of a network are many times larger
PART = 2**18


class Pass(NamedTuple):
    """The result of one pass through a bijection.

    Attributes:
        x: the output, (B, *event_shape).
        log_det: log|det| of the Jacobian of the pass, (B,), in nats.
        integrals: for each ODE in the order of the solves, the path integrals requested by `SolveOptions`, (B, Q).
    """

    x: Tensor
    log_det: Tensor
    integrals: tuple[Tensor, ...] = ()


class Bijection(Recorded, nn.Module, ABC):
    """An invertible map between base and data, which may depend on a context.

    `forward(z, context)` returns (x, log|det dx/dz|), and `inverse(x, context)` returns (z, log|det dz/dx|). z and x
    are (B, *event_shape), and log-determinants are (B,), in nats. `context` is None, or class labels (B,), int64, or
    real features (B, F). Every bijection accepts a context, so that all bijections can be composed.

    Example:
        >>> class Double(Bijection):
        ...     def forward(self, z, context=None):
        ...         return 2 * z, z.new_full(z.shape[:1], z[0].numel() * math.log(2))
        ...
        ...     def inverse(self, x, context=None):
        ...         return x / 2, x.new_full(x.shape[:1], -x[0].numel() * math.log(2))
        >>> x, log_det = Double()(torch.ones(1, 3))
        >>> x, round(float(log_det), 4)  # 3 log 2
        (tensor([[2., 2., 2.]]), 2.0794)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Resets `pass_forward` and `map_forward` if a subclass overrides only `forward`, also for `inverse`."""
        super().__init_subclass__(**kwargs)
        for name in ("forward", "inverse"):
            for other in (f"pass_{name}", f"map_{name}"):
                # the first class with one of the two methods, because a mixin may override `forward` too
                first = next(vars(base) for base in cls.__mro__ if name in vars(base) or other in vars(base))
                if other not in first:
                    setattr(cls, other, getattr(Bijection, other))

    @abstractmethod
    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps base to data: returns (x, log|det dx/dz|)."""

    @abstractmethod
    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps data to base: returns (z, log|det dz/dx|)."""

    def pass_forward(self, z: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        """Maps base to data with options for the ODE solves, and returns the path integrals that the options request.

        A bijection that contains others overrides this method and `pass_inverse`, and passes the options on. The
        default calls `forward`. The options apply also to ODE solves inside `forward`.
        """
        return _with_options(self.forward, z, context, options)

    def pass_inverse(self, x: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        """Maps data to base with options, see `pass_forward`."""
        return _with_options(self.inverse, x, context, options)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps base to data without the log-determinant. Subclasses override it if this saves work."""
        return self.forward(z, context)[0]

    def map_inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps data to base without the log-determinant."""
        return self.inverse(x, context)[0]

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Sets data-dependent parameters from data x (B, *event_shape), once, before training. Returns z.

        Moments of the data are weighted if `weights` (B,) are given. The default implementation sets no parameters and
        applies the map to x in parts. If the map does not change the first part, x is returned unchanged, because
        couplings and continuous flows are initially the identity.
        """
        rows = max(1, PART // math.prod(x.shape[1:]))
        parts = torch.split(x, rows)
        contexts = [None] * len(parts) if context is None else torch.split(context, rows)
        before = [buffer.clone() for buffer in self.buffers()]
        first = self.map_inverse(parts[0], contexts[0])
        # a map with running statistics, such as batch normalization, must be applied to all parts
        unchanged = all(torch.equal(a, b) for a, b in zip(before, self.buffers(), strict=True))
        if len(parts) > 1 and unchanged and torch.equal(first, parts[0]):
            return x
        return torch.cat([first, *(self.map_inverse(p, c) for p, c in zip(parts[1:], contexts[1:], strict=True))])


class _OuterPass(NamedTuple):
    """Options of a pass through a bijection that has only `forward` and `inverse`, and the integrals of its ODEs."""

    options: SolveOptions
    integrals: list[Tensor]


_OUTER: ContextVar[_OuterPass | None] = ContextVar("outer pass", default=None)


def _with_options(
    function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, context: Any, options: SolveOptions
) -> Pass:
    """Calls `forward` or `inverse` and returns a `Pass`. During the call, `as_pass` uses the options."""
    if options is AS_CONFIGURED:
        return Pass(*function(x, context))
    outer = _OuterPass(options, [])
    token = _OUTER.set(outer)
    try:
        y, log_det = function(x, context)
    finally:
        _OUTER.reset(token)
    return Pass(y, log_det, tuple(outer.integrals))


def as_pass(function: Callable[..., Pass], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Implements `forward` or `inverse` by `pass_forward` or `pass_inverse`, with the options of an outer pass."""
    outer = _OUTER.get()
    if outer is None:
        return function(x, context)[:2]
    y, log_det, integrals = function(x, context, outer.options)
    outer.integrals.extend(integrals)
    return y, log_det


class Chain(Bijection):
    """The composition of bijections b_1, .., b_n. From base to data, b_1 is applied first.

    Example:
        >>> from flowtrain.bijections.linear import Permutation
        >>> swap, turn = Permutation(torch.tensor([1, 0, 2])), Permutation(torch.tensor([1, 2, 0]))
        >>> Chain([swap, turn])(torch.tensor([[0.0, 1.0, 2.0]]))[0]  # swap first
        tensor([[0., 2., 1.]])
    """

    def __init__(self, bijections: Iterable[Bijection]) -> None:
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def __iter__(self) -> Iterator[Bijection]:
        # a generator with a check of each class would take longer
        return iter(self.bijections)  # type: ignore[arg-type]

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Chain.pass_forward, self), z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Chain.pass_inverse, self), x, context)

    def pass_forward(self, z: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        log_det: Tensor | None = None
        integrals: tuple[Tensor, ...] = ()
        for bijection in self:
            z, term, more = bijection.pass_forward(z, context, options)
            log_det, integrals = term if log_det is None else log_det + term, integrals + more
        return Pass(z, z.new_zeros(z.shape[0]) if log_det is None else log_det, integrals)

    def pass_inverse(self, x: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        log_det: Tensor | None = None
        integrals: tuple[Tensor, ...] = ()
        for bijection in reversed(list(self)):
            x, term, more = bijection.pass_inverse(x, context, options)
            log_det, integrals = term if log_det is None else log_det + term, integrals + more
        return Pass(x, x.new_zeros(x.shape[0]) if log_det is None else log_det, integrals)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        for bijection in self:
            z = bijection.map_forward(z, context)
        return z

    def map_inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for bijection in reversed(list(self)):
            x = bijection.map_inverse(x, context)
        return x

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        for bijection in reversed(list(self)):
            x = initialized(bijection, x, context, weights)
        return x


def check_sample(x: Tensor) -> None:
    """Checks that the statistics of x (B, *event_shape) are defined, before any parameter is set.

    Raises:
        FlowtrainError: x has no rows.
        NonFiniteError: x has values that are NaN or infinite.
    """
    if not len(x):
        raise FlowtrainError("x has no rows: the flow needs at least one row to initialize its parameters")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("x has values that are NaN or infinite: remove these rows and initialize the flow again")


def initialized(bijection: Bijection, x: Tensor, context: Tensor | None, weights: Tensor | None) -> Tensor:
    """Calls `bijection.initialize`. Without weights, the call omits the argument, which a user's bijection may lack."""
    return bijection.initialize(x, context) if weights is None else bijection.initialize(x, context, weights)


def var_mean(x: Tensor, dims: tuple[int, ...], weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the variance and the mean of x (B, *event_shape) over the dimensions `dims`, which include 0.

    Args:
        weights: weights (B,) of the rows, or None. A variance that is negative because of negative
            weights is replaced by 0.
    """
    if weights is None:
        return torch.var_mean(x, dims, correction=0)
    w = weights.to(torch.float64).view(-1, *[1] * (x.dim() - 1)) / weights.to(torch.float64).sum()
    w = w / math.prod(x.shape[i] for i in dims[1:])
    mean = (w * x.double()).sum(dims, keepdim=True)
    variance = (w * (x.double() - mean).square()).sum(dims)
    return variance.clamp_min(0).to(x.dtype), mean.squeeze(dims).to(x.dtype)


def varies(std: Tensor, mean: Tensor) -> Tensor:
    """Returns which channels have a standard deviation above the rounding error of their mean.

    The other channels keep a scale of 1, because a standard deviation of 0 would give an infinite scale. All channels
    of a single row, or of equal rows, are such channels.
    """
    return std > torch.finfo(mean.dtype).eps * mean.abs()


def elements_per_channel(x: Tensor) -> int:
    """Returns the number of elements of x (B, C, ...) per channel: H W for images, 1 for vectors."""
    return math.prod(x.shape[2:])


def take(x: Tensor, channels: Tensor) -> Tensor:
    """Returns x[:, channels] for x (B, C, ...). Vectors are returned in column-major order.

    Bijections of vectors keep x in column-major order. A part of the columns is then contiguous, and elementwise
    operations on it are several times faster.
    """
    return x.T.index_select(0, channels).T if x.dim() == 2 else x[:, channels]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Reshapes v (C,) so that it broadcasts along the channels of x (B, C, ...)."""
    return v.view(-1, *(1,) * (x.dim() - 2))
