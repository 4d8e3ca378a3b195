"""What a run sets for its whole process: threads and the allocator of the CPU."""

import ctypes
import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from flowtrain import distributed
from flowtrain.checks import whole
from flowtrain.errors import ConfigError

MOST_THREADS = 1024


def prepare_process(config: Mapping[str, Any], event_shape: tuple[int, ...]) -> None:
    """Threads and allocator. `threads`: null takes one where matrices are too small to share, else all cores.

    Raises:
        ConfigError: no number of threads.
    """
    threads = config.get("threads")
    if threads is None:
        threads = 1 if math.prod(event_shape) <= 16 else max(1, cores() // distributed.on_this_machine())
    if whole("threads", threads) > MOST_THREADS:
        raise ConfigError(f"threads={threads}: give at most {MOST_THREADS}")
    torch.set_num_threads(threads)
    keep_freed_memory()


def cores() -> int:
    """The number of CPU cores for this process: its affinity on Linux, which batch systems set, else all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Lets glibc reuse what torch frees on the CPU.

    By default it gives large blocks back at once, and the next tensor of that size waits for fresh zeroed pages, which
    convolutional training steps feel most. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)
