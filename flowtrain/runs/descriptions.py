"""Describes flows that were built by hand.

A description is a config: nested mappings with `_target_`, the path of a class, and the arguments of its constructor.
`flowtrain.runs.build` builds the flow from its description.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pkgutil import resolve_name
from typing import Any, TypeVar, get_args, get_type_hints

from torch import Tensor, nn

from flowtrain import bases, bijections, ode
from flowtrain import nn as nn_parts
from flowtrain.flow import Flow
from flowtrain.models.ensemble import Ensemble
from flowtrain.nn import TraceRule
from flowtrain.ode import Solver, Tableau, ode_solver
from flowtrain.ode.runge_kutta import RungeKutta
from flowtrain.ode.tableaus import TABLEAUS
from flowtrain.utils.errors import CheckpointError
from flowtrain.utils.recorded import Part, Recorded, Unknown, arguments_of

ODE_SOLVER = "flowtrain.ode.ode_solver"
# named as text, because the module is imported only when it is needed
TORCHDIFFEQ = "flowtrain.ode.torchdiffeq_engine.Torchdiffeq"
# the base classes of all parts; flows, bases and bijections are modules
KINDS = (nn.Module, Solver, TraceRule, Tableau)
# the classes of flowtrain that a description may contain, by their public names. Saved files depend on these names
PARTS: dict[str, type] = {
    "flowtrain.Flow": Flow,
    "flowtrain.Ensemble": Ensemble,
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (bases, bijections, nn_parts, ode)
        for name in module.__all__
        if isinstance(getattr(module, name), type) and issubclass(getattr(module, name), KINDS)
    },
}
PUBLIC_NAMES = {part: name for name, part in PARTS.items()}
# the modules of torch that a description may contain
TORCH_MODULES: dict[str, type[nn.Module]] = {
    f"torch.nn.{kind.__name__}": kind
    for kind in (
        nn.AvgPool2d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.Conv1d,
        nn.Conv2d,
        nn.Dropout,
        nn.Dropout2d,
        nn.ELU,
        nn.Flatten,
        nn.GELU,
        nn.GroupNorm,
        nn.Hardswish,
        nn.Identity,
        nn.LayerNorm,
        nn.LeakyReLU,
        nn.Linear,
        nn.MaxPool2d,
        nn.Mish,
        nn.ModuleList,
        nn.PReLU,
        nn.ReLU,
        nn.SELU,
        nn.Sequential,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
        nn.Unflatten,
    )
}
TORCH_CONTAINERS = {"torch.nn.ModuleList": "modules", "torch.nn.Sequential": "_args_"}
# arguments of `Flow` that a checkpoint stores with its samples
OF_SAMPLES = ("integer_valued", "levels", "centered", "noisy", "class_counts", "types")


def describe(part: Any, where: str = "flow") -> Any:
    """Describes a part of a flow by plain values, tensors, and a mapping with `_target_` for each object.

    Args:
        where: the place of the part, for messages.

    Raises:
        CheckpointError: an object that cannot be described.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, Tensor):
        return part.detach().cpu().clone()
    if isinstance(part, list | tuple):
        items = [describe(item, f"{where}[{i}]") for i, item in enumerate(part)]
        # a tuple that contains objects becomes a list, because `build` does not build objects inside tuples
        return items if isinstance(part, list) or any(isinstance(i, dict) for i in items) else tuple(items)
    if type(part) is dict:
        return {str(key): describe(item, f"{where}[{key!r}]") for key, item in part.items()}
    if isinstance(part, Solver):
        return {key: value for key, value in describe_solver(part, where).items() if key != "name"}
    if type(part) in (TraceRule, Tableau):
        return {"_target_": path_of(part, where), **{f.name: getattr(part, f.name) for f in fields(part)}}
    if type(part) in TORCH_MODULES.values():
        return _torch_module(part, where)
    if isinstance(part, Recorded):
        return _recorded(part, where)
    what = part.kind if isinstance(part, Unknown) else f"a {type(part).__module__}.{type(part).__qualname__}"
    advice = ""
    if isinstance(part, nn.Module):
        advice = ". A module of your own can be saved if its class derives from flowtrain.nn.Recorded and nn.Module"
    raise CheckpointError(f"the flow cannot be saved: {where} is {what}, which cannot be stored in a file{advice}")


