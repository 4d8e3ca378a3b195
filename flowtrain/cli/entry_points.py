"""The console scripts. They show a status line during the imports, which take seconds, and then run the command.

At the top, this module imports only modules that load fast.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from flowtrain.utils.status import reporting, status


def flowtrain() -> None:
    """Runs the console script `flowtrain`."""
    _run("flowtrain", "flowtrain.cli.train")


def floweval() -> None:
    """Runs the console script `floweval`."""
    _run("floweval", "flowtrain.cli.evaluate")


def flowsample() -> None:
    """Runs the console script `flowsample`."""
    _run("flowsample", "flowtrain.cli.sample")


def flowexport() -> None:
    """Runs the console script `flowexport`."""
    _run("flowexport", "flowtrain.cli.export")


def _run(name: str, module: str) -> None:
    with reporting():
        try:
            with status("loading flowtrain"), _without_collector():
                command = import_module(module)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        try:
            command.main()
        finally:
            # without freeze, the interpreter would search all modules for cycles at exit, which takes a second
            gc.freeze()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Turns off the garbage collector during imports, which saves a fifth of their time.

    Collection would be useless, because modules are never freed.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
