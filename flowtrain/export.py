"""Export of a flow to programs that run without flowtrain: `torch.export` (.pt2) and ONNX (.onnx).

An export writes three programs to three files: log_prob, inverse and sample. They accept batches of any size. They draw
no random numbers: the noise of samples and of dequantization is an input. Continuous flows are exported with fixed
steps.
"""

import copy
import inspect
import io
import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from flowtrain.evaluation.error_budget import rows_of_checks
from flowtrain.flow import Context, Flow, rows_at_a_time
from flowtrain.nn.divergence import Probes, TraceRule
from flowtrain.nn.velocity_field import Field
from flowtrain.ode import ode_solver
from flowtrain.ode.tableaus import TABLEAUS
from flowtrain.utils.arguments import number, one_of, whole
from flowtrain.utils.errors import ConfigError, ExportError, FlowtrainError, SolverError, first_line
from flowtrain.utils.files import replacing, to_json
from flowtrain.utils.process import seeded
from flowtrain.utils.status import status
from flowtrain.utils.weighting import stderr

PROGRAMS = ("log_prob", "inverse", "sample")
ENDINGS = (".pt2", ".onnx")
FIXED_STEP_METHODS = tuple(name for name, tableau in TABLEAUS.items() if tableau.e is None)
# limits of the rows, and of the elements of x in total, on which programs are compared with the flow
MOST_ROWS, MOST_NUMBERS = 1000, 200_000
# largest difference between a program and the flow, in nats, or in standard deviations of an element
TOLERANCE = 1e-4
# the numbers of steps that are tried, and the largest accepted root mean square of the bias in nats
STEPS, LEAST_BIAS = (8, 16, 32, 64, 128), 1e-3
# the solver of the reference from which the bias is measured, in float64
TIGHT: dict[str, Any] = {"method": "dopri5", "rtol": 1e-7, "max_nfe": 100_000}
METADATA = "metadata.json"

