"""Settings of the process: threads, memory, random seeds, signals."""

import ctypes
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from flowtrain.utils import ranks
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError

_SEEDED: ContextVar[bool] = ContextVar("seeded", default=False)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global generators of the CPU and of `device` start from `seed`; after, they are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        token = _SEEDED.set(True)
        try:
            yield
        finally:
            _SEEDED.reset(token)


def seeding_active() -> bool:
    """Whether the code runs inside of `seeded`."""
    return _SEEDED.get()


MOST_THREADS = 1024


def prepare_process(config: Mapping[str, Any], event_shape: tuple[int, ...]) -> None:
    """Threads and allocator. `threads`: null takes one where matrices are too small to share, else all cores.

    Raises:
        ConfigError: no number of threads.
    """
    threads = config.get("threads")
    if threads is None:
        threads = 1 if math.prod(event_shape) <= 16 else max(1, cores() // ranks.on_this_machine())
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


# USR1 and USR2 are sent by SLURM's --signal and by submitit, HUP (BREAK on Windows) when the terminal is closed
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGBREAK")
# the ones that this system has
STOPPING: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))


def may_set_handlers() -> bool:
    """Only in the main thread; elsewhere (a notebook's worker, a launcher) nothing changes."""
    return threading.current_thread() is threading.main_thread()


class StopSignals:
    """Inside the context, `received` is the first signal that came, or None; a SIGINT after it interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if may_set_handlers():
            for number in STOPPING:
                # ignored, as nohup has it with SIGHUP, or handled by what is not Python's
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


class SignalReceived(BaseException):
    """A signal, where nothing has to be finished first; no one else's handler of errors is to stop it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Raising(StopSignals):
    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise SignalReceived(number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, a signal to stop raises `SignalReceived` at once."""
    with _Raising():
        yield
