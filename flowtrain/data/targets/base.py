"""The base class of targets, a target that is defined by a function, and the data set of a target."""

import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.data.base import Dataset, Record, Samples, step_generator
from flowtrain.data.types import ColumnType
from flowtrain.utils.arguments import number, shortened, whole, within_memory
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError, first_line, out_of_memory
from flowtrain.utils.formatting import counted

# random streams of the initial points: training batches, validation set, test set
_TRAIN, _VAL, _TEST = 0x74_61_72_67, 0x74_61_72_68, 0x74_61_72_69
# the default name of a column, by its number
COLUMN = "x{}"


class Target(nn.Module, ABC):
    """A density p that is known up to a constant: log p(x) = log p~(x) - log Z with Z = integral of p~(x) dx.

    A subclass defines `log_density`. If exact samples can be drawn, it also defines `sample`. If Z is known, it passes
    `log_z`. Tensors that `log_density` uses must be buffers, so that they move to the device of the flow.

    An untrained flow is close to the initial distribution: independent Gaussians with mean `loc` and standard deviation
    `scale` on the real line. `flowtrain.bijections.ToSupport` maps the real line to the bounds of a column.

    Args:
        dim: the number of columns d.
        types: the types of the columns. Their ranges are the support of the density. () if all columns are real.
        columns: the names of the columns. () means x1, x2 and so on.
        loc, scale: mean and standard deviation of the initial distribution, a number or (d,).
        log_z: log Z in nats. None if unknown. The evaluation compares its estimate with this value.

    Attributes:
        modes: the centers (k, d) of the modes. None if unknown. The evaluation counts the samples at each mode.
        record: row count and checksum of the file that defines the density, see `flowtrain.data.base.Record`.

    Raises:
        ConfigError: a number is out of range, types are not real-valued, or `types` or `columns` do not have d entries.
    """

    modes: Tensor | None = None
    record: Record = ()

    def __init__(
        self,
        dim: int,
        types: Sequence[ColumnType] = (),
        columns: Sequence[str] = (),
        loc: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        log_z: float | None = None,
    ) -> None:
        super().__init__()
        self.dim = whole("target.dim", dim)
        self.types, self.columns = tuple(types), names_of(columns) or tuple(COLUMN.format(i + 1) for i in range(dim))
        for name, given in (("types", self.types), ("columns", self.columns)):
            if given and len(given) != dim:
                raise ConfigError(f"target.{name} has {counted(len(given), 'value')}, but target.dim is {dim}")
        whole_numbers = [name for name, one in zip(self.columns, self.types, strict=False) if one.is_whole]
        if whole_numbers:
            raise ConfigError(
                f"target.types: {whole_numbers[0]} has whole numbers, but a target is a density of real numbers"
            )
        self.loc, self.scale = _each("loc", loc, dim), _each("scale", scale, dim)
        if not bool((self.scale > 0).all()):
            raise ConfigError(f"target.scale={shortened(scale)}: give positive numbers")
        self.log_z = None if log_z is None else number("target.log_z", log_z, least=-math.inf)

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Returns log p~(x) in nats, (B,), for x (B, d). It is differentiable with respect to x."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor | None:
        """Draws exact samples (n, d), float64, on the CPU. Returns None if the target cannot be sampled exactly."""
        return None

    def check(self) -> None:
        """Checks what a subclass has set.

        Raises:
            ConfigError: `modes` is not a tensor (k, d).
        """
        if self.modes is not None and tuple(self.modes.shape[1:]) != (self.dim,):
            raise ConfigError(
                f"modes of the target has shape {tuple(self.modes.shape)}, but it must be (k, {self.dim}), one row for "
                "each mode"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns `log_density` of x (B, d) and checks the shape of the result.

        Raises:
            DataError: `log_density` raises an exception, changes x in place, returns another shape or another type, or
                has no gradient although x requires one.
        """
        version = None if x.is_inference() else x._version
        try:
            found = self.log_density(x)
        except Exception as e:  # a user's function can raise any exception
            if isinstance(e, FlowtrainError) or out_of_memory(e):
                raise
            raise DataError(
                f"the log density of the target failed for x of shape {tuple(x.shape)}{_line_of(e)}: "
                f"{type(e).__name__}: {first_line(e)}"
            ) from e
        if version is not None and x._version != version:
            raise DataError("the log density of the target changes its argument x in place; it must work on x.clone()")
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise DataError(
                f"the log density of the target returned {got} for x of shape {tuple(x.shape)}; it must return a "
                f"tensor of shape ({len(x)},)"
            )
        # a constant is the density of a uniform distribution, whose gradient is zero
        if torch.is_grad_enabled() and x.requires_grad and not found.requires_grad and bool((found != found[0]).any()):
            raise DataError(
                "the log density of the target has no gradient with respect to x: compute it with torch, without "
                "detach, torch.no_grad and NumPy, and as real numbers. Only objective=weighted_forward_kl with "
                "objective.transition=metropolis needs no gradient"
            )
        return found


def _line_of(error: Exception) -> str:
    """Returns the file and line in which an exception was raised, without files of torch and of this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "site-packages" not in frame.filename]
    own = [frame for frame in frames if frame.filename != __file__]
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