Program = Callable[..., Tensor]


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        paths: the file of each program, by its name.
        metadata: the JSON metadata in the file of each program, by its name.
    """

    paths: dict[str, Path]
    metadata: dict[str, dict[str, Any]]

    def table(self) -> str:
        """Returns a table with the files, the differences between programs and flow, and the bias of the steps."""
        about = self.metadata["log_prob"]
        rows = f"largest difference on {about['rows']:,} rows"
        lines = [f"{'program':10}{rows:36}{'tolerance':10}file"]
        for name, path in self.paths.items():
            there = self.metadata[name]
            difference = f"{there['max_difference']:.1e} {there['max_difference_unit']}"
            lines.append(f"{name:10}{difference:36}{format(there['tolerance'], '.0e'):10}{path}")
        lines.append(f"rows: {about['rows_from']}")
        if about["solver"] is not None:
            lines.append(_solver_line(about["solver"], about["bias"]))
        if about["trace_probes"]:
            lines.append(f"trace: estimated with {about['trace_probes']} fixed probes, the same for every row")
        return "\n".join(lines)


def _solver_line(solver: dict[str, Any], bias: dict[str, Any]) -> str:
    steps = f"{solver['method']}, {solver['steps']} steps: bias of log p"
    if bias["mean"] is None:
        return f"{steps} unknown ({bias['failure']})"
    mean = f"mean {bias['mean']:.1e} +- {bias['mean_stderr']:.0e}"
    return f"{steps} {mean}, RMS {bias['rms']:.1e}, largest {bias['max']:.1e} nats, against {bias['against']}"


def export(
    flow: Flow,
    path: str | Path,
    x: Any = None,
    context: Context = None,
    *,
    solver: str | None = None,
    steps: int | None = None,
    tolerance: float = TOLERANCE,
    columns: Sequence[str] = (),
    rows_from: str = "given",
) -> Exported:
    """Writes programs of log_prob, inverse and sample that run without flowtrain; see `Flow.export`.

    Args:
        flow, path, x, context, solver, steps, tolerance: see `Flow.export`.
        columns: names of the columns, for the metadata.
        rows_from: a description of x, for the metadata.

    Raises:
        ConfigError: another ending, missing packages, or solver settings that are out of range or have no effect.
        ExportError: a flow that cannot be traced or converted, or a program that differs from the flow by more than
            `tolerance`. No file is written or replaced.
        FlowtrainError: x or labels that the flow does not allow, or a solve with fixed steps that fails.
    """
    path, form = checked_path(path)
    paths = paths_beside(path)
    if folders := [there for there in paths.values() if there.is_dir()]:
        raise ConfigError(f"{folders[0]} is a directory: give another file name")
    number("tolerance", tolerance)
    flow = copy.deepcopy(flow).to("cpu").eval().requires_grad_(False)
    with torch.no_grad(), _quiet():
        with status("rows to compare on"):
            rows = _rows_of(flow, x, context, rows_from)
        with status("choosing the steps of the solver"):
            flow, steps_taken = with_fixed_steps(flow, rows.x, rows.context, solver, steps)
        about = {**_about(flow, columns), "rows": len(rows.x), "rows_from": rows.source, "tolerance": tolerance}
        about |= steps_taken
        contents: dict[str, bytes] = {}
        metadata: dict[str, dict[str, Any]] = {}
        for task in _tasks(flow, rows):
            with status(f"exporting {task.name}"):
                program = form.converted(task.traced(), task)
                described = {**about, **task.about()}
                difference = task.difference(form.loaded(form.content(program, described)))
                if not difference <= tolerance:
                    raise ExportError(task.difference_message(paths[task.name], difference, tolerance))
                metadata[task.name] = {**described, "max_difference": difference}
                contents[task.name] = form.content(program, metadata[task.name])
        with ExitStack() as files:
            # no older file is replaced before all new files are written
            for name, content in contents.items():
                files.enter_context(replacing(paths[name])).write(content)
    return Exported(paths, metadata)


def checked_path(path: str | Path) -> tuple[Path, "Format"]:
    """Returns the path, and the format for its ending.

    Raises:
        ConfigError: another ending, or missing packages.
    """
    path = Path(path).expanduser()
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path}: give a name that ends in {' or '.join(ENDINGS)}")
    return path, _Pt2() if path.suffix == ".pt2" else _Onnx()


def paths_beside(path: Path) -> dict[str, Path]:
    """Returns the file of each program: `path` for log_prob, and files in the same folder for the others.

    Example:
        >>> [p.name for p in paths_beside(Path("flow.pt2")).values()]
        ['flow.pt2', 'flow.inverse.pt2', 'flow.sample.pt2']
    """
    return {name: path if name == "log_prob" else path.with_suffix(f".{name}{path.suffix}") for name in PROGRAMS}


# --- rows


@dataclass(frozen=True)
class _Rows:
    """The rows on which programs are compared with the flow.

    Attributes:
        x: data (n, *event_shape), in the dtype of samples.
        context: values (n, k) of context columns, or labels (n,), or None.
        z: draws from the base, (n, *event_shape).
        source: a description of x.
    """

    x: Tensor
    context: Tensor | None
    z: Tensor
    source: str


def _rows_of(flow: Flow, x: Any, context: Context, source: str) -> _Rows:
    most = max(1, min(MOST_ROWS, MOST_NUMBERS // math.prod(flow.event_shape)))
    with seeded(0, torch.device("cpu")):
        if x is None:
            if context is None:
                context = flow.some_context(most) if flow.context else flow.classes and flow.drawn_labels(most)
            # samples are made whole numbers, so that `dequantized` below adds noise to them in the same way as to data
            x, source = flow.quantized(flow.sample(most, context=context)), "samples of the flow"
        x = torch.as_tensor(x, device="cpu")
        found = flow.context_of(context, x)
        kept = x.flatten(1).isfinite().all(1).nonzero().flatten() if x.dim() > 1 else torch.arange(len(x))
        kept = kept[torch.randperm(len(kept))[:most]]
        if not len(kept):
            raise FlowtrainError(
                "x has no rows of finite numbers: the export needs such rows to compare the programs with the flow"
            )
        x, found = flow.dequantized(x[kept]), None if found is None else found[kept]
        base = flow.base.given(flow.features(found))
        return _Rows(x, found, base.sample(len(kept), like=flow.like), source)


# --- fixed steps


class FixedProbes(nn.Module):
    """A `TraceRule` whose estimates use the same tangents for every row and every solve.

    The first draw sets the tangents. If `Flow.log_prob` makes this draw for a single row, all rows get the tangents
    that `Flow.log_prob` uses for a batch of one row.
    """

    tangents: Tensor | None

    def __init__(self, rule: TraceRule) -> None:
        super().__init__()
        self.rule, self.weight, self.estimates = rule, 1.0, False
        self.register_buffer("tangents", None)

    def is_exact(self, d: int, training: bool) -> bool:
        """Whether the divergence is exact for samples of d elements, see `TraceRule`."""
        return self.rule.is_exact(d, training)

    def draw(self, x: Tensor, training: bool) -> Probes:
        """Returns the probes for a solve that starts at x (B, *event)."""
        if self.tangents is None:
            # the probes can be exact, if factoring out leaves only a few elements of a sample
            drawn = self.rule.draw(x[:1], training)
            self.tangents, self.weight, self.estimates = drawn.tangents, drawn.weight, drawn.noisy
        return Probes(self.tangents, self.weight)


@torch.no_grad()
def with_fixed_steps(
    flow: Flow, x: Tensor, context: Tensor | None = None, solver: str | None = None, steps: int | None = None
) -> tuple[Flow, dict[str, Any]]:
    """Returns a flow that can be exported, and the metadata about its ODE solver.

    Args:
        flow: the flow.
        x, context: rows on which the bias of log p is measured.
        solver: a method with fixed steps. None: the method of the flow if it has fixed steps, else rk4.
        steps: the number of steps from t = 0 to 1. None: the flow's number if its solver has fixed steps and `solver`
            is None, else the first of `STEPS` with a bias of at most `LEAST_BIAS`, or the last of `STEPS`.

    Raises:
        ConfigError: a setting out of range, or a setting for a flow without ODE.
        SolverError: the steps lead to a state that is not finite.
    """
    own = flow.solver
    if own is None:
        if solver is not None or steps is not None:
            raise ConfigError("solver and steps have no effect, because this flow solves no ODE: leave them out")
        return flow, {"solver": None, "bias": None, "trace_probes": None}
    if solver is not None:
        one_of("solver", solver, FIXED_STEP_METHODS, "an exported program needs fixed steps")
    if solver is None and not own.adaptive and own.method in FIXED_STEP_METHODS:
        steps = own.steps_between(0.0, 1.0) if steps is None else steps
    method = solver or (own.method if own.method in FIXED_STEP_METHODS else "rk4")
    choices = STEPS if steps is None else (whole("steps", steps),)
    for block in flow.ode_blocks:
        if not isinstance(block.field, Field):
            raise ExportError(
                f"{type(block.field).__name__} has no Jacobian-vector product that torch.export can trace: derive it "
                "from flowtrain.nn.Field and define jvp"
            )
    flow = flow.with_solver(ode_solver(method, steps=choices[0]))
    d = math.prod(flow.event_shape)
    estimated = [block for block in flow.ode_blocks if not block.trace.is_exact(d, training=False)]
    for block in estimated:
        # the trace rule is a module, so that the traced program contains the tangents
        block.trace = FixedProbes(block.trace)  # type: ignore[assignment]
    checked = slice(rows_of_checks(flow.event_shape))
    x, context = x[checked], None if context is None else context[checked]
    # this call draws the tangents of `FixedProbes`
    flow.log_prob(x[:1], None if context is None else context[:1])
    tight, failure = _tight_log_prob(flow, x, context)
    for n in choices:
        flow = flow.with_solver(ode_solver(method, steps=n, max_nfe=2**31 - 1))
        bias: dict[str, Any] = {"mean": None, "failure": failure}
        try:
            bias = _bias(_in_parts(flow.log_prob, x, context).double() - tight) if tight is not None else bias
        except SolverError:
            # more steps may succeed
            if n == choices[-1]:
                raise
        if bias["mean"] is not None and bias["rms"] <= LEAST_BIAS:
            break
    bias["against"] = "{method} at rtol={rtol:g} in float64".format(**TIGHT)
    probes = max(
        (m.rule.noise_samples for m in flow.modules() if isinstance(m, FixedProbes) and m.estimates), default=None
    )
    return flow, {"solver": {"method": method, "steps": n}, "bias": bias, "trace_probes": probes}


def _tight_log_prob(flow: Flow, x: Tensor, context: Tensor | None) -> tuple[Tensor | None, str | None]:
    """Returns (log p with the reference solver in float64, None), or (None, reason) if the solve failed."""
    tight = copy.deepcopy(flow).double().with_solver(ode_solver(**TIGHT))
    try:
        return _in_parts(tight.log_prob, x.double(), context), None
    except SolverError as e:
        return None, first_line(e)


def _bias(difference: Tensor) -> dict[str, Any]:
    """Returns statistics of the bias: log p with fixed steps minus log p of the reference solve, (n,), in nats."""
    difference = difference[difference.isfinite()]
    if not len(difference):
        return {"mean": None, "failure": "log p is not finite"}
    return {
        "mean": float(difference.mean()),
        "mean_stderr": stderr(difference),
        "rms": float(difference.square().mean().sqrt()),
        "max": float(difference.abs().max()),
        "rows": len(difference),
    }


def _in_parts(function: Program, x: Tensor, context: Tensor | None, first: Sequence[int] = ()) -> Tensor:
    """Evaluates function(x, context) in batches: first of the sizes `first`, then of `rows_at_a_time`."""
    size = rows_at_a_time(tuple(x.shape[1:]))
    found, at = [], 0
    sizes = iter(first)
    while at < len(x):
        part = slice(at, at + next(sizes, size))
        found.append(function(x[part]) if context is None else function(x[part], context[part]))
        at = part.stop
    return torch.cat(found)


# --- programs


class _LogProb(nn.Module):
    """The program of log p(x) in nats, (B,)."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        features = self.flow.features(context)
        z, log_det, _ = self.flow.bijection.pass_inverse(x, features)
        return self.flow.base_log_prob(z, features) + log_det.to(z.dtype)


