"""Lists that code further down adds to while someone further up asks for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Collector(Generic[T]):
    """Inside `with collector() as found:` code below appends to `collector.open`, which is `found`.

    Outside it is None, and nothing is collected.
    """

    def __init__(self, name: str) -> None:
        self._found: ContextVar[list[T] | None] = ContextVar(name, default=None)

    @property
    def open(self) -> list[T] | None:
        """What the innermost `with` has found so far, to be added to; None outside of any."""
        return self._found.get()

    @contextmanager
    def __call__(self) -> Iterator[list[T]]:
        found: list[T] = []
        token = self._found.set(found)
        try:
            yield found
        finally:
            self._found.reset(token)