def names_of(columns: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of columns as text, () for None.

    Raises:
        ConfigError: not a list of names.
    """
    if isinstance(columns, str) or any(not isinstance(name, str | int | float) for name in columns or ()):
        raise ConfigError(f"target.columns={shortened(columns)}: give a list of names, as in [a,b]")
    return tuple(str(name) for name in columns or ())


def _each(name: str, value: float | Sequence[float], dim: int) -> Tensor:
    """Returns a number, or one number for each column, as a tensor (d,), float64."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(math.nan)
    if found.shape not in ((), (dim,)) or not bool(found.isfinite().all()):
        raise ConfigError(f"target.{name}={shortened(value)}: give a number, or a list of {dim} numbers")
    return found.expand(dim).clone()


class FunctionTarget(Target):
    """A target that is defined by a function log p~(x), x (B, d) -> (B,), which is differentiable with torch.

    Args:
        function: log p~ in nats.
        dim, types, columns, loc, scale, log_z: see `Target`. `types` is a mapping from names of columns to types, or
            one type for each column, as for `data.types`.

    Example:
        >>> target = FunctionTarget(lambda x: -0.5 * x.square().sum(1), 2, log_z=math.log(2 * math.pi))
        >>> target(torch.ones(3, 2)).tolist()
        [-1.0, -1.0, -1.0]
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        dim: int,
        types: Mapping[str, Any] | Sequence[Any] | None = None,
        columns: Sequence[str] | None = None,
        loc: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        log_z: float | None = None,
    ) -> None:
        dim = whole("target.dim", dim)
        names = names_of(columns) or tuple(COLUMN.format(i + 1) for i in range(dim))
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"target.columns: the name {twice[0]!r} occurs twice; give each column another name")
        super().__init__(dim, types_of(types or (), names), names, loc, scale, log_z)
        if not callable(function):
            raise ConfigError(f"target: {shortened(function)} is not a function; give a function of x (B, {dim})")
        # a function that is a module is a submodule, and moves to the device of the flow
        self.function = function

    def log_density(self, x: Tensor) -> Tensor:
        return self.function(x)


def types_of(types: Mapping[str, Any] | Sequence[Any], columns: Sequence[str]) -> tuple[ColumnType, ...]:
    """Returns the type of each column, or () if all columns are real.

    Args:
        types: a mapping from names of columns to types, or one type for each column. A type is a string or a
            `ColumnType`.

    Raises:
        ConfigError: an unknown column or type.
    """
    if isinstance(types, str):
        raise ConfigError(f"target.types={types}: give types by column, as in target.types={{{columns[0]}: {types}}}")
    if isinstance(types, Mapping):
        types = {str(name): one for name, one in types.items()}
        unknown = [name for name in types if name not in columns]
        if unknown:
            raise ConfigError(f"target.types: there is no column {unknown[0]!r}; the columns are {', '.join(columns)}")
        types = [types.get(name, "real") for name in columns]
    found = [one if isinstance(one, ColumnType) else ColumnType.parse(one, "target.types") for one in types or ()]
    return tuple(found) if any(str(one) != "real" for one in found) else ()


class TargetData(Dataset):
    """The data set of a target. It contains no samples of the target.

    Training batches and held-out sets are points of the initial distribution (`Target`), which initialize the flow. The
    losses of the objectives for targets do not depend on them. Validations and evaluations draw `n_val` and `n_test`
    samples from the flow with fixed seeds.

    Args:
        target: the target.
        n_val: the number of samples of the flow by which a validation estimates the ELBO.
        n_test: the number of samples of the flow by which an evaluation estimates log Z.
        seed: the seed of validations and evaluations. It does not depend on the seed of the run.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, target: Target, n_val: int = 2000, n_test: int = 20_000, seed: int = 0) -> None:
        self.target, self.seed = target, whole("data.seed", seed, least=0)
        self._samples: Samples | None = None
        self.event_shape = (target.dim,)
        self.types, self.columns, self.record = target.types, target.columns, target.record
        for key, n in (("data.n_val", n_val), ("data.n_test", n_test)):
            within_memory(key, whole(key, n, least=2), 12 * target.dim)
        self.val = self._initial_points(n_val, step_generator(self.seed, _VAL))
        self.test = self._initial_points(n_test, step_generator(self.seed, _TEST))

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Returns points of the initial distribution, (batch_size, d), which depend only on the seed and the step."""
        return self._initial_points(batch_size, step_generator(seed, _TRAIN, step))

    def _initial_points(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.target.dim, dtype=torch.float64, generator=generator)
        z = self.target.loc + self.target.scale * z
        return _in_support(self.types, z).float()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the initial distribution on the real line, (d,) each."""
        return self.target.loc, self.target.scale

    def seed_of(self, split: str) -> int:
        """Returns the seed of the base points of a validation (`split="val"`) or an evaluation (`split="test"`)."""
        return step_generator(self.seed, _VAL if split == "val" else _TEST, 1).initial_seed() % 2**62

    def to(self, device: torch.device) -> None:
        self.target.to(device)

    @property
    def samples(self) -> Samples:
        return self._samples or replace(super().samples, columns=self.columns)

    def for_flow(self, samples: Samples) -> "TargetData":
        """Returns a copy of this data set for training a flow that was already trained on samples.

        The flow keeps its preprocessing, so the copy has the types and the description of those samples.

        Args:
            samples: the description of the samples on which the flow was trained.

        Raises:
            ConfigError: the flow is conditional or models whole numbers, or its columns differ in number, order or
                support.
        """
        if samples.integer_valued or samples.noisy or samples.classes is not None or samples.context:
            raise ConfigError(
                "the flow is conditional or was trained on whole numbers, but a target is a density of real "
                "numbers without context; give another run"
            )
        if samples.event_shape != self.event_shape:
            raise ConfigError(
                f"the flow has samples of shape {tuple(samples.event_shape)}, but the target has "
                f"{counted(self.target.dim, 'column')}"
            )
        check_order(samples.columns, self.columns)
        supports = [
            [(one.support, one.is_circular) for one in types or [ColumnType()] * self.target.dim]
            for types in (samples.types, self.types)
        ]
        if supports[0] != supports[1]:
            differing = [name for name, a, b in zip(self.columns, *supports, strict=True) if a != b]
            raise ConfigError(
                f"the flow and the target have different supports in {', '.join(differing)}; set target.types "
                "to the types of the run"
            )
        found = copy(self)
        found._samples = replace(samples, record=self.record)
        found.types = samples.types
        return found