class _Inverse(nn.Module):
    """The program from data to base, z (B, *event_shape)."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.bijection.map_inverse(x, self.flow.features(context))


class _Sample(nn.Module):
    """The program from base to data, x (B, *event_shape)."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.bijection.map_forward(z, self.flow.features(context))


@dataclass(frozen=True)
class _Task:
    """One program to export, and the rows on which it is compared with the flow.

    Attributes:
        name: one of `PROGRAMS`.
        module: the program.
        inputs: the inputs by name, (n, ...) each.
        output: the name of the output.
        wanted: the output of the flow for the inputs.
        scale: differences are divided by `scale`, which broadcasts against `wanted`.
        unit: the unit of divided differences.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str
    wanted: Tensor
    scale: Tensor
    unit: str

    def traced(self) -> torch.export.ExportedProgram:
        """Returns the traced program. Results of operations that depend on no input are constants in the program.

        Raises:
            ExportError: torch cannot trace the flow.
        """
        rows = torch.arange(2) % len(self.wanted)
        examples = tuple(values[rows] for values in self.inputs.values())
        batch = torch.export.Dim("batch")
        shapes: Any = tuple({0: batch} for _ in examples)
        try:
            exported = torch.export.export(self.module, examples, dynamic_shapes=shapes, strict=False)
            exported = torch.export.export(with_constants(exported), examples, dynamic_shapes=shapes, strict=False)
            remove_stack_traces(exported.graph_module)
            return exported
        except FlowtrainError:
            raise
        except Exception as e:  # torch raises errors of many kinds
            advice = "use operations of torch that do not branch on values, and use x.shape[0] instead of len(x)"
            said = first_line(e)[:300]
            raise ExportError(
                f"{self.name}: torch.export cannot trace this flow: {said}. In your own code, {advice}"
            ) from e

    def difference(self, program: Program) -> float:
        """Returns the largest difference between the program and the flow, in units of `scale`.

        The difference is infinite if an element is finite for only one of program and flow.
        """
        x, *context = self.inputs.values()
        # batches of one row, of two rows, and larger batches
        found = _in_parts(program, x, context[0] if context else None, first=(1, 2))
        if found.shape != self.wanted.shape:
            return math.inf
        found, wanted = found.double(), self.wanted.double()
        finite = wanted.isfinite()
        same = torch.equal(finite, found.isfinite()) and torch.equal(found[~finite].isnan(), wanted[~finite].isnan())
        if not same or not bool(finite.any()):
            return math.inf
        return float(((found - wanted).abs() / self.scale).where(finite, 0).max())

    def difference_message(self, path: Path, difference: float, tolerance: float) -> str:
        """Returns the error message for a program that differs too much from the flow."""
        if not math.isfinite(difference):
            return f"{path}: the program {self.name} and the flow are finite for different rows, so nothing was written"
        dtype = str(self.wanted.dtype).removeprefix("torch.")
        return (
            f"{path}: {self.name} differs from the flow by {difference:.1e} {self.unit}, more than {tolerance:.0e}, so "
            f"nothing was written. The flow in {dtype} differs from the flow in float64 by {self.rounding():.1e}. If "
            "this rounding error is about as large as the difference, set "
            f"tolerance={10 ** math.ceil(math.log10(difference)):.0e}"
        )

    def rounding(self) -> float:
        """Returns the largest difference between the flow and the flow in float64, in units of `scale`."""
        exact = copy.deepcopy(self.module).double()
        x, *context = self.inputs.values()
        found = _in_parts(exact, x.double(), context[0] if context else None).double()
        difference = (found - self.wanted.double()).abs() / self.scale
        return float(difference.where(difference.isfinite(), 0).max())

    def about(self) -> dict[str, Any]:
        """Returns the metadata that differ between the programs."""
        return {
            "program": self.name,
            "inputs": [_tensor_spec(name, values) for name, values in self.inputs.items()],
            "output": _tensor_spec(self.output, self.wanted),
            "max_difference_unit": self.unit,
        }


def _tasks(flow: Flow, rows: _Rows) -> Iterator[_Task]:
    given = {} if rows.context is None else {"context" if flow.context else "label": rows.context}
    log_p = _in_parts(flow.log_prob, rows.x, rows.context)
    if not bool(log_p.isfinite().any()):
        raise ExportError("log p is not finite on any of the rows, so the programs cannot be compared with the flow")
    yield _Task("log_prob", _LogProb(flow), {"x": rows.x, **given}, "log_p", log_p, torch.ones(()), "nats")
    z, x = _in_parts(flow.inverse, rows.x, rows.context), _in_parts(flow.forward, rows.z, rows.context)
    unit = "standard deviations"
    yield _Task("inverse", _Inverse(flow), {"x": rows.x, **given}, "z", z, _element_std(z), unit)
    yield _Task("sample", _Sample(flow), {"z": rows.z, **given}, "x", x, _element_std(x), unit)


def _element_std(y: Tensor) -> Tensor:
    """Returns the standard deviation of each element of y (n, *event_shape) over finite rows, or 1 if it is 0."""
    finite = y[y.flatten(1).isfinite().all(1)].double()
    std = finite.std(0, correction=0) if len(finite) > 1 else torch.ones_like(y[0], dtype=torch.float64)
    return std.where(std > 0, 1.0)


def with_constants(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """Replaces each operation that depends on no input by its value (constant folding).

    ONNX has no operator for some operations on parameters, such as the inverse of a matrix or the log-gamma function.
    """
    module: Any = exported.module()
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(module, node.target)
            if isinstance(value, Tensor):
                known[node] = value.detach()
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes) and not _random(node.target):
            args, kwargs = (fx.map_arg(part, known.__getitem__) for part in (node.args, node.kwargs))
            known[node] = node.target(*args, **kwargs)
    for i, (node, value) in enumerate(known.items()):
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(user in known for user in node.users):
            continue
        # each value is copied, because the tensors that a loop uses must not share memory
        module.register_buffer(f"constant_{i}", value.clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f"constant_{i}")
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in known)
    for node in reversed(list(known)):
        if not node.users:
            module.graph.erase_node(node)
    # a new module contains only the tensors that the graph still uses
    return fx.GraphModule(module, module.graph)


def remove_stack_traces(module: nn.Module) -> None:
    """Removes stack traces from a program. They contain paths of this machine, and are much longer than the program."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("from_node", None)


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


