"""Progress on standard error: a bar or a line on a terminal, a line every 30 seconds elsewhere."""

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# perf_counter at the start of the process, if the process has been computing since then
_BEGUN = [time.perf_counter() - time.process_time()]


def command_begun() -> float:
    """Returns the time at which the current command or job began, by time.perf_counter.

    The first call in a process returns the start of the process. Later calls, by further jobs of a sweep, return the
    current time.
    """
    return _BEGUN.pop() if _BEGUN else time.perf_counter()


log = logging.getLogger("flowtrain")

# Seconds without output before a terminal shows a status, between lines if there is no terminal, and between refreshes
# on a terminal
DELAY, EVERY, TICK = 2.0, 30.0, 0.5
# Seconds between redraws by `advance`, and the weight of the latest rate in the smoothed rate
REDRAW, SMOOTHING = 0.1, 0.3


class Status:
    """The name and the progress of a task.

    Args:
        words: the name of the task, such as "scoring the test set", or a function that returns it at every refresh.
        total: the number of units. None if unknown.
        unit: the name of a unit, in the singular.
        done: the number of units already done, for example by an earlier run.
        bar: whether a terminal shows a progress bar at once, which stays at the end.

    Attributes:
        n: the number of units done so far.
    """

    def __init__(
        self,
        words: str | Callable[[], str],
        total: int | None = None,
        unit: str = "step",
        done: int = 0,
        bar: bool = False,
    ) -> None:
        self.words, self.total, self.unit, self.bar = words, total, unit, bar
        self.n = self.initial = done
        self.notes = ""
        self.begun = 0.0
        self._reporter: Reporter | None = None
        self._rate: float | None = None
        self._counted = (done, 0.0)

    def begin(self, reporter: "Reporter", now: float) -> None:
        """Sets the reporter that shows this status, and its start time."""
        self._reporter, self.begun, self._counted = reporter, now, (self.n, now)

    def advance(self, n: int = 1) -> None:
        """Adds n to the number of units done; n may be negative."""
        self.n += n
        if self._reporter is None:
            return
        now = self._reporter.clock()
        before, then = self._counted
        if now - then >= REDRAW:
            rate = (self.n - before) / (now - then)
            self._rate = rate if self._rate is None else SMOOTHING * rate + (1 - SMOOTHING) * self._rate
            self._counted = self.n, now
            self._reporter.refresh()

    def note(self, **values: object) -> None:
        """Sets the values that are shown after the bar."""
        self.notes = ", ".join(f"{name}={value}" for name, value in values.items())

    @property
    def name(self) -> str:
        """The current name."""
        return self.words if isinstance(self.words, str) else self.words()

    @property
    def rate(self) -> float | None:
        """Units per second, smoothed; None if not known yet."""
        return self._rate if self._rate and self._rate > 0 else None