def check_order(trained: Sequence[str], columns: Sequence[str]) -> None:
    """Checks that the columns of a target do not have the names of the columns of a flow in another order.

    Other names are possible, because a flow that was fitted to samples can have any names.

    Raises:
        ConfigError: the same names in another order.
    """
    if tuple(trained) != tuple(columns) and sorted(trained) == sorted(columns):
        raise ConfigError(
            f"the flow was trained on the columns {', '.join(trained)}, but the target has the order "
            f"{', '.join(columns)}; give target.columns in the order of the flow"
        )


def _in_support(types: Sequence[ColumnType], z: Tensor) -> Tensor:
    """Maps points (n, d) of the real line to the supports of the columns; see `flowtrain.bijections.ToSupport`."""
    columns = list(z.unbind(1))
    for i, one in enumerate(types):
        low, high = one.support
        if one.is_circular:
            columns[i] = low + (high - low) * torch.remainder((columns[i] + math.pi) / (2 * math.pi), 1.0)
        elif math.isfinite(low) and math.isfinite(high):
            columns[i] = low + (high - low) * torch.sigmoid(columns[i])
        elif math.isfinite(low):
            columns[i] = low + columns[i].exp()
        elif math.isfinite(high):
            columns[i] = high - (-columns[i]).exp()
    return torch.stack(columns, 1)