# --- metadata


def _tensor_spec(name: str, values: Tensor) -> dict[str, Any]:
    dtype = str(values.dtype).removeprefix("torch.")
    return {"name": name, "shape": ["batch", *values.shape[1:]], "dtype": dtype}


def _about(flow: Flow, columns: Sequence[str]) -> dict[str, Any]:
    try:
        ours = version("flowtrain")
    except PackageNotFoundError:
        ours = "unknown"
    return {
        "flowtrain": ours,
        "torch": torch.__version__,
        "event_shape": list(flow.event_shape),
        "columns": list(columns),
        "classes": flow.classes,
        "integer_valued": flow.integer_valued,
        "levels": flow.levels,
        "noisy_columns": list(flow.noisy),
        "column_types": [str(one) for one in flow.types],
        "categories": {str(i): list(one.categories) for i, one in enumerate(flow.types) if one.categories},
        "base": {
            "class": type(flow.base).__name__,
            "density": (inspect.getdoc(type(flow.base)) or "").partition("\nArgs:")[0].strip(),
            "parameters": {name: values.tolist() for name, values in flow.base.state_dict().items()},
        },
        "notes": _notes(flow),
    }


def _notes(flow: Flow) -> list[str]:
    """Returns the notes in the metadata, which explain the programs to their users."""
    notes = [
        "log_prob: x -> log p(x) in nats. inverse: x -> z. sample: z -> x; draw z from the density of base.",
        "The first dimension of every input and output is the batch, of any size of at least 1.",
    ]
    if flow.integer_valued or flow.noisy:
        which = "x" if flow.integer_valued else "the columns of x in noisy_columns"
        top = "" if flow.levels is None else f" and limit to 0 .. {flow.levels - 1}"
        notes.append(
            f"The data are whole numbers in {which}: give log_prob and inverse x + u, with u uniform in [0, 1). sample "
            f"returns x + u: round down{top}."
        )
    if flow.levels is not None:
        notes.append(f"log_prob and inverse return NaN for values so far outside of 0 .. {flow.levels} that p(x) = 0.")
    return notes