class Reporter:
    """Shows the innermost active status.

    Args:
        stream: the stream to write to. On a terminal, the display is redrawn in place; elsewhere, lines are written.
        clock: a function that returns the time in seconds.
        delay, every: None means DELAY and EVERY.
        threaded: whether a thread refreshes the display. Otherwise only `refresh` and `advance` do.
    """

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        delay: float | None = None,
        every: float | None = None,
        threaded: bool = True,
    ) -> None:
        self.stream, self.clock, self.threaded = stream, clock, threaded
        self.delay = DELAY if delay is None else delay
        self.every = EVERY if every is None else every
        self.terminal = is_terminal(stream)
        self._stack: list[Status] = []
        self._said = clock()
        self._line = ""
        # the lock is reentrant, because a log message may be written while a line is drawn
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closed = False

    def push(self, status: Status) -> None:
        """Begins a status."""
        with self._changed:
            status.begin(self, self.clock())
            self._stack.append(status)
            if self.threaded and self._thread is None:
                self._thread = threading.Thread(target=self._tick, name="flowtrain status", daemon=True)
                self._thread.start()
            self._changed.notify()
            self.refresh()

    def pop(self, status: Status) -> None:
        """Ends a status and the statuses inside it. A bar stays on the terminal in its last state."""
        with self._changed:
            if status not in self._stack:
                return
            del self._stack[self._stack.index(status) + 1 :]
            if status.bar and self.terminal:
                self._draw(self._bar(status, "", self.clock()))
                self._write("\n")
                self._line, self._said = "", self.clock()
            self._stack.pop()
            self._draw("")
            self.refresh()

    def refresh(self) -> None:
        """Updates the display if an update is due."""
        with self._changed:
            if not self._stack or self._closed:
                return
            now = self.clock()
            if self.terminal:
                shown, words = self._current(now)
                if shown is not None:
                    self._draw(self._bar(shown, words, now))
            elif now - self._said >= self.every:
                self._said = now
                shown, words = self._current(now)
                if shown is None:
                    shown, words = self._stack[-1], self._joined(self._stack)
                self._write(self._sentence(shown, words or shown.name, now) + "\n")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Removes the display inside the context, so that other output can be written."""
        with self._changed:
            self._draw("")
            try:
                yield
            finally:
                if self.terminal:
                    self._said = self.clock()
                self.refresh()

    def close(self) -> None:
        """Removes the display and ends the thread."""
        with self._changed:
            self._stack.clear()
            self._draw("")
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    def _tick(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                self._changed.wait(self._until_due())
                if self._closed:
                    return
                self.refresh()

    def _until_due(self) -> float | None:
        """Returns the seconds that the thread may sleep; None if there is no status."""
        if not self._stack:
            return None
        return TICK if self.terminal else min(max(TICK, self._said + self.every - self.clock()), 3600.0)

    def _current(self, now: float) -> tuple[Status | None, str]:
        """Returns the status to show and the names of the statuses around it; None before `delay` has passed.

        A status inside a bar replaces the bar once it has lasted `delay` seconds. Other statuses are shown after
        `delay` seconds without output.
        """
        bars = [i for i, status in enumerate(self._stack) if status.bar]
        first = bars[-1] + 1 if bars else 0
        inside = self._stack[first:]
        since = inside[0].begun if bars and inside else self._said
        if inside and now - since >= self.delay:
            return inside[-1], self._joined(inside)
        return (self._stack[first - 1], "") if bars else (None, "")

    @staticmethod
    def _joined(statuses: list[Status]) -> str:
        return ": ".join(status.name for status in statuses)

    def _bar(self, status: Status, words: str, now: float) -> str:
        """Formats a line for a terminal."""
        from tqdm import tqdm

        width, seconds, words = self._width(), max(0.0, now - status.begun), words or status.name
        if status.total is None:
            counted = f" {status.n:,} {status.unit}s" if status.n else ""
            return f"{words}{counted} [{tqdm.format_interval(seconds)}]"[:width]
        # the bar may use half of the line
        if len(words) > width // 2:
            words = words[: width // 2 - 1] + "…"
        line: str = tqdm.format_meter(
            status.n,
            max(status.total, 1),
            seconds,
            ncols=width,
            prefix=words,
            ascii=not self._has_blocks(),
            unit=status.unit,
            rate=status.rate,
            initial=status.initial,
            postfix=status.notes,
        )
        return line[:width]

    @staticmethod
    def _sentence(status: Status, words: str, now: float) -> str:
        """Formats a line for a log."""
        from tqdm import tqdm

        seconds = max(0.0, now - status.begun)
        parts = [words]
        if status.total:
            parts.append(f"{status.n:,} of {status.total:,} {status.unit}s ({status.n / status.total:.0%})")
        elif status.n:
            parts.append(f"{status.n:,} {status.unit}s")
        parts.append(f"{tqdm.format_interval(seconds)} so far")
        done = status.n - status.initial
        if status.total and done > 0:
            parts.append(f"about {tqdm.format_interval(seconds * (status.total - status.n) / done)} left")
        return ", ".join([*parts, *([status.notes] if status.notes else [])])

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 0
        # a line as wide as the terminal would wrap
        return max(20, (columns or shutil.get_terminal_size().columns) - 1)

    def _has_blocks(self) -> bool:
        try:
            "█…".encode(self.stream.encoding or "utf-8")
        except (UnicodeError, LookupError):
            return False
        return True

    def _draw(self, line: str) -> None:
        """Replaces the displayed line by `line`, or removes it if `line` is empty.

        The cursor returns to the start of the line, so that other output overwrites the line.
        """
        if not self.terminal or (not line and not self._line):
            return
        self._write(f"\r{line.ljust(len(self._line))}\r")
        self._line = line

    def _write(self, text: str) -> None:
        if self._closed:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except UnicodeError:
            self._write(text.encode("ascii", "replace").decode())
        except (AttributeError, OSError, ValueError):
            # the stream is closed or broken, which must not end the work
            self._closed = True


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal. The stream may be None, closed, or an object that has only `write`."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False


def library_reporter() -> Reporter:
    """Returns the reporter for calls from Python: a bar of `tqdm.auto` in a notebook or on a terminal, else lines."""
    return TqdmReporter() if is_terminal(sys.stderr) or "ipykernel" in sys.modules else Reporter(sys.stderr)


class TqdmReporter(Reporter):
    """Shows progress bars by `tqdm.auto`, as a widget in a notebook. Other statuses are not shown."""

    def __init__(self) -> None:
        super().__init__(sys.stderr, threaded=False)
        self._shown: dict[Status, Any] = {}

    def push(self, status: Status) -> None:
        from tqdm.auto import tqdm

        status.begin(self, self.clock())
        if status.bar:
            with self._until_broken():
                self._shown[status] = tqdm(total=status.total, initial=status.n, desc=status.name, unit=status.unit)

    def pop(self, status: Status) -> None:
        if status in self._shown:
            self.refresh()
            bar = self._shown.pop(status, None)
            with self._until_broken():
                if bar is not None:
                    bar.close()

    def refresh(self) -> None:
        with self._until_broken():
            for status, bar in self._shown.items():
                bar.n = status.n
                bar.set_postfix_str(status.notes)

    @contextmanager
    def _until_broken(self) -> Iterator[None]:
        """Stops drawing bars if drawing fails, because a closed or broken stream must not end the work."""
        try:
            yield
        except (AttributeError, OSError, ValueError):
            for bar in self._shown.values():
                bar.disable = True
            self._shown.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        for status in [*self._shown]:
            self.pop(status)


# the reporter of this process; None outside `reporting`
_reporter: Reporter | None = None


@contextmanager
def reporting(reporter: Reporter | None = None) -> Iterator[None]:
    """Shows statuses inside the context, with `reporter` or on standard error.

    Does nothing inside another `reporting`, on ranks other than 0, and if TQDM_DISABLE is set, as in concurrent jobs of
    a sweep.
    """
    global _reporter
    if _reporter is not None or not _is_first() or os.environ.get("TQDM_DISABLE"):
        yield
        return
    mine = _reporter = reporter or Reporter(sys.stderr)
    try:
        yield
    finally:
        _reporter = None
        mine.close()


@contextmanager
def status(
    words: str | Callable[[], str], total: int | None = None, unit: str = "step", done: int = 0, bar: bool = False
) -> Iterator[Status]:
    """Shows the work inside the context as a status if it takes longer than DELAY. See `Status` for the arguments.

    Example:
        >>> with status("scoring", total=300, unit="row") as progress:
        ...     for _ in range(3):
        ...         progress.advance(100)
        >>> progress.n
        300
    """
    current, reporter = Status(words, total, unit, done, bar), _reporter
    if reporter is None:
        yield current
        return
    reporter.push(current)
    try:
        yield current
    finally:
        reporter.pop(current)


@contextmanager
def phase(words: str) -> Iterator[None]:
    """A `status` that logs its duration at level DEBUG when it ends. The log file of a run contains this level."""
    begun = time.perf_counter()
    with status(words):
        yield
    log.debug("%s: %.1f s", words, time.perf_counter() - begun)


@contextmanager
def aside() -> Iterator[None]:
    """Removes the display inside the context, so that other output can be written, and restores it afterwards."""
    if _reporter is None:
        yield
        return
    with _reporter.aside():
        yield


def _is_first() -> bool:
    """Whether this is rank 0, by the environment, because torch may not be imported yet."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def _forget() -> None:
    global _reporter
    _reporter = None


# a forked process has no refresh thread and must not draw, and its copy of the lock may never be released
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
