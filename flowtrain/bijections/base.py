"""The one contract of every invertible map, and their composition."""

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

# numbers of x that initialization takes through a map at once: a network holds many times as many
PART = 2**18


class Pass(NamedTuple):
    """The result of one pass through a bijection.

    Attributes:
        x: the values at the other end, (B, *event_shape).
        log_det: log|det| of the Jacobian of the pass, (B,), in nats.
        integrals: for each ODE that was solved, in order, the path integrals that `SolveOptions` asked for, (B, Q).
    """

    x: Tensor
    log_det: Tensor
    integrals: tuple[Tensor, ...] = ()


class Bijection(Recorded, nn.Module, ABC):
    """An invertible map between base and data, of a given class where the model is conditional.

    `forward(z) -> (x, log|det dx/dz|)` leads from base to data, `inverse(x) -> (z, log|det dz/dx|)` back;
    values are (B, *event_shape), log-determinants (B,), in nats; `label` is (B,), whole numbers, or None. Whether a
    bijection reads the label or not, it takes it, so that all of them compose.

    Example:
        >>> class Double(Bijection):
        ...     def forward(self, z, label=None):
        ...         return 2 * z, z.new_full(z.shape[:1], z[0].numel() * math.log(2))
        ...
        ...     def inverse(self, x, label=None):
        ...         return x / 2, x.new_full(x.shape[:1], -x[0].numel() * math.log(2))
        >>> x, log_det = Double()(torch.ones(1, 3))
        >>> x, round(float(log_det), 4)  # 3 log 2
        (tensor([[2., 2., 2.]]), 2.0794)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes passes use `forward` and `inverse` of a class that overrides them and not the pass itself."""
        super().__init_subclass__(**kwargs)
        for name, default in (("forward", Bijection.pass_forward), ("inverse", Bijection.pass_inverse)):
            if name in cls.__dict__ and f"pass_{name}" not in cls.__dict__:
                setattr(cls, f"pass_{name}", default)

    @abstractmethod
    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Base to data."""

    @abstractmethod
    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to base."""

    def pass_forward(self, z: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        """`forward` with options for its ODE solves, and with the path integrals that the options ask for.

        A bijection that contains others overrides this method and `pass_inverse`, to hand the options down. This
        default is for bijections that only have `forward` and `inverse`. ODEs inside them are solved with the options
        too.
        """
        return _handed_down(self.forward, z, label, options)

    def pass_inverse(self, x: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        """`inverse` with options, see `pass_forward`."""
        return _handed_down(self.inverse, x, label, options)

    def map_forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """`forward` without its log-determinant, for maps that can save the work."""
        return self.forward(z, label)[0]

    def map_inverse(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`inverse` without its log-determinant."""
        return self.inverse(x, label)[0]

    @torch.no_grad()
    def initialize(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Sets data-dependent parameters from data x (B, *event_shape), once, before training; returns z.

        This default sets no parameters and applies the map to x in parts. Couplings and continuous flows start as the
        identity. If the map leaves the first part exactly unchanged, it is assumed to be the identity, and the other
        parts are returned without applying it.
        """
        rows = max(1, PART // math.prod(x.shape[1:]))
        parts = torch.split(x, rows)
        labels = [None] * len(parts) if label is None else torch.split(label, rows)
        before = [buffer.clone() for buffer in self.buffers()]
        first = self.map_inverse(parts[0], labels[0])
        # running statistics, such as those of batch normalization, must see all parts
        unchanged = all(torch.equal(a, b) for a, b in zip(before, self.buffers(), strict=True))
        if len(parts) > 1 and unchanged and torch.equal(first, parts[0]):
            return x
        return torch.cat([first, *(self.map_inverse(p, y) for p, y in zip(parts[1:], labels[1:], strict=True))])


class _Outer(NamedTuple):
    """The options of a pass through a bijection that only has `forward` and `inverse`, and the integrals inside."""

    options: SolveOptions
    integrals: list[Tensor]


_OUTER: ContextVar[_Outer | None] = ContextVar("outer pass", default=None)


def _handed_down(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, label: Any, options: SolveOptions) -> Pass:
    """A pass by `forward` or `inverse`, inside which `as_pass` finds the options."""
    if options is AS_CONFIGURED:
        return Pass(*function(x, label))
    outer = _Outer(options, [])
    token = _OUTER.set(outer)
    try:
        y, log_det = function(x, label)
    finally:
        _OUTER.reset(token)
    return Pass(y, log_det, tuple(outer.integrals))


def as_pass(function: Callable[..., Pass], x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """`forward` or `inverse` of a bijection that hands options down, by its `pass_forward` or `pass_inverse`."""
    outer = _OUTER.get()
    if outer is None:
        return function(x, label)[:2]
    y, log_det, integrals = function(x, label, outer.options)
    outer.integrals.extend(integrals)
    return y, log_det


class Chain(Bijection):
    """The composition b_n . ... . b_1 in the direction base to data: b_1 stands next to the base.

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
        for bijection in self.bijections:
            assert isinstance(bijection, Bijection)
            yield bijection

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Chain.pass_forward, self), z, label)

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Chain.pass_inverse, self), x, label)

    def pass_forward(self, z: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        log_det = z.new_zeros(z.shape[0])
        integrals: tuple[Tensor, ...] = ()
        for bijection in self:
            z, term, more = bijection.pass_forward(z, label, options)
            log_det, integrals = log_det + term, integrals + more
        return Pass(z, log_det, integrals)

    def pass_inverse(self, x: Tensor, label: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        log_det = x.new_zeros(x.shape[0])
        integrals: tuple[Tensor, ...] = ()
        for bijection in reversed(list(self)):
            x, term, more = bijection.pass_inverse(x, label, options)
            log_det, integrals = log_det + term, integrals + more
        return Pass(x, log_det, integrals)

    def map_forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        for bijection in self:
            z = bijection.map_forward(z, label)
        return z

    def map_inverse(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        for bijection in reversed(list(self)):
            x = bijection.map_inverse(x, label)
        return x

    @torch.no_grad()
    def initialize(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        for bijection in reversed(list(self)):
            x = bijection.initialize(x, label)
        return x


def check_sample(x: Tensor) -> None:
    """Refuses data x (B, *event_shape) without valid statistics, before any parameter is set.

    Raises:
        FlowtrainError: x has no rows.
        NonFiniteError: x has values that are NaN or infinite.
    """
    if not len(x):
        raise FlowtrainError("x has no rows, but the statistics of the data need at least one; nothing was initialized")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("x has values that are NaN or infinite: remove those rows; nothing was initialized")


def varies(std: Tensor, mean: Tensor) -> Tensor:
    """Which channels vary by more than the rounding error of their mean.

    Channels of a single row, or of equal rows, do not vary. Dividing by their standard deviation of 0 would give an
    infinite scale, so they keep a scale of 1.
    """
    return std > torch.finfo(mean.dtype).eps * mean.abs()


def places(x: Tensor) -> int:
    """How many places of x (B, C, ...) share a channel: H W of an image, 1 of a vector."""
    return math.prod(x.shape[2:])


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v (C,) in the shape that broadcasts along the channels of x (B, C, ...)."""
    return v.view(-1, *(1,) * (x.dim() - 2))
