"""Estimates when this command began, including its imports, which take seconds.

This module must not import anything from the package.
"""

import time

# perf_counter at the start of the process, assuming that it has computed since then without waiting
_BEGUN = [time.perf_counter() - time.process_time()]


def command_begun() -> float:
    """The time at which the current command or job began, by time.perf_counter.

    The first call in a process returns the start of the process. Later calls, by further jobs of a sweep, return the
    current time.
    """
    return _BEGUN.pop() if _BEGUN else time.perf_counter()
