"""Titles, short paths, and the log of a run. This module does not import torch."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowtrain.utils import ranks, status

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


def shortest(path: Path) -> Path:
    """Returns the path relative to the working directory, if it is inside of it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
