"""Settings of the process: random seeds, torch's defaults, threads, memory, signals."""

import ctypes
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from flowtrain.utils import ranks
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.precision import UNCHANGED, default_precision

_SEEDED: ContextVar[bool] = ContextVar("seeded", default=False)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators inside the context, and restores their states on exit."""
    with restored_random_state(device):
        seed_generators(seed, device)
        token = _SEEDED.set(True)
        try:
            yield
        finally:
            _SEEDED.reset(token)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's global generators for computations on a device.

    On the CPU, `torch.manual_seed` takes a hundred times as long, because it also prepares the seeds of other devices.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def restored_random_state(device: torch.device) -> Iterator[None]:
    """Restores the states of torch's global generators on exit.

    The generators of the CPU are restored and, if `device` is a GPU, of all GPUs, because `torch.manual_seed` seeds all
    of them.
    """
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(devices=gpus):
        yield


def seeding_active() -> bool:
    """Whether the code runs inside `seeded`."""
    return _SEEDED.get()


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """Applies torch's default settings inside the context, and restores the caller's settings on exit.

    Inside, the default dtype is float32, the default device is the CPU, gradients are recorded, autocast is off, and
    products have torch's default precision, see `default_precision`. The result of a fit or an evaluation therefore
    does not depend on the settings of the caller. The random state and the thread count are not changed on entry, but
    restored on exit if the code inside changes them. Deterministic algorithms and the benchmark mode of cuDNN are not
    touched.

    Tensors that were made in inference mode stay inference tensors. Clone them before computing gradients with them.

    Args:
        device: the device that the code inside uses.
    """
    threads = torch.get_num_threads()
    chosen = _THREADS_CHOSEN.set(_THREADS_CHOSEN.get())
    try:
        with ExitStack() as stack:
            # inference mode is turned off, because its tensors have no version counters. This also enables gradients
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(restored_random_state(device))
            stack.enter_context(default_precision())
            for kind in {"cpu", device.type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            # only if needed, because this context slows down every operation
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(_default_float32())
            yield
    finally:
        _THREADS_CHOSEN.reset(chosen)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


_LOCK = threading.Lock()
# Number of `_default_float32` contexts of each Python thread, and the default dtype before the first of them
_ENTERED: dict[int, int] = {}
_DTYPE_BEFORE: list[torch.dtype] = [torch.float32]


@contextmanager
def _default_float32() -> Iterator[None]:
    """Sets the default dtype to float32. All threads share this setting; the last thread that exits restores it."""
    me = threading.get_ident()
    with _LOCK:
        if not _ENTERED:
            _DTYPE_BEFORE[0] = torch.get_default_dtype()
        _ENTERED[me] = _ENTERED.get(me, 0) + 1
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _LOCK:
            _ENTERED[me] -= 1
            if not _ENTERED[me]:
                del _ENTERED[me]
            if not _ENTERED:
                torch.set_default_dtype(_DTYPE_BEFORE[0])


MOST_THREADS = 1024
# Samples with at most this many elements are computed on one thread, because their matrices are small
SMALL = 16
# whether `choose_threads` was called in the surrounding `own_settings`
_THREADS_CHOSEN: ContextVar[bool] = ContextVar("threads chosen", default=False)


def choose_threads(threads: int | None, event_shape: tuple[int, ...]) -> None:
    """Sets the thread count of torch until the end of the surrounding `own_settings`.

    Args:
        threads: None means one thread for samples with at most 16 elements (SMALL), else all cores of this process
            divided by the number of ranks on this machine.

    Raises:
        ConfigError: `threads` is not a number of threads.
    """
    if threads is None:
        threads = 1 if math.prod(event_shape) <= SMALL else max(1, cores() // ranks.on_this_machine())
    if whole("threads", threads) > MOST_THREADS:
        raise ConfigError(f"threads={threads}: give at most {MOST_THREADS}")
    torch.set_num_threads(threads)
    _THREADS_CHOSEN.set(True)


# For each Python thread inside `one_thread_if_small`, by identifier: the thread count to restore
_COUNTS: dict[int, int] = {}


def one_thread_if_small(event_shape: tuple[int, ...], device: torch.device) -> AbstractContextManager[None]:
    """Sets one CPU thread inside the context if samples have at most 16 elements (SMALL), and restores the count.

    Small matrices are slower on several threads: log p of a 200 x 200 grid takes three times as long on two threads.
    The count does not change on a GPU, if it is already 1, or if `choose_threads` has set it.

    Several Python threads may be inside the context at once. Torch has a thread count for each Python thread. When a
    new Python thread first uses torch, its count becomes the count that any thread has set last. If the new thread gets
    the count 1 of a thread inside the context, it restores the count that this other thread had before.
    """
    if device.type != "cpu" or math.prod(event_shape) > SMALL:
        return UNCHANGED
    # a compiler traces this code, and its program does not contain the thread count
    if torch.compiler.is_compiling() or _THREADS_CHOSEN.get() or threading.get_ident() in _COUNTS:
        return UNCHANGED
    if not _COUNTS and torch.get_num_threads() == 1:
        return UNCHANGED
    return _one_thread()


@contextmanager
def _one_thread() -> Iterator[None]:
    me = threading.get_ident()
    with _LOCK:
        count = torch.get_num_threads()
        if count == 1 and _COUNTS:
            count = next(iter(_COUNTS.values()))
        if count > 1:
            _COUNTS[me] = count
            torch.set_num_threads(1)
    try:
        yield
    finally:
        if count > 1:
            with _LOCK:
                torch.set_num_threads(_COUNTS.pop(me))


def _forget_other_threads() -> None:
    """Resets the state after a fork. Other threads are missing, so they never exit contexts or release the lock."""
    global _LOCK
    _LOCK = threading.Lock()
    me, left = threading.get_ident(), bool(_ENTERED)
    for counts in (_ENTERED, _COUNTS):
        for other in [thread for thread in counts if thread != me]:
            del counts[other]
    if left and not _ENTERED:
        torch.set_default_dtype(_DTYPE_BEFORE[0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def cores() -> int:
    """Returns the number of CPU cores that this process may use: on Linux by its affinity, which batch systems set,
    else all.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Makes glibc reuse memory that torch frees on the CPU.

    By default, glibc returns large blocks to the system at once, and the next tensor of this size waits for new zeroed
    pages. Convolutional training steps are slowed down most. Without glibc, this function does nothing. The setting
    cannot be undone, so only the commands call this function.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)


# SLURM's --signal and submitit send USR1 and USR2. HUP (BREAK on Windows) is sent when the terminal is closed
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGBREAK")
# The signals that exist on this system
STOPPING: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))


def may_set_handlers() -> bool:
    """Whether this is the main thread, the only one in which Python allows signal handlers to be set."""
    return threading.current_thread() is threading.main_thread()


class StopSignals:
    """Records the first signal inside the context in `received`. A later SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if may_set_handlers():
            for number in STOPPING:
                # do not replace signals that are ignored, as SIGHUP under nohup, or handled outside Python
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
    """A signal to stop at once. Derives from BaseException, so that `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Raising(StopSignals):
    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise SignalReceived(number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raises `SignalReceived` at once if a signal to stop arrives inside the context."""
    with _Raising():
        yield
