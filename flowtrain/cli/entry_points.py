"""The console scripts.

The module of a command parses and checks the command line. It does not import torch, so that help and a refused command
take a fraction of a second. The module that does the work is imported inside `flowtrain.cli.late_imports.loading`.
"""

import gc
import sys
from importlib import import_module

from flowtrain.cli.late_imports import loading
from flowtrain.utils.status import reporting


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
            with loading():
                command = import_module(module)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        try:
            command.main()
        finally:
            # without freeze, the interpreter would search all modules for cycles at exit, which takes a second
            gc.freeze()
