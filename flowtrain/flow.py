"""Flows: a base density and a bijection, with log p(x) = log p0(z) + log|det dz/dx| for z = inverse(x)."""

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from flowtrain.bases import Base, StandardNormal
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.logit import dequantize
from flowtrain.data.base import Samples
from flowtrain.data.context import ContextColumn, context_values, features, unnamed_context
from flowtrain.data.tables.from_memory import (
    Frame,
    as_tensor,
    check_all_finite,
    column_names,
    is_frame,
    rows_and_labels,
    whole_labels,
)
from flowtrain.data.types import CATEGORICAL, ColumnType, with_whole_noise
from flowtrain.nn.conditioners import MLP, ConvNet, ResidualNet
from flowtrain.nn.residual_mlp import MaskedMLP, ResidualMLP
from flowtrain.ode import AS_CONFIGURED, SolveOptions, Solver, StepPlan, record_solves, row_errors
from flowtrain.utils.autograd import needs_autograd, plain_values
from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.formatting import as_ranges
from flowtrain.utils.modules import first_floating, submodules
from flowtrain.utils.precision import UNCHANGED, full_precision
from flowtrain.utils.process import one_thread_if_small, seeded, seeding_active
from flowtrain.utils.recorded import Recorded
from flowtrain.utils.row_noise import rows_from
from flowtrain.utils.status import status

if TYPE_CHECKING:
    from flowtrain.export import Exported

Label = Tensor | int | Sequence[int] | NDArray[Any] | None
# values of context columns, see `flowtrain.data.context.context_values`, or labels
Context = Any
# an array, a data frame (anything with `columns` and `to_numpy`), or lists of numbers
Rows = NDArray[Any] | Frame | Sequence[Any]
# the seed of the probes of estimated traces, see `Flow`
PROBE_SEED = 0
# the number of other draws of the probes for the error of log p, and the 97.5% quantile of Student's t distribution
# with as many degrees of freedom
PROBE_DRAWS, PROBE_QUANTILE = 4, 2.776
# classes of modules that contain no ODE
CLOSED = frozenset({MLP, ResidualMLP, MaskedMLP, ConvNet, ResidualNet})


@dataclass(frozen=True, eq=False)
class Record:
    """The training of a flow: its config, samples, metrics and held-out rows.

    Attributes:
        config: the config of the run.
        samples: the event shape, the kind and the column names of the training samples.
        step: the training step of the weights, which is the step with the best validation.
        metrics: one mapping for each row of metrics.jsonl. () for a loaded flow.
        seconds: the time of training. 0 for a loaded flow.
        stopped_by: the reason if training ended before its last step, else None.
        held_out: the positions (n,) of the held-out rows in x, counted from 0, for the keys "val" and "test". A set
            that was given as an argument has no key. Empty for a loaded flow.
    """

    config: Mapping[str, Any] = field(repr=False)
    samples: Samples = field(repr=False)
    step: int = 0
    metrics: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    seconds: float = 0.0
    stopped_by: str | None = None
    held_out: Mapping[str, NDArray[np.int64]] = field(default_factory=dict, repr=False)


class DensityPass(NamedTuple):
    """The result of `Flow.density_pass`.

    Attributes:
        log_p: log p(x) in nats, (B,).
        z: the latents, (B, *event_shape).
        integrals: path integrals, see `flowtrain.bijections.base.Pass`.
    """

    log_p: Tensor
    z: Tensor
    integrals: tuple[Tensor, ...] = ()


class SamplePass(NamedTuple):
    """The result of `Flow.sample_pass`.

    Attributes:
        x: samples, (B, *event_shape).
        log_p: log p(x) in nats, (B,).
        integrals: path integrals, see `flowtrain.bijections.base.Pass`.
    """

    x: Tensor
    log_p: Tensor
    integrals: tuple[Tensor, ...] = ()