def _recorded(part: Recorded, where: str) -> dict[str, Any]:
    positional, keywords = arguments_of(part)
    if type(part) is Flow:
        # the present parts, because both may have been replaced, and the base may have been given as an event shape
        positional, keywords = (), {"base": part.base, "bijection": part.bijection, "classes": part.classes}
    elif isinstance(part, Flow):
        keywords = {key: value for key, value in keywords.items() if key not in OF_SAMPLES}
    # the present solver, because it may have been replaced even if it was not an argument
    names = inspect.signature(type(part).__init__).parameters
    keywords = keywords | {k: Part(k) for k in names if isinstance(vars(part).get(k), Solver)}
    found: dict[str, Any] = {"_target_": path_of(part, where)}
    if positional:
        found["_args_"] = [describe(_present(part, v), f"{where}({i})") for i, v in enumerate(positional)]
    return found | {key: describe(_present(part, v), f"{where}.{key}") for key, v in keywords.items()}


def _present(owner: Recorded, value: Any) -> Any:
    """Returns the present value of an argument: each `Part` in it is replaced by the attribute of the owner."""
    if isinstance(value, Part):
        try:
            return value.of(owner)
        except AttributeError:
            return Unknown(f"missing: {type(owner).__name__} no longer has {value.path}")
    if isinstance(value, list | tuple):
        items = [_present(owner, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return {k: _present(owner, v) for k, v in value.items()} if isinstance(value, dict) else value


def _torch_module(module: nn.Module, where: str) -> dict[str, Any]:
    target = f"torch.nn.{type(module).__name__}"
    if target in TORCH_CONTAINERS:
        names = [name for name, _ in module.named_children()]
        if names != [str(i) for i in range(len(names))]:
            raise CheckpointError(
                f"the flow cannot be saved: {where} is a Sequential with named modules: build it without names"
            )
        items = [describe(item, f"{where}[{i}]") for i, item in enumerate(module.children())]
        return {"_target_": target, TORCH_CONTAINERS[target]: items}
    found: dict[str, Any] = {"_target_": target}
    for name in _torch_arguments(type(module)):
        value = getattr(module, name)
        found[name] = value is not None if name == "bias" else describe(value, f"{where}.{name}")
    return found


def _torch_arguments(kind: type[nn.Module]) -> list[str]:
    """Returns the names of the constructor arguments of a torch module, which are also its attributes."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in named if name not in ("device", "dtype")]


def describe_solver(solver: Solver, where: str = "solver") -> dict[str, Any]:
    """Describes a solver with its present settings, as a config of the group `solver`."""
    settings = {"name": solver.method, "_target_": ODE_SOLVER, **solver.settings, "steps": None}
    if type(solver) is RungeKutta:
        ours = TABLEAUS.get(solver.method) == solver.tableau
        return settings if ours else settings | {"tableau": describe(solver.tableau, f"{where}.tableau")}
    if type(ode_solver(**solver.settings)) is type(solver):
        return settings
    # further arguments of the class are read from attributes of the same names
    settings |= {"_target_": path_of(solver, where)}
    known = inspect.signature(type(solver).__init__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        settings = {key: value for key, value in settings.items() if key in (*known, "_target_")}
    more = [name for name in known if name not in settings and name in vars(solver)]
    return settings | {name: describe(getattr(solver, name), f"{where}.{name}") for name in more}


def path_of(part: Any, where: str) -> str:
    """Returns the import path of the class of an object.

    Raises:
        CheckpointError: the class cannot be imported by its name.
    """
    kind = type(part)
    if kind in PUBLIC_NAMES:
        return PUBLIC_NAMES[kind]
    path = f"{kind.__module__}.{kind.__qualname__}"
    try:
        found = None if kind.__module__ == "__main__" else resolve_name(path)
    except Exception:  # importing by name can raise any exception
        found = None
    if found is not kind:
        raise CheckpointError(
            f"the flow cannot be saved: {where} is of the class {path}, which other processes cannot import. Move the "
            'class to the top level of a module, such as mypkg.py, and load the file with trust=("mypkg",)'
        )
    return path


def check_description(node: Any, trust: Sequence[str], where: str) -> None:
    """Checks that a description from a file builds only parts of flows.

    It may build parts of flowtrain, some modules of torch, and classes of the packages in `trust`. An object is allowed
    only for an argument that is annotated with such a type. Elsewhere, it could allocate memory without limit.

    Raises:
        CheckpointError: the description contains another class, or an argument that is not allowed.
    """
    if isinstance(node, list | tuple):
        for i, item in enumerate(node):
            check_description(item, trust, f"{where}.{i}")
    elif isinstance(node, Mapping):
        if "_target_" in node:
            _check_object(node, trust, where)
        for key, item in node.items():
            check_description(item, trust, f"{where}.{key}")


def _check_object(node: Mapping[str, Any], trust: Sequence[str], where: str) -> None:
    target = node["_target_"]
    if isinstance(target, str) and under(target, trust) and under(home_of(target), trust):
        return
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    objects = [key for key, value in arguments.items() if _has_objects(value)]
    if isinstance(target, str) and target in TORCH_MODULES:
        inside = TORCH_CONTAINERS.get(target)
        good = set(arguments) <= {inside} if inside else set(arguments) <= {*_torch_arguments(TORCH_MODULES[target])}
        good &= inside is not None or not objects
    else:
        found = _part_of_ours(target)
        taken = {} if found is None else _taken(found)
        good = found is not None and all(taken.get(key, False) for key in objects)
        # _args_ and _partial_ are not allowed
        good &= not any(key.startswith("_") for key in map(str, arguments))
    if not good:
        raise CheckpointError(
            f"the checkpoint's config would run {target} ({where}._target_), but only parts of flows with valid "
            "arguments are trusted there. If it is your own package, name it: trust=[mypkg]"
        )


def _part_of_ours(target: Any) -> Any:
    """Returns the class of flowtrain, or `ode_solver`, for a `_target_`; None if a description may not contain it."""
    if target == ODE_SOLVER:
        return ode_solver
    if target == TORCHDIFFEQ:
        return resolve_name(TORCHDIFFEQ)
    return PARTS.get(target) if isinstance(target, str) else None


def _taken(function: Any) -> dict[str, bool]:
    """Returns for each argument whether it may be an object that a description builds."""
    hints = get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    return {name: any(issubclass(k, KINDS) for k in _classes_in(hint)) for name, hint in hints.items()}


def _classes_in(annotation: Any) -> list[type]:
    if isinstance(annotation, TypeVar):
        annotation = annotation.__bound__
    inside = [kind for item in get_args(annotation) for kind in _classes_in(item)]
    return [*inside, annotation] if isinstance(annotation, type) and not inside else inside


def _has_objects(node: Any) -> bool:
    if isinstance(node, Mapping):
        return "_target_" in node or any(map(_has_objects, node.values()))
    return isinstance(node, list | tuple) and any(map(_has_objects, node))


def home_of(target: str) -> str | None:
    """Returns the module that defines the object with a dotted name: `torch` for `flowtrain.models.x.torch.load`."""
    try:
        return getattr(resolve_name(target), "__module__", None)
    except Exception as e:  # importing by name can raise any exception
        raise CheckpointError(f"the checkpoint's config names {target}, which cannot be imported here: {e}") from e


def under(name: Any, roots: Sequence[str]) -> bool:
    """Returns whether a dotted name is one of the roots or begins with a root and a dot."""
    return isinstance(name, str) and any(name == root or name.startswith(root + ".") for root in roots)