# --- formats


class Format(ABC):
    """A file format of programs."""

    @abstractmethod
    def converted(self, exported: torch.export.ExportedProgram, task: _Task) -> Any:
        """Converts a traced program to this format."""

    @abstractmethod
    def content(self, program: Any, metadata: dict[str, Any]) -> bytes:
        """Returns the content of a file."""

    @abstractmethod
    def loaded(self, content: bytes) -> Program:
        """Returns a function that runs the program in a file."""


class _Pt2(Format):
    def converted(self, exported: torch.export.ExportedProgram, task: _Task) -> torch.export.ExportedProgram:
        return exported

    def content(self, program: Any, metadata: dict[str, Any]) -> bytes:
        file = io.BytesIO()
        try:
            torch.export.save(program, file, extra_files={METADATA: to_json(metadata)})
        except ValueError as e:
            # torch 2.8 writes constants to JSON, which has no infinity and no NaN
            raise ExportError(f"torch {torch.__version__} cannot write this program ({e}): use a later torch") from e
        return file.getvalue()

    def loaded(self, content: bytes) -> Program:
        return torch.export.load(io.BytesIO(content)).module()


class _Onnx(Format):
    """The format ONNX. onnxruntime runs the programs on the CPU.

    Raises:
        ConfigError: a package is missing.
    """

    def __init__(self) -> None:
        try:
            _, _, self.runtime = (import_module(name) for name in ("onnx", "onnxscript", "onnxruntime"))
        except ImportError as e:
            raise ConfigError(f"ONNX needs the package {e.name}: run pip install 'flowtrain[onnx]'") from e

    def converted(self, exported: torch.export.ExportedProgram, task: _Task) -> Any:
        names: dict[str, Any] = {"input_names": [*task.inputs], "output_names": [task.output]}
        try:
            found = torch.onnx.export(exported, dynamo=True, verbose=False, **names)
        except Exception as e:  # the converter raises errors of many kinds
            said = first_line(e.__cause__ if isinstance(e.__cause__, Exception) else e)[:300]
            raise ExportError(f"{task.name}: torch.onnx cannot convert this flow: {said}. Export to .pt2") from e
        assert found is not None
        return found.model_proto

    def content(self, program: Any, metadata: dict[str, Any]) -> bytes:
        del program.metadata_props[:]
        program.metadata_props.add(key=METADATA, value=to_json(metadata))
        content: bytes = program.SerializeToString()
        return content

    def loaded(self, content: bytes) -> Program:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # severity 3 logs only errors
        options.log_severity_level = 3
        try:
            session = self.runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime raises errors of many kinds
            raise ExportError(f"onnxruntime cannot run this flow: {first_line(e)[:300]}. Export to .pt2") from e
        names = [given.name for given in session.get_inputs()]

        def run(*inputs: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])

        return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings and log messages of the exporters of torch."""
    disabled = logging.root.manager.disable
    # the exporters log some of their messages as errors
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in ("torch", "copyreg", "onnxscript", "onnx_ir"):
                warnings.filterwarnings("ignore", module=rf"{module}\b")
            yield
    finally:
        logging.disable(disabled)
