"""When this command has begun, as well as a process can tell: imports count, which take seconds.

Imported before anything else of the package, and importing nothing of it.
"""

import time

# perf_counter at the start of the process: it has computed since then, and done little else
_BEGUN = [time.perf_counter() - time.process_time()]


def command_begun() -> float:
    """perf_counter at which the present command or job began.

    The first call of a process gives the start of the process; later ones, of further jobs of a sweep, the present.
    """
    return _BEGUN.pop() if _BEGUN else time.perf_counter()
