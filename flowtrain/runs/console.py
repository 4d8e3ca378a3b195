"""Messages of a run: title, banner, log, and suggested commands."""

import logging
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowtrain.data.base import Dataset
from flowtrain.data.context import example_of
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import NAMES
from flowtrain.flow import Density, Flow
from flowtrain.ode import Solver
from flowtrain.training.trainer import Trainer
from flowtrain.utils import ranks, status
from flowtrain.utils.formatting import flattened, option, shown

log = logging.getLogger("flowtrain")


def title_of(config: Mapping[str, Any]) -> str:
    """Returns the title of a run, such as "ffjord on moons". A user's data have the name of their file.

    Example:
        >>> title_of({"model": {"name": "glow"}, "data": {"name": "array", "path": "some/where/mine.npy"}})
        'glow on mine.npy'
    """
    return f"{name_of(config['model'])} on {data_name(config)}"


def data_name(config: Mapping[str, Any]) -> str:
    """Returns the name of a data set; for a user's data, the name of the file; for a target, the name of the target."""
    if config.get("target") and config["data"].get("name") == "target":
        name = name_of(config["target"])
        return str(config["target"]["_target_"]) if name == "custom" else name
    path = config["data"].get("path")
    return Path(path).name if path else name_of(config["data"])


def name_of(group: Mapping[str, Any]) -> str:
    """Returns the name of a group's choice, or of the class that it builds."""
    return str(group.get("name") or group["_target_"].rpartition(".")[2])


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler that removes the display of `flowtrain.utils.status` while it writes a message."""

    def emit(self, record: logging.LogRecord) -> None:
        with status.aside():
            super().emit(record)


@contextmanager
def messages(path: Path | None = None) -> Iterator[None]:
    """Context manager that writes messages to standard error, and with the time to a file if `path` is given.

    Only rank 0 writes messages. If standard error is not a terminal, only warnings are written to it, because logs of
    many jobs should not be full of tables. Progress is also shown, see `flowtrain.utils.status`.
    """
    if not ranks.is_first():
        path = None
    console = _Console(sys.stderr)
    console.setLevel(logging.INFO if status.is_terminal(sys.stderr) else logging.WARNING)
    console.setFormatter(logging.Formatter("%(message)s"))
    handlers: list[logging.Handler] = [console]
    if path is not None:
        handlers.append(_log_file(path))
    # the log file also contains tracebacks
    log.setLevel(logging.DEBUG if ranks.is_first() else logging.CRITICAL)
    log.propagate = False
    log.handlers[:] = handlers
    try:
        with status.reporting():
            yield
    finally:
        log.handlers.clear()
        for handler in handlers:
            handler.close()


def _log_file(path: Path) -> logging.FileHandler:
    """Returns a handler for the log file, which the first message creates, so that a refused command leaves no file."""
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    # on a full disk, a message is missing in the file, without an error. The terminal has shown the message
    file.handleError = lambda record: None  # type: ignore[method-assign]
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return file


class _ToParent(logging.Handler):
    """Passes messages to the handlers of the root logger, as propagation does.

    Args:
        last_resort: whether logging prints warnings to standard error if the root logger has no handler.
    """

    def __init__(self, last_resort: bool) -> None:
        super().__init__()
        self.last_resort = last_resort

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.handlers or self.last_resort:
            root.callHandlers(record)


@contextmanager
def writing_log(path: Path) -> Iterator[None]:
    """Context manager that also writes messages of all levels to a log file. Other handlers are not affected."""
    file, parent, disabled = _log_file(path), _ToParent(last_resort=not log.handlers), log.disabled
    # no message has a level above CRITICAL
    shown = logging.CRITICAL + 1 if disabled else log.getEffectiveLevel()
    before = log.level, log.propagate, {handler: handler.level for handler in log.handlers}
    # a logger drops messages below its own level before any handler sees them
    for handler in (*log.handlers, parent):
        handler.setLevel(max(handler.level, shown))
    for handler in (file, parent) if log.propagate else (file,):
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    # dictConfig disables the loggers that exist
    log.propagate = log.disabled = False
    try:
        yield
    finally:
        log.disabled = disabled
        level, log.propagate, levels = before
        log.setLevel(level)
        for added in (file, parent):
            log.removeHandler(added)
        for handler, level in levels.items():
            handler.setLevel(level)
        file.close()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Context manager that suppresses warnings of the log. Other messages still appear."""

    def is_other(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


@contextmanager
def prefixed(name: str) -> Iterator[None]:
    """Context manager that puts a name in front of all messages of the log."""

    def add(record: logging.LogRecord) -> bool:
        record.msg = f"{name}: {record.msg}"
        return True

    log.addFilter(add)
    try:
        yield
    finally:
        log.removeFilter(add)


def banner(trainer: Trainer, run_dir: Path | None, recipes: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns the banner of a run, with a line for each part.

    Args:
        recipes: the recipes that were applied, with the keys that each of them set; None if unknown.
    """
    config, flow, data, settings = trainer.config, trainer.flow, trainer.data, trainer.settings
    step, warmup = trainer.step, trainer.train_state.warmup
    objective, regularizer = name_of(config["objective"]), name_of(config.get("regularizer") or {"name": "none"})
    size = sum(p.numel() for p in flow.parameters())
    start = f", from step {step}" if step else ""
    rows = {
        "model": f"{name_of(config['model'])}, {size:,} parameters",
        "data": f"{data_name(config)}, {describe_samples(data)}",
        "solver": "none: closed form" if flow.solver is None else _solver(flow.solver, warmup),
        "objective": objective + ("" if regularizer == "none" else f", regularizer {regularizer}"),
        "training": f"{settings.steps:,} steps of {settings.batch_size}{start}, {settings.optimizer}, "
        f"learning rate {settings.lr:g} ({settings.lr_decay}), seed {config['seed']}",
        **({} if recipes is None else {"recipe": _recipes(config, recipes)}),
        "device": describe_device(flow.like.device),
        **({} if run_dir is None else {"run": str(shortest(run_dir))}),
    }
    return as_banner(title_of(config), rows)


def as_banner(title: str, rows: Mapping[str, str]) -> str:
    """Formats a banner from the text of each part, by its name."""
    lines = "\n".join(f"{name:>{NAMES}}  {words}" for name, words in rows.items())
    return f"flowtrain: {title}\n{lines}"


def describe_samples(data: Dataset) -> str:
    """Describes a data set: the columns or the image shape, and the sizes of its sets."""
    shape = data.event_shape
    kind = f"{shape[0]} column{'s' * (shape[0] > 1)}" if len(shape) == 1 else f"images {'x'.join(map(str, shape))}"
    if isinstance(data, TargetData):
        known = "" if data.target.log_z is None else f", log Z {data.target.log_z:.4f} nats"
        draws = f"{len(data.val):,} samples for a validation, {len(data.test):,} for the evaluation"
        return f"a density of {kind}, known up to a constant{known}; {draws}"
    known = "" if data.entropy is None else f", entropy {data.entropy:.4f} nats"
    rows = "" if data.n_train is None else f"{data.n_train:,} rows for training, "
    weighted = "" if data.val_weights is None else "; the rows are weighted"
    return f"{kind}{known}; {rows}held out {len(data.val):,} for validation, {len(data.test):,} for the test{weighted}"


def _recipes(config: Mapping[str, Any], recipes: Mapping[str, Sequence[str]]) -> str:
    """Formats the recipes that were applied and the keys that they set, on one or more lines."""
    lines, values = [], flattened(config)
    for name, keys in recipes.items():
        text = f"{name}, sets {' '.join(f'{key}={shown(values[key])}' for key in keys if key in values)}"
        lines += textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * (NAMES + 2)).join(lines) or "none"


def _solver(solver: Solver, warmup: int) -> str:
    if not solver.adaptive:
        return f"{solver.method}, steps of {solver.step_size:g}"
    warming = warmup and solver.warmup_rtol > solver.train_rtol
    tightening = f"; rtol in training from {solver.warmup_rtol:g} to {solver.train_rtol:g}" if warming else ""
    return f"{solver.method}, rtol {solver.rtol:g}, atol {solver.atol:g}{tightening}"


def describe_device(device: torch.device) -> str:
    """Describes a device: the name of the GPU, or the number of threads."""
    beside = f", {ranks.size()} ranks" if ranks.size() > 1 else ""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}{beside}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}{beside}"


def next_commands(run_dir: Path, flow: Density) -> str:
    """Returns the commands that are suggested after a run."""
    shown = shortest(run_dir)
    # an ensemble has no path from base to data to animate
    moving = isinstance(flow, Flow) and (len(flow.event_shape) == 3 or flow.event_shape == (2,))
    run = option("ckpt", shown)
    what = "animate=true" if moving else "n=10000"
    if flow.context and not moving:
        what = shlex.quote(f"context={example_of(flow.context)}")
    sample = f"flowsample {run} {what}"
    return f"{'next':>{NAMES}}  floweval {run} report=true\n{'':>{NAMES}}  {sample}"


def shortest(path: Path) -> Path:
    """Returns the path relative to the working directory, if it is inside of it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
