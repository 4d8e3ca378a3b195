"""A base class whose objects record their constructor arguments, from which a saved flow is built again."""

import inspect
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

ARGUMENTS = "_constructor_arguments"


@dataclass(frozen=True)
class Part:
    """An argument that the object stores in an attribute, recorded by the name of the attribute.

    The attribute is read when the flow is saved, because it may be replaced after construction.

    Attributes:
        path: the dotted name of the attribute.
        listed: whether the argument was a list, which the object stores as a `ModuleList`.
    """

    path: str
    listed: bool = False

    def of(self, owner: Any) -> Any:
        """Returns the current value of the attribute."""
        for name in self.path.split("."):
            owner = getattr(owner, name)
        return list(owner) if self.listed else owner


@dataclass(frozen=True)
class Unknown:
    """An argument that cannot be written to a file.

    Attributes:
        kind: a description of the argument for messages.
    """

    kind: str


class _RecordingMeta(ABCMeta):
    # hidden from type checkers, which read the signature of `__init__`
    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            if isinstance(made, cls):
                vars(made)[ARGUMENTS] = _bound(made, args, kwargs)
            return made

        @property
        def __signature__(cls) -> inspect.Signature:
            """The signature of `__init__`, for `help` and `inspect.signature`."""
            of_init = inspect.signature(cls.__init__)
            return of_init.replace(parameters=list(of_init.parameters.values())[1:])


class Recorded(metaclass=_RecordingMeta):
    """Base class of objects that record their constructor arguments. Copies and pickles keep the record.

    `Flow.save` writes these arguments. All bijections, fields, conditioners and bases derive from this class. Derive
    your own networks from it too, so that flows with them can be saved. If an argument is a module, store it as a
    submodule.

    Example:
        >>> class Net(Recorded, nn.Module):
        ...     def __init__(self, width, depth=2):
        ...         super().__init__()
        >>> arguments_of(Net(3))
        ((), {'width': 3})
    """


def arguments_of(made: Recorded) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of the constructor.

    A module or a solver is returned as a `Part`, and a value that cannot be written to a file as an `Unknown`.
    """
    found: tuple[tuple[Any, ...], dict[str, Any]] = vars(made).get(ARGUMENTS, ((), {}))
    return found


def _bound(made: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not args and not kwargs:
        return (), {}
    parameters = list(inspect.signature(type(made).__init__).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    # without *args, all arguments have names
    positional = args if len(args) > len(named) or any(p.kind is p.POSITIONAL_ONLY for p in parameters) else ()
    keywords = {**({} if positional else dict(zip(named, args, strict=False))), **kwargs}
    return tuple(_kept(made, "", v) for v in positional), {k: _kept(made, k, v) for k, v in keywords.items()}


def _kept(made: Any, name: str, value: Any) -> Any:
    """Returns the record of an argument: a plain value, a `Part` if the object stores the argument, or `Unknown`."""
    if value is None or isinstance(value, str | Tensor):
        return value
    if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        return value.item() if isinstance(value, np.generic) else value
    own = getattr(made, name, None) if name else None
    if isinstance(own, nn.ModuleList) and isinstance(value, list | tuple | Iterator):
        return Part(name, listed=True)
    if isinstance(value, nn.Module):
        paths = [name] if own is value else [path for path, m in made.named_modules() if m is value and path]
        return Part(paths[0]) if paths else Unknown(f"a {type(value).__name__} that is not stored as a submodule")
    if isinstance(value, list | tuple):
        items = [_kept(made, "", item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {k: _kept(made, "", v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return Unknown("a NumPy array instead of a tensor or a list")
    attributes = [k for k, v in vars(made).items() if v is value]
    return Part(attributes[0]) if attributes else Unknown(f"a {type(value).__name__}")
