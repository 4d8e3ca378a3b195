"""The console scripts. They show that flowtrain is loading, since its imports take seconds, and then run a command.

Nothing heavy may be imported at the top of this module.
"""

import sys
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
            with status("loading flowtrain"):
                command = import_module(module)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        command.main()