class Density(Recorded, nn.Module):
    """The base class of `Flow` and `Ensemble`: scoring, sampling and context, without a bijection.

    Args:
        event_shape: the shape of a sample.
        classes, integer_valued, levels, centered, noisy, class_counts, context, types: see `Flow`.

    Attributes:
        record: see `Flow`.
        context_rows: the context of some training rows, see `some_context`.
    """

    record: Record | None = None

    def __init__(
        self,
        event_shape: tuple[int, ...],
        classes: int | None = None,
        integer_valued: bool = False,
        levels: int | None = None,
        centered: bool = False,
        noisy: tuple[int, ...] = (),
        class_counts: tuple[int, ...] = (),
        context: Sequence[ContextColumn] = (),
        types: Sequence[ColumnType] = (),
    ) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.classes, self.context = classes, tuple(context)
        self.context_rows: tuple[tuple[float, ...], ...] = ()
        self.integer_valued, self.levels, self.centered = integer_valued, levels, centered
        self.noisy, self.class_counts, self.types = noisy, class_counts, tuple(types)

    @property
    @abstractmethod
    def flows(self) -> "tuple[Flow, ...]":
        """The members with nonzero weights. A single flow counts as an ensemble of one member."""

    @property
    @abstractmethod
    def log_weights(self) -> tuple[float, ...]:
        """log w_m for each of `flows`. It is 0 for a single flow."""

    @abstractmethod
    def with_solvers(self, change: Callable[[Solver], Solver]) -> Self:
        """Returns this density with each ODE solver s replaced by change(s). Parameters are shared."""

    @abstractmethod
    def with_kind(self, **data: Any) -> Self:
        """Returns this density with other attributes, such as `levels`, see `Flow.with_data`. Parameters are shared."""

    def combined(self, log_p: Tensor) -> Tensor:
        """Returns log sum_m w_m p_m, (B,), in nats, from log p_m of `flows`, (M, B).

        NaN of some flows counts as -inf. If all flows have NaN, the result is NaN.
        """
        log_w = log_p.new_tensor(self.log_weights).unsqueeze(1)
        total = (torch.where(log_p.isnan(), -torch.inf, log_p) + log_w).logsumexp(0)
        return torch.where(log_p.isnan().all(0), torch.nan, total)

    def responsibilities(self, log_p: Tensor) -> Tensor:
        """Returns w_m p_m / p, (M, B), for log p_m of `flows`, (M, B). It is 0 if p is 0 or NaN."""
        log_w = log_p.new_tensor(self.log_weights).unsqueeze(1)
        return (log_p + log_w - self.combined(log_p)).exp().nan_to_num(0.0)

    def combined_error(self, log_p: Tensor, errors: Tensor) -> Tensor:
        """Returns the error of `combined`, (B,), from log p and errors of `flows`, (M, B).

        To first order, this is the sum of the errors, weighted by the responsibilities. It is infinite if log p is
        -inf.
        """
        shares = self.responsibilities(log_p.detach())
        total = torch.where(shares > 0, shares * errors, 0.0).sum(0)
        total = torch.where(self.combined(log_p.detach()).isinf(), torch.inf, total)
        return torch.where(log_p.isnan().all(0), torch.nan, total)

    @property
    def ode_blocks(self) -> list[Continuous]:
        """The continuous bijections. Each solves one ODE per forward or inverse pass."""
        # a module may occur several times in a flow
        return [
            cast(Continuous, m)
            for flow in self.flows
            for m in dict.fromkeys(submodules(flow, CLOSED))
            if _is_continuous(type(m))
        ]

    @property
    def solver(self) -> Solver | None:
        """The first ODE solver, or None if there is no ODE."""
        parts = (getattr(m, "solver", None) for flow in self.flows for m in flow.bijection.modules())
        return next((s for s in parts if isinstance(s, Solver)), None)

    def use_solver(self, solver: Solver) -> None:
        """Replaces the solver of all ODEs."""
        for flow in self.flows:
            for module in flow.bijection.modules():
                if isinstance(vars(module).get("solver"), Solver):
                    setattr(module, "solver", solver)  # noqa: B010 - mypy would expect a module

    def save(self, path: str | Path) -> None:
        """Writes the flow to a .pt file for `flowtrain.load`, `floweval` and `flowsample`.

        The new file replaces an older file of this name when the new file is complete. It contains no code, but the
        weights and a description of the flow: the config of its run, or the arguments of the constructors of its parts.
        If your package `mypkg` defines some of the parts, loading needs `trust=("mypkg",)`. A part that is used twice
        is loaded as two equal parts. Hooks are not saved.

        Raises:
            ConfigError: a name that does not end in .pt, or a directory.
            CheckpointError: the file cannot be written, or a part of the flow cannot be described in a file.
        """
        from flowtrain.runs.save import save

        save(self, path)

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and the device of the flow."""
        found = first_floating(self)
        return torch.zeros(()) if found is None else found

    @property
    def data_like(self) -> Tensor:
        """A tensor with the dtype of samples and the device of the flow. If `centered`, samples are float64."""
        return self.like.new_zeros((), dtype=torch.float64) if self.centered else self.like

    @property
    def bits_per_nat(self) -> float | None:
        """The factor 1 / (D log 2) from nats per sample to bits per dimension for integer-valued images, else None."""
        if not self.integer_valued or len(self.event_shape) != 3:
            return None
        return 1 / (math.prod(self.event_shape) * math.log(2))

    @overload
    def log_prob(
        self, x: Tensor, context: Context = None, *, label: Label = None, with_error: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def log_prob(
        self, x: Rows, context: Context = None, *, label: Label | str = None, with_error: Literal[False] = False
    ) -> NDArray[Any]: ...
    @overload
    def log_prob(
        self, x: Tensor, context: Context = None, *, label: Label = None, with_error: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def log_prob(
        self, x: Rows, context: Context = None, *, label: Label | str = None, with_error: Literal[True]
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    def log_prob(
        self, x: Tensor | Rows, context: Context = None, *, label: Label | str = None, with_error: bool = False
    ) -> Any:
        """Returns log p(x) in nats, (B,), for x (B, *event_shape) in data units.

        For a tensor, the result is a tensor with gradients. For an array or a data frame, the result is an array in the
        dtype of the flow, without gradients, see `read_rows`. The array is computed in chunks of `rows_at_a_time`.

        If the flow is integer-valued and x contains integers, the result is log p(x + u) for one draw of u. The mean
        over u is at most log P(x) (Theis et al. 2016, A note on the evaluation of generative models, eq. 4).

        In evaluation mode, log p of a row does not depend on the other rows, up to rounding, except with an adaptive
        method of torchdiffeq, whose steps all rows share. In training mode the rows share the steps of adaptive
        solvers. In evaluation mode, log p of an infinite row of a tensor is -inf, and log p of a row with NaN is NaN.

        Args:
            x: samples.
            context: for a conditional flow, the context of all rows or of each row, see
                `flowtrain.data.context.context_values`. If x is a data frame that contains the context columns, None
                reads them. For a flow that was fitted with labels, the labels.
            label: another name of `context`, for class labels.
            with_error: returns (log p, error). The error is an estimate of the absolute error of each log p, (B,), in
                nats, without gradients, see `flowtrain.ode.row_errors.row_errors`. It is NaN in training mode, for
                solvers with fixed steps and for solvers of torchdiffeq. If the trace is estimated, log p is computed
                with PROBE_DRAWS other probes too, and the error includes the half width of a 95% confidence interval.

        Raises:
            FlowtrainError: x of another shape, or a context that is missing, not expected or out of range.
            DataError: columns are missing, or values are missing, infinite or not numbers.

        Example:
            >>> from flowtrain.bijections.linear import Affine
            >>> Flow((2,), Affine(2)).log_prob(np.zeros((3, 2))).shape
            (3,)
        """
        context = either(context, label)
        if not with_error:
            return (
                self._log_prob(x, context) if isinstance(x, Tensor) else self._in_chunks(self.log_prob, x, context, "x")
            )
        if isinstance(x, Tensor):
            return self._log_prob_with_error(x, context)

        def pairs(x: Tensor, context: Context) -> Tensor:
            return torch.stack(self._log_prob_with_error(x, context), 1)

        found = self._in_chunks(pairs, x, context, "x")
        return found[:, 0], found[:, 1]

    @abstractmethod
    def _log_prob(self, x: Tensor, context: Context) -> Tensor:
        """Computes `log_prob` for a tensor."""

    @abstractmethod
    def _log_prob_with_error(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Computes `log_prob` with its error for a tensor."""

    def read_rows(
        self, x: Tensor | Rows, context: Context = None, name: str = "x"
    ) -> tuple[NDArray[Any], Tensor | None]:
        """Returns rows (n, *event_shape) and their context from an array, a tensor, lists or a data frame.

        If the flow was trained on named columns, the columns of a data frame are found by name, in any order. Other
        columns are ignored. Otherwise the columns are used in their order.

        Args:
            x: the rows.
            context: the context, see `log_prob`. None reads the columns of the context, or of the labels, from a data
                frame that contains them. For labels, also the name of their column in a data frame.
            name: the name of x in messages. "z" for latents, whose columns have no names.

        Raises:
            DataError: columns are missing, or values are missing, infinite or not numbers.
            FlowtrainError: x of another shape, or a context that is missing, not expected or out of range.
        """
        samples = None if self.record is None or name == "z" else self.record.samples
        columns = () if samples is None else samples.columns
        if self.context:
            rows, _ = rows_and_labels(x, None, columns or self._not_context(x), None, name, self._categories)
            context = x if context is None and self._has_context(x) else context
        else:
            label_name = None if samples is None or self.classes is None else samples.label
            rows, context = rows_and_labels(x, context, columns, label_name, name, self._categories)
        self._check_shape(rows.shape, name)
        check_all_finite(rows, name)
        return rows, self.context_of(context, self.like.new_empty(len(rows), 0))

    @property
    def _categories(self) -> dict[int, tuple[str | float, ...]]:
        """The categories of each categorical column, by position."""
        return {i: one.categories for i, one in enumerate(self.types) if one.kind == CATEGORICAL}

    def _has_context(self, x: Any) -> bool:
        """Whether x is a data frame that contains all context columns."""
        return is_frame(x) and {column.name for column in self.context} <= set(column_names(x))

    def _not_context(self, x: Any) -> tuple[str, ...]:
        """Returns the names of the columns of a data frame that are not context columns; () for other rows."""
        if not self._has_context(x):
            return ()
        return tuple(name for name in column_names(x) if name not in {column.name for column in self.context})

    @torch.no_grad()
    def _in_chunks(self, compute: Callable[..., Tensor], x: Rows, context: Context, name: str) -> NDArray[Any]:
        rows, context = self.read_rows(x, context, name)
        size, found = rows_at_a_time(self.event_shape), []
        for start in range(0, max(1, len(rows)), size):
            part = slice(start, start + size)
            c = None if context is None else context[part]
            with rows_from(start):
                found.append(compute(as_tensor(rows[part]).to(self.like.device), c).cpu().numpy())
        return np.concatenate(found)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        chunk: int | None = None,
        context: Context = None,
        generator: torch.Generator | None = None,
        *,
        label: Label = None,
    ) -> Tensor:
        """Draws n samples (n, *event_shape) in data units, as a tensor without gradients.

        Samples of an integer-valued flow are x + u. `quantized` rounds them to whole numbers.

        Args:
            n: the number of samples.
            temperature: multiplies the noise of the base. With 1, samples are drawn from the density. Below 1, they are
                closer to its modes.
            chunk: the number of rows that are mapped at once. None: chosen by the size of a sample. The base points do
                not depend on `chunk`. The samples depend on it, within the tolerance, only in training mode and with an
                adaptive solver of torchdiffeq, because the rows of a chunk then share the steps.
            context: for a conditional flow, one context for all samples, or one for each, see
                `flowtrain.data.context.context_values`. For a flow that was fitted with labels, one label, or (n,).
                None: labels are drawn with their frequencies in training.
            generator: a random generator on the device of the flow. None: the global generator of this device.
            label: another name of `context`, for class labels.

        Raises:
            FlowtrainError: n is not a whole number of at least 1, or chunk < 1; a temperature that is below 0, not
                finite, or other than 1 for a base without temperature; a context for an unconditional flow, labels that
                are out of range or without training rows, or a number of contexts other than 1 and n.

        Example:
            >>> from flowtrain.bijections.linear import Affine
            >>> flow = Flow((2,), Affine(2))
            >>> flow.sample(5).shape
            torch.Size([5, 2])
            >>> flow.sample(1, temperature=0.0)  # the image of z = 0
            tensor([[0., 0.]])
        """
        if not 0 <= temperature < math.inf:
            raise FlowtrainError(f"temperature={temperature}: give a finite number of at least 0")
        return self._sample(n, temperature, chunk, either(context, label), generator)

    def rsample(
        self, n: int, context: Context = None, generator: torch.Generator | None = None, *, label: Label = None
    ) -> Tensor:
        """Draws n samples (n, *event_shape) with gradients to the parameters of the flow and its base, see `sample`.

        The autograd graph of all samples is kept in memory.

        Example:
            >>> from flowtrain.bijections.linear import Affine
            >>> flow = Flow((2,), Affine(2))
            >>> flow.rsample(5).sum().backward()
            >>> flow.bijection.mean.grad  # x = L z + mean
            tensor([5., 5.])
        """
        return self._sample(n, 1.0, None, either(context, label), generator)

    def _sample(
        self, n: int, temperature: float, chunk: int | None, context: Context, generator: torch.Generator | None
    ) -> Tensor:
        if not hasattr(n, "__index__"):
            raise FlowtrainError(
                f"n={n!r}: give a whole number. For a shape of samples, use flow.distribution().sample(shape)"
            )
        if n < 1:
            raise FlowtrainError(f"n={n}: give a number of at least 1")
        if chunk is not None and chunk < 1:
            raise FlowtrainError(f"chunk={chunk}: give a number of at least 1")
        if context is not None and not self.context:
            self.check_label(context)
        elif self.classes is not None:
            context = self.drawn_labels(n, generator)
        found = self.context_of(context, self.like.new_empty(n, 0))
        return self._drawn(n, temperature, chunk, found, generator)

    @abstractmethod
    def _drawn(
        self, n: int, temperature: float, chunk: int | None, context: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Draws n samples (n, *event_shape) for contexts in the form of `context_of`, or without context for None."""

    def distribution(self, context: Context = None, *, label: int | None = None) -> "FlowDistribution":
        """Returns the flow as a `torch.distributions.Distribution`. A conditional flow needs one context.

        The distribution shares the parameters and the training or evaluation mode of the flow. If Pyro is imported, it
        is also a Pyro distribution, as `pyro.sample` requires.

        Raises:
            FlowtrainError: a context that is missing, not expected or out of range.

        Example:
            >>> from flowtrain.bijections.linear import Affine
            >>> p = Flow((2,), Affine(2)).distribution()
            >>> p.event_shape, p.log_prob(p.sample((3, 4))).shape
            (torch.Size([2]), torch.Size([3, 4]))
        """
        return _distribution(self, either(context, label))

    def dequantized(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Returns x + u for integers x (B, *event_shape) of an integer-valued flow, else x.

        If the columns of the flow have types, u is added to the whole numbers in columns of integers and categories.
        The result has the dtype of `data_like`.

        Args:
            x: samples.
            u: numbers in [0, 1) with the shape of x and the dtype of `data_like`. None: they are drawn with the global
                generator of the device.

        Raises:
            FlowtrainError: in evaluation mode, integers that are not in 0 .. levels - 1.
        """
        like = self.data_like
        if self.integer_valued and not x.is_floating_point():
            # training data were checked when they were read, and a check here would wait for the device
            if self.levels is not None and not self.training and x.numel():
                low, high = int(plain_values(x).min()), int(plain_values(x).max())
                if low < 0 or high >= self.levels:
                    raise FlowtrainError(
                        f"x has values from {low} to {high}, but this flow is for whole numbers from 0 to "
                        f"{self.levels - 1}"
                    )
            return dequantize(x.to(like.device), like, u)
        x = x.to(like)
        if not (self.types and self.noisy):
            return x
        return with_whole_noise(x, self.noisy, torch.rand_like(x) if u is None else u)

    def takes_noise(self, x: Tensor) -> bool:
        """Returns whether `dequantized` adds noise to x."""
        return bool(self.types and self.noisy) or (self.integer_valued and not x.is_floating_point())

    def quantized(self, x: Tensor) -> Tensor:
        """Rounds samples x + u (B, *event_shape) of an integer-valued flow down to whole numbers.

        If the flow has `noisy` elements, only these are rounded, and x keeps its dtype. Samples of other flows are
        returned unchanged.
        """
        if self.noisy:
            flat, noisy = x.flatten(1).clone(), list(self.noisy)
            flat[:, noisy] = flat[:, noisy].floor()
            return flat.view_as(x)
        if not self.integer_valued:
            return x
        whole = x.floor()
        if self.levels is None:
            return whole.to(torch.int64)
        return whole.clamp(0, self.levels - 1).to(torch.uint8 if self.levels <= 256 else torch.int64)

    @property
    def conditional(self) -> bool:
        """Whether the density is p(x | context), with class labels or context columns."""
        return self.classes is not None or bool(self.context)

    def some_context(self, n: int) -> Tensor | None:
        """Returns contexts for n samples, in the form of `context_of`, for checks and figures.

        The contexts cycle through the contexts of the stored training rows, or through the labels. Without stored rows,
        real columns have their mean, and categorical columns their first category.
        """
        if not self.context:
            return None if self.classes is None else self.cycled_labels(n)
        rows = self.context_rows or (tuple(column.mean for column in self.context),)
        found = torch.tensor(rows, dtype=torch.float64, device=self.like.device)
        return found[torch.arange(n, device=found.device) % len(found)]

    @property
    def classes_with_rows(self) -> list[int]:
        """The classes of a conditional flow that have training rows, or all classes if this is unknown."""
        assert self.classes is not None
        return [y for y in range(self.classes) if not self.class_counts or self.class_counts[y]]

    def cycled_labels(self, n: int) -> Tensor:
        """Returns labels (n,) that cycle through the classes with training rows."""
        labels = torch.tensor(self.classes_with_rows, device=self.like.device)
        return labels[torch.arange(n, device=labels.device) % len(labels)]

    def drawn_labels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws labels (n,) with the class frequencies in training.

        If the frequencies are unknown, as in checkpoints of earlier versions, the labels cycle through all classes.
        """
        if not self.class_counts:
            return self.cycled_labels(n)
        weights = torch.tensor(self.class_counts, dtype=torch.float64, device=self.like.device)
        return torch.multinomial(weights, n, replacement=True, generator=generator)

    def context_of(self, context: Context, x: Tensor) -> Tensor | None:
        """Returns the context on the device of x (B, ...): values (B, k), float64, or labels (B,), int64, or None.

        Raises:
            FlowtrainError: a context that is missing or not expected; labels or values that are not allowed.
        """
        if not self.context:
            return self.labels(context, x)
        if context is None:
            names = ", ".join(column.name for column in self.context)
            raise FlowtrainError(f"this flow is conditional: give the context of each sample, the columns {names}")
        return context_values(self.context, context, len(x), not self.training).to(x.device)

    def features(self, context: Tensor | None) -> Tensor | None:
        """Returns what the bijections receive for a context of `context_of`: features (B, F), or the labels (B,)."""
        if context is None or not self.context:
            return context
        return features(self.context, context, self.like.dtype)

    def labels(self, label: Label, x: Tensor) -> Tensor | None:
        """Returns `label` as (B,) whole numbers on the device of x (B, ...), or None for an unconditional flow.

        Raises:
            FlowtrainError: labels that are missing, not expected or not whole numbers, or in evaluation mode out of
                range.
        """
        if self.classes is None:
            if label is not None:
                raise FlowtrainError(
                    "this flow is not conditional: call it without context. Only a flow fitted with a context or with "
                    "labels is conditional"
                )
            return None
        if label is None:
            raise FlowtrainError(f"this flow is conditional: give a label for each sample, 0 to {self.classes - 1}")
        given = label if isinstance(label, Tensor | int) else whole_labels(label)
        y = torch.as_tensor(math.nan if given is None else given, device=x.device)
        if y.is_floating_point() or y.dtype == torch.bool or y.dim() > 1 or (y.dim() == 1 and len(y) != len(x)):
            raise FlowtrainError(f"label: give one whole number, or one for each of the {len(x)} samples")
        # training labels were checked when they were read, and a check here would wait for the device
        values = plain_values(y)
        bad = [] if self.training else values[(values < 0) | (values >= self.classes)].tolist()
        if bad:
            raise FlowtrainError(f"label={bad[0]}: the labels of this flow are 0 to {self.classes - 1}")
        return y.long().expand(len(x))

    def check_label(self, label: Label) -> None:
        """Checks that samples can be drawn for a label, or for labels (n,).

        Raises:
            FlowtrainError: labels that `labels` does not allow, or of a class without training rows.
        """
        n = len(label) if not isinstance(label, int | None) and np.ndim(label) else 1
        labels = self.labels(label, self.like.new_empty(n, 0))
        if labels is None or not self.class_counts:
            return
        bad = [y for y in sorted(set(labels.tolist())) if not self.class_counts[y]]
        if bad:
            raise FlowtrainError(
                f"label={bad[0]}: the training data have no rows of this class, only of classes "
                f"{as_ranges(self.classes_with_rows)}"
            )

    def _settings(self, x: Tensor) -> AbstractContextManager[None]:
        """Uses one thread for small samples, and full precision in evaluation mode.

        By default torch uses TF32 for convolutions. In training mode the trainer sets the precision.
        """
        threads = one_thread_if_small(self.event_shape, x.device)
        precision = UNCHANGED if self.training else full_precision(x.device)
        if threads is UNCHANGED:
            return precision
        return threads if precision is UNCHANGED else _both(threads, precision)

    def _checked(self, x: Tensor, name: str) -> Tensor:
        if not isinstance(x, Tensor) or x.is_complex():
            raise FlowtrainError(f"{name} is {getattr(x, 'dtype', type(x).__name__)}: give a tensor of real numbers")
        self._check_shape(x.shape, name)
        return x

    def _check_shape(self, shape: Sequence[int], name: str) -> None:
        if tuple(shape[1:]) == self.event_shape and len(shape) == 1 + len(self.event_shape):
            return
        wanted = ", ".join(map(str, ("B", *self.event_shape)))
        hint = ""
        if tuple(shape) == self.event_shape:
            hint = f". For one row, give {name}[None]"
        elif len(shape) == len(self.event_shape) == self.event_shape[0] == 1:
            hint = f". For one column, give {name}[:, None]"
        raise FlowtrainError(f"{name} has shape {tuple(shape)}, but this flow needs ({wanted}){hint}")


class Flow(Density):
    """A normalizing flow: the density of x = forward(z), with z from a base distribution.

    An integer-valued flow is the density of x + u for whole numbers x, with u uniform on the unit cube. Each call adds
    u to a tensor of integers. A tensor of real numbers is used without noise. A conditional flow, p(x | context), needs
    a context in every call: values of context columns, or class labels.

    If the trace of a continuous flow is estimated (by default for samples of more than 128 elements), log p(x) depends
    on random probes. In evaluation mode the probes are drawn from a fixed seed, so that equal calls return equal
    values, and torch's random state does not change. In training mode, and inside `flowtrain.utils.process.seeded`,
    which an evaluation uses, the probes are drawn from the global generator. The noise u is always drawn from the
    global generator. To score integers reproducibly, add the noise once with `dequantized`.

    On the CPU, samples of at most 16 elements are computed on one thread, which is faster than several threads, unless
    a run has set the number of threads. The thread count of torch is restored after each call.

    Args:
        base: the distribution of z, see `flowtrain.bases`. An event shape, or a number d for (d,), means a standard
            normal base of this shape.
        bijection: from base to data.
        classes: the number of labels 0 .. classes - 1 of a flow that is conditional on class labels, else None.
        integer_valued: whether the data are whole numbers.
        levels: the number of values of integer-valued data with values 0 .. levels - 1, else None.
        centered: whether samples are float64. The bijection then subtracts an offset from the data, because float32
            would not resolve them.
        noisy: for real data, the indices of the elements of a sample that are whole numbers plus noise. The data set
            adds the noise to `x`, and `quantized` removes it.
        class_counts: the number of training rows of each class. () if unknown.
        types: the type of each column of a sample. () means that all columns are real. The bijection must map to the
            supports of these types, see `flowtrain.bijections.support.ToSupport`.
        context: the context columns of a flow p(x | context), or their number if they are real columns that are not
            standardised. The bijection receives their features, see `flowtrain.data.context.features`.
        event_shape: replaces `base`, for a standard normal base.

    Attributes:
        record: the config and the training of the flow, see `Record`. None if the flow was built in Python and not
            trained.

    Raises:
        FlowtrainError: not exactly one of base and event_shape, or no bijection.

    Example:
        >>> import torch
        >>> from flowtrain.bijections.linear import Affine
        >>> flow = Flow((2,), Affine(2))
        >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # -log(2 pi)
        -1.8379
    """

    def __init__(
        self,
        base: Base | int | Sequence[int] | None = None,
        bijection: Bijection | None = None,
        classes: int | None = None,
        integer_valued: bool = False,
        levels: int | None = None,
        centered: bool = False,
        noisy: tuple[int, ...] = (),
        class_counts: tuple[int, ...] = (),
        *,
        context: int | Sequence[ContextColumn] = (),
        types: Sequence[ColumnType] = (),
        event_shape: int | Sequence[int] | None = None,
    ) -> None:
        if (base is None) == (event_shape is None):
            raise FlowtrainError("a flow needs either a base or an event_shape, as in Flow((2,), bijection)")
        if not isinstance(bijection, Bijection):
            raise FlowtrainError(
                f"bijection is of type {type(bijection).__name__}: give a bijection of flowtrain.bijections, or a Chain"
            )
        base = event_shape if base is None else base
        assert base is not None
        base = base if isinstance(base, Base) else StandardNormal(base)
        columns = unnamed_context(context) if isinstance(context, int) else tuple(context)
        if classes is not None and columns:
            raise FlowtrainError(
                "a flow has either classes or context: with both, make the label a categorical context column"
            )
        super().__init__(
            base.event_shape, classes, integer_valued, levels, centered, noisy, class_counts, columns, types
        )
        self.bijection: Bijection = bijection
        self.base = base

    @property
    def flows(self) -> "tuple[Flow, ...]":
        return (self,)

    @property
    def log_weights(self) -> tuple[float, ...]:
        return (0.0,)

    def with_solver(self, solver: Solver) -> Self:
        """Returns this flow with another solver for all ODEs. The parameters are shared, not copied.

        Modules inside a continuous bijection, such as its velocity field, are shared too, with their training or
        evaluation mode.
        """
        views: dict[nn.Module, nn.Module] = {}

        def view(module: nn.Module) -> nn.Module:
            if module in views:
                return views[module]
            if not any(isinstance(vars(m).get("solver"), Solver) for m in module.modules()):
                return module
            views[module] = found = copy(module)
            found._modules = {k: m if m is None else view(m) for k, m in module._modules.items()}
            return found

        found = cast(Self, view(self))
        found.use_solver(solver)
        return found

    def with_solvers(self, change: Callable[[Solver], Solver]) -> Self:
        return self if self.solver is None else self.with_solver(change(self.solver))

    def with_data(self, bijection: Bijection, **data: Any) -> Self:
        """Returns this flow for data in other units, with another bijection and other attributes.

        Args:
            bijection: from base to data.
            data: new values of integer_valued, levels, centered, noisy or class_counts.
        """
        found = self.with_kind(**data)
        found._modules = {**self._modules, "bijection": bijection}
        return found

    def with_kind(self, **data: Any) -> Self:
        found = copy(self)
        found._modules = {**self._modules}
        found.__dict__.update(data)
        # the record describes the old samples
        found.record = None
        return found

    @property
    def step_plans(self) -> list[StepPlan]:
        """The steps of past training solves, from which the next solves are planned. They are not part of the model.

        Each continuous bijection has two plans: for solves from base to data, and for solves from data to base.
        """
        return [plan for block in self.ode_blocks for plan in block.step_plans.values()]

    def set_step_plans(self, plans: Sequence[StepPlan]) -> None:
        """Sets `step_plans`, in the same order. If `plans` is shorter, the plans of the last blocks do not change."""
        for block, pair in zip(self.ode_blocks, zip(plans[::2], plans[1::2], strict=False), strict=False):
            block.step_plans = dict(zip(block.step_plans, pair, strict=True))

    def _log_prob(self, x: Tensor, context: Context) -> Tensor:
        return self.log_prob_and_latents(x, context)[0]

    def _log_prob_with_error(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        # all draws of the probes evaluate the same points
        x = self.dequantized(self._checked(x, "x"))
        (log_p, _, _), error = self.density_pass_with_error(x, context)
        d = math.prod(self.event_shape)
        if all(m.trace.is_exact(d, self.training) for m in self.ode_blocks):
            return log_p, error
        draws = [log_p.detach()]
        for k in range(PROBE_DRAWS):
            with torch.no_grad(), seeded(PROBE_SEED + 1 + k, x.device):
                draws.append(self.density_pass(x, context).log_p)
        return log_p, error + PROBE_QUANTILE * torch.stack(draws).std(0)

    def density_pass_with_error(
        self, x: Tensor, context: Context = None, options: SolveOptions = AS_CONFIGURED
    ) -> tuple[DensityPass, Tensor]:
        """Returns `density_pass` and the estimated error of log p, (B,), in nats, see `row_errors`.

        The error does not include the noise of an estimated trace.
        """
        with record_solves(also_outside=True) as solves:
            found = self.density_pass(x, context, options)
        return found, row_errors(solves, found.log_p, found.z)

    def log_prob_and_latents(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Returns log p(x) (B,), see `log_prob`, and the latents z = inverse(x), (B, *event_shape), from one pass."""
        log_p, z, _ = self.density_pass(x, context)
        return log_p, z

    def density_pass(self, x: Tensor, context: Context = None, options: SolveOptions = AS_CONFIGURED) -> DensityPass:
        """Returns log p(x), see `log_prob`, the latents and the path integrals, with options for the ODE solves."""
        x = self.dequantized(self._checked(x, "x"))
        with self._settings(x), self._fixed_probes(x):
            given = self.features(self.context_of(context, x))
            z, log_det, integrals = self.bijection.pass_inverse(x, given, options)
            # for float64 samples, log_det is float64 too
            log_p = self.base_log_prob(z, given) + log_det.to(z.dtype)
            return DensityPass(log_p if self.training else _without_overflow(log_p, x), z, integrals)

    def sample_pass(self, z: Tensor, context: Context = None, options: SolveOptions = AS_CONFIGURED) -> "SamplePass":
        """Maps base points z (B, *event_shape) to samples x, with log p(x) = log p0(z) - log|det dx/dz|.

        Gradients flow from all results to the parameters and to z.

        Raises:
            FlowtrainError: z of another shape, or a context that is missing, not expected or out of range.
        """
        z = self._checked(z, "z").to(self.like)
        with self._settings(z), self._fixed_probes(z):
            given = self.features(self.context_of(context, z))
            x, log_det, integrals = self.bijection.pass_forward(z, given, options)
            return SamplePass(x, self.base_log_prob(z, given) - log_det.to(z.dtype), integrals)

    def base_log_prob(self, z: Tensor, features: Tensor | None = None) -> Tensor:
        """Returns log p0(z) in nats, (B,), for the `features` of a conditional flow, see `Base.given`."""
        return self.base.given(features).log_prob(z)

    @overload
    def forward(self, z: Tensor, context: Context = None, *, label: Label = None) -> Tensor: ...
    @overload
    def forward(self, z: Rows, context: Context = None, *, label: Label = None) -> NDArray[Any]: ...
    def forward(self, z: Tensor | Rows, context: Context = None, *, label: Label = None) -> Tensor | NDArray[Any]:
        """Maps base to data: returns x (B, *event_shape) for z (B, *event_shape).

        For an array, the result is an array, as in `log_prob`.

        Raises:
            FlowtrainError: z of another shape, or a context that is missing, not expected or out of range.
        """
        context = either(context, label)
        if not isinstance(z, Tensor):
            return self._in_chunks(self.forward, z, context, "z")
        z = self._checked(z, "z").to(self.like)
        with self._settings(z):
            return self.bijection.map_forward(z, self.features(self.context_of(context, z)))

    @overload
    def inverse(self, x: Tensor, context: Context = None, *, label: Label = None) -> Tensor: ...
    @overload
    def inverse(self, x: Rows, context: Context = None, *, label: Label | str = None) -> NDArray[Any]: ...
    def inverse(self, x: Tensor | Rows, context: Context = None, *, label: Label | str = None) -> Tensor | NDArray[Any]:
        """Maps data to base: returns z (B, *event_shape) for x (B, *event_shape).

        As in `log_prob`, noise is added to integers, and the result for an array or a data frame is an array.

        Raises:
            FlowtrainError: x of another shape, or a context that is missing, not expected or out of range.
        """
        context = either(context, label)
        if not isinstance(x, Tensor):
            return self._in_chunks(self.inverse, x, context, "x")
        x = self.dequantized(self._checked(x, "x"))
        with self._settings(x):
            return self.bijection.map_inverse(x, self.features(self.context_of(context, x)))

    def _drawn(
        self, n: int, temperature: float, chunk: int | None, context: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        # all base points are drawn at once, so that they do not depend on the chunks
        z = self.base.given(self.features(context)).rsample(n, generator, temperature, self.like)
        size = chunk or rows_at_a_time(self.event_shape)
        parts = repeat(None) if context is None else torch.split(context, size)
        x = []
        with status("sampling", total=n, unit="sample") as progress:
            for part, c in zip(torch.split(z, size), parts, strict=False):
                # the copy of a part, which is often in column-major order, is faster than a copy by `cat`
                x.append(self.forward(part, c).contiguous())
                progress.advance(len(part))
        return x[0] if len(x) == 1 else torch.cat(x)

    def export(
        self,
        path: str | Path,
        x: Any = None,
        context: Context = None,
        *,
        solver: str | None = None,
        steps: int | None = None,
        tolerance: float = 1e-4,
        label: Label = None,
    ) -> "Exported":
        """Writes programs of log_prob, inverse and sample that run without flowtrain.

        `flow.pt2` is log_prob: x (B, *event_shape) -> log p(x) in nats, (B,). In the same folder, `flow.inverse.pt2` is
        x -> z, and `flow.sample.pt2` is z -> x. With the ending .onnx the programs are written in ONNX, which needs the
        extra `onnx`. The programs run on a CPU and accept batches of any size. For a conditional flow, the context is a
        second input: values (B, k), float64, or labels (B,), int64. The programs draw no random numbers: the caller
        draws z for `sample`, and adds the noise u to whole numbers.

        ODEs are solved with fixed steps. The bias of log p is measured against an accurate adaptive solve and is stored
        in the metadata of each file. Before the files are written, the programs are compared with this flow, with the
        same fixed steps.

        Args:
            path: the file of log_prob, with the ending .pt2 or .onnx.
            x: held-out rows for the comparison. At most 1000 rows are used. None: samples of the flow.
            context: for a conditional flow, the context of x, see `log_prob`.
            solver: a method with fixed steps: euler | midpoint | heun | rk4. None: the solver of the flow if it is one
                of these, else rk4.
            steps: the number of steps. None: the flow's number if its solver has fixed steps, else the smallest of 8,
                16, 32, 64 and 128 with a bias of at most 1e-3 nats (root mean square), or 128 if there is none.
            tolerance: the largest allowed difference between a program and this flow, in nats for log_prob and in
                standard deviations of each element for the others.
            label: another name of `context`, for class labels.

        Returns:
            The paths and the metadata of the programs. `print(exported.table())` shows them.

        Raises:
            ConfigError: another ending, missing packages, or a setting out of range.
            ExportError: a program that differs by more than `tolerance`, or a flow that cannot be traced. No file is
                written or replaced.
            FlowtrainError: x or labels that the flow does not allow, or a solve with fixed steps that fails.
        """
        # the import is here, because flowtrain.export imports this module
        from flowtrain.export import export

        columns = () if self.record is None else self.record.samples.columns
        return export(
            self, path, x, either(context, label), solver=solver, steps=steps, tolerance=tolerance, columns=columns
        )

    def _fixed_probes(self, x: Tensor) -> AbstractContextManager[None]:
        """Draws the probes of estimated traces from a fixed seed, in evaluation mode and outside of `seeded`."""
        if self.training or seeding_active():
            return UNCHANGED
        d = math.prod(self.event_shape)
        for m in submodules(self.bijection, CLOSED):
            if _is_continuous(type(m)) and not cast(Continuous, m).trace.is_exact(d, training=False):
                return seeded(PROBE_SEED, x.device)
        return UNCHANGED


def _without_overflow(log_p: Tensor, x: Tensor) -> Tensor:
    """Returns log p (B,) with -inf in place of NaN for rows x that are infinite or whose squares overflow.

    Such a row becomes inf - inf in a matrix product, for example. Its density is 0 to the precision of a float.
    """
    # without NaN, log p is right. The test of the sum is used on a CPU only, because on a GPU it would wait for the
    # device. A sum with inf and -inf is also NaN, and the lines below then give the same result
    if log_p.is_cpu and not needs_autograd(log_p):
        total = log_p if len(log_p) == 1 else log_p.detach().sum()
        if not math.isnan(total.item()):
            return log_p
    largest = x.flatten(1).abs().amax(1)
    overflows = largest >= math.sqrt(torch.finfo(log_p.dtype).max)
    return torch.where(log_p.isnan() & overflows, -torch.inf, log_p)


def _is_continuous(kind: type) -> bool:
    """Whether a class is a subclass of `Continuous`. `issubclass` takes longer, because the class is abstract."""
    return Continuous in kind.__mro__


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


class _InTypes(constraints.Constraint):
    """The constraint to vectors (*batch, d) whose elements are in the ranges of column types."""

    event_dim = 1

    def __init__(self, types: Sequence[ColumnType]) -> None:
        self.types = tuple(types)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        inside = [one.contains_noisy(v) for one, v in zip(self.types, value.unbind(-1), strict=True)]
        return torch.stack(inside, -1).all(-1)

    def __repr__(self) -> str:
        return f"InTypes({', '.join(map(str, self.types))})"


class FlowDistribution(Distribution):
    """A flow or an ensemble as a `torch.distributions.Distribution`; see `Density.distribution`.

    Args:
        flow: the flow or ensemble, whose parameters are shared.
        context: for a conditional flow, the context in p(x | context).
        batch_shape: shape of independent copies of the distribution.
        validate_args: see `torch.distributions.Distribution`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        flow: Density,
        context: Context = None,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        flow.context_of(context, flow.like.new_empty(1, 0))
        self.flow, self.context = flow, context
        super().__init__(torch.Size(batch_shape), torch.Size(flow.event_shape), validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The support: [0, levels] for each element if the flow has `levels`, else the ranges of the column types."""
        levels, types = self.flow.levels, self.flow.types
        if types:
            return _InTypes(types)
        c: Any = constraints
        support: constraints.Constraint
        support = c.independent(c.real if levels is None else c.interval(0, levels), len(self.event_shape))
        return support

    def __repr__(self) -> str:
        context = "" if self.context is None else f"context: {self.context}, "
        return f"{type(self).__name__}({context}batch_shape: {self.batch_shape}, event_shape: {self.event_shape})"

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        """Returns this distribution with another batch shape."""
        # an invalid shape raises the same error as in other distributions, which call Tensor.expand
        shape = torch.empty(self.batch_shape, device="meta").expand(tuple(batch_shape)).shape
        return type(self)(self.flow, self.context, shape, self._validate_args)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws samples (*sample_shape, *batch_shape, *event_shape)."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws samples with gradients to the parameters of the flow, see `sample`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        n = math.prod(shape[: len(shape) - len(self.event_shape)])
        if n == 0:
            return self.flow.data_like.new_empty(shape)
        return self.flow.rsample(n, self.context).view(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(x) in nats, (*batch,), for x (*batch, *event_shape). batch broadcasts with `batch_shape`."""
        # the constraints of torch do not accept empty tensors
        if self._validate_args and not (isinstance(value, Tensor) and value.numel() == 0):
            self._validate_sample(value)
        dims = value.dim() - len(self.event_shape)
        log_p = self.flow.log_prob(value.reshape(-1, *value.shape[dims:]), self.context)
        shape: torch.Size = torch.broadcast_shapes(value.shape[:dims], self.batch_shape)  # type: ignore[no-untyped-call]
        return log_p.view(value.shape[:dims]).expand(shape)


@cache
def _distribution_class(pyro: bool) -> type[FlowDistribution]:
    """Returns `FlowDistribution`, or with `pyro` a subclass with the methods of Pyro distributions."""
    if not pyro:
        return FlowDistribution
    mixin = import_module("pyro.distributions.torch_distribution").TorchDistributionMixin

    def reduce(self: FlowDistribution) -> tuple[Any, ...]:
        """Supports pickle and copy, which cannot import a class that is created here."""
        return _distribution, (self.flow, self.context, self.batch_shape, self._validate_args)

    names = {"__doc__": FlowDistribution.__doc__, "__module__": __name__, "__reduce__": reduce}
    return type("PyroFlowDistribution", (FlowDistribution, mixin), names)


def _distribution(*arguments: Any) -> FlowDistribution:
    """Builds a `FlowDistribution`, which is also a Pyro distribution if Pyro is imported."""
    return _distribution_class("pyro" in sys.modules)(*arguments)


def either(context: Context, label: Context) -> Context:
    """Returns the context that a caller gave as `context` or as `label`; None if both are None.

    Raises:
        FlowtrainError: both are given.
    """
    if context is not None and label is not None:
        raise FlowtrainError("give either context or label: label is another name of the context")
    return label if context is None else context


def rows_at_a_time(event_shape: tuple[int, ...]) -> int:
    """Returns the number of samples to map at once: at most 2000, and at most 200,000 elements in total."""
    return max(1, min(2000, 200_000 // math.prod(event_shape)))
