"""A polite stop: SIGINT, SIGTERM and what batch systems send before they take a machine back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# USR1 and USR2 are sent by SLURM's --signal and by submitit, HUP (BREAK on Windows) when the terminal is closed
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGBREAK")
# the ones that this system has
STOPPING: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


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
