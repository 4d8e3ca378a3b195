"""The context in which a command imports the modules that do its work, after its command line has been checked."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from flowtrain.utils.status import status


@contextmanager
def loading() -> Iterator[None]:
    """Context manager for imports that take seconds. It shows a status line, and turns off the garbage collector.

    Without the collector, imports take a fifth less time. Collection would be useless, because modules are never freed.
    """
    with status("loading flowtrain"):
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.freeze()
