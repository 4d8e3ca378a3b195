"""The console scripts. They show that flowtrain is loading, since its imports take seconds, and then run a command.

Nothing heavy may be imported at the top of this module.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from flowtrain.status import reporting, status


def flowtrain() -> None:
    """The console script `flowtrain`."""
    _run("flowtrain", "flowtrain.cli.train")


def floweval() -> None:
    """The console script `floweval`."""
    _run("floweval", "flowtrain.cli.evaluate")


def flowsample() -> None:
    """The console script `flowsample`."""
    _run("flowsample", "flowtrain.cli.sample")


def _run(name: str, module: str) -> None:
    with reporting():
        try:
            with status("loading flowtrain"), _kept():
                command = import_module(module)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        try:
            command.main()
        finally:
            # else the interpreter searches all modules for cycles as it ends, which takes a second
            gc.freeze()


@contextmanager
def _kept() -> Iterator[None]:
    """Keeps the garbage collector from searching what is imported inside, which stays: a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
