"""A polite stop: SIGINT and SIGTERM let the step in hand finish."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Inside the context, `received` is the first signal that came, or None; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # handlers can be set in the main thread only; elsewhere (a notebook's worker, a launcher) nothing changes
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
