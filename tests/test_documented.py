"""Every public module, class, function and method of flowtrain has a docstring.

A method that overrides a documented one needs none: its contract stands in the base class. torch's own bases do not
count, because what they say of `forward` is no contract.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import flowtrain

MODULES = ["flowtrain", *(found.name for found in pkgutil.walk_packages(flowtrain.__path__, "flowtrain."))]


def lacking(module: ModuleType) -> list[str]:
    """The names in a module that lack a docstring, its own name among them."""
    own = [] if module.__doc__ else [module.__name__]
    return own + [name for name, thing, base in public(module) if not documented(thing) and not base]


def public(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    """(name, class or function, whether it overrides a documented one) of all that a module defines."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield name, thing, False
            for part, member in vars(thing).items():
                if not part.startswith("_") and (method := method_of(member)) is not None:
                    yield f"{name}.{part}", method, overrides(thing, part)
        elif inspect.isroutine(inspect.unwrap(thing)):
            yield name, thing, False


def method_of(member: Any) -> Any:
    """What of a class's attribute carries a docstring: the function of a method or of a property; else None."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    return member if inspect.isfunction(member) or hasattr(member, "attrname") else None


def overrides(kind: type, name: str) -> bool:
    """Whether a base class, other than torch's, has a documented method of that name."""
    bases = (base for base in kind.__mro__[1:] if base.__module__.partition(".")[0] not in ("torch", "builtins"))
    return any(name in vars(base) and documented(method_of(vars(base)[name])) for base in bases)


def documented(thing: Any) -> bool:
    """Whether it has a docstring, other than the signature that a dataclass or a named tuple gives itself."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    return bool(text) and not text.startswith(f"{thing.__name__}(")


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name: str) -> None:
    assert lacking(importlib.import_module(name)) == []


BARE = '''
from dataclasses import dataclass
from functools import cached_property

from torch import nn


class Base:
    """A contract."""

    def kept(self):
        """Documented here."""

    def bare(self): ...


class Heir(Base):
    """An heir."""

    def kept(self): ...

    def bare(self): ...

    def _hidden(self): ...

    def __len__(self): ...

    @property
    def seen(self): ...

    @cached_property
    def remembered(self): ...

    @staticmethod
    def alone(): ...


@dataclass
class Plain:
    x: int


class Net(nn.Module):
    """A network."""

    def forward(self, x): ...


def function(): ...
'''


def test_what_lacks_a_docstring_is_found() -> None:
    """The rule itself: what it asks for, and what it lets pass."""
    module = ModuleType("bare")
    exec(BARE, vars(module))
    assert lacking(module) == [
        "bare",
        "Base.bare",
        "Heir.bare",
        "Heir.seen",
        "Heir.remembered",
        "Heir.alone",
        "Plain",
        "Net.forward",
        "function",
    ]
