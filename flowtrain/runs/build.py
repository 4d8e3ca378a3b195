"""From a plain config to objects: the only place that calls what a config names."""

import inspect
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any, cast, get_args, get_type_hints

import torch

from flowtrain.bases import GaussianMixture
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.linear import FromGaussian, Preconditioned
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Dataset, Samples
from flowtrain.flow import Density, Flow
from flowtrain.models.described import TARGET
from flowtrain.objectives.base import Objective
from flowtrain.ode import Solver
from flowtrain.training.old_checkpoints import RENAMED
from flowtrain.training.settings import Settings
from flowtrain.utils.arguments import as_whole, choose
from flowtrain.utils.errors import ConfigError, first_line

Config = Mapping[str, Any]

# arguments that recipes and solvers take besides the keys of their group
GIVEN = ("event_shape", "solver", "classes")
# keys with a meaning of their own, as in hydra.utils.instantiate
RESERVED = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def build_data(config: Config, **tables: Any) -> Dataset:
    """The data set that `config.data` names.

    Args:
        tables: tables in memory, in the place of the paths in the config.
    """
    return cast(Dataset, _call(config, "data", **tables))


def build_solver(config: Config) -> Solver:
    """The ODE solver that `config.solver` names; a flow that solves no ODE has no use for it."""
    return cast(Solver, _call(config, "solver"))


def build_objective(config: Config, flow: Flow, teacher: Flow | None = None) -> Objective:
    """The objective, with the regularizer, and the run's steps, seed and teacher where it asks for them.

    Args:
        teacher: the flow of the run that this one begins from.

    Raises:
        ConfigError: a mistake in either group, or an objective that needs a teacher and has none.
    """
    # checkpoints of an older flowtrain have no regularizer
    regularizer = _call(config, "regularizer") if "regularizer" in config else Regularizer()
    if takes_teacher(config) and teacher is None:
        raise ConfigError(
            f"objective={config['objective'].get('name')} needs a trained flow: give its run, from=RUN_DIR"
        )
    offered = {"steps": config["trainer"]["steps"], "seed": config["seed"], "teacher": teacher}
    given = {"flow": flow, "regularizer": regularizer}
    objective = cast(Objective, _call(config, "objective", **given, **_wanted(config, "objective", offered)))
    known = inspect.signature(objective.forward).parameters.values()
    if not any(p.name == "options" or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in known):
        raise ConfigError(
            f"objective: {type(objective).__name__}.forward takes no options, the SolveOptions of a step; give it the "
            "argument options=AS_CONFIGURED, and pass it to flow.density_pass(x, label, options)"
        )
    return objective


def takes_teacher(config: Config) -> bool:
    """Whether the objective learns from a trained flow."""
    return bool(_wanted(config, "objective", {"teacher": None}))


def build_settings(config: Config) -> Settings:
    """What `config.trainer` says, checked."""
    return cast(Settings, _checked_call(partial(Settings, **config["trainer"]), "trainer", {}))


def build_flow(config: Config, samples: Samples) -> Flow:
    """The model, with the solver and the classes where its recipe asks for them, and what prepares the samples for it.

    From the data to the base, the flow consists of a Logit for integers in a known range, or a Standardize if the
    samples ask for it; the model; and a start at the Gaussian of the training rows if the samples ask for it. A flow
    that was built by hand and saved has all its parts in its description.

    Raises:
        ConfigError: a description of an ensemble, where a single flow is needed.
    """
    flow = build_density(config, samples)
    if not isinstance(flow, Flow):
        raise ConfigError(
            "model: this is an ensemble of flows, and a single flow is needed here; give one of its members"
        )
    return flow


def build_density(config: Config, samples: Samples) -> Density:
    """`build_flow`, or the ensemble that a description is of."""
    # built in any case, so that a mistake in it is not passed over
    offered = {"solver": build_solver(config), "classes": samples.classes}
    wanted = _wanted(config, "model", offered)
    found = cast(Density, _call(config, "model", event_shape=samples.event_shape, **wanted))
    kind = {key: getattr(samples, key) for key in ("integer_valued", "levels", "centered", "noisy", "class_counts")}
    if is_description(config["model"]) or not isinstance(found, Flow):
        return found.with_kind(**kind)
    return found.with_data(_prepared(found, samples), **kind)


def is_description(model: Config) -> bool:
    """Whether a model config describes a flow that was built by hand; see `flowtrain.runs.save`."""
    return bool(model.get("_target_") == TARGET)


def _prepared(flow: Flow, samples: Samples) -> Bijection:
    """The bijection of a model with what prepares the samples for it; see `build_flow`."""
    bijection = flow.bijection
    if samples.gaussian_start:
        d = math.prod(samples.event_shape)
        if flow.ode_blocks:
            bijection = Preconditioned(bijection, d)
        else:
            bijection = FromGaussian(bijection, d, diagonal=isinstance(flow.base, GaussianMixture))
    if samples.standardized or samples.centered:
        bijection = Chain([bijection, Standardize(samples.event_shape, samples.centered)])
    if samples.levels is not None:
        bijection = Chain([bijection, Logit(samples.levels, samples.alpha)])
    return bijection


def with_whole_numbers(config: Config, groups: Iterable[str]) -> dict[str, Any]:
    """Converts whole floats such as 1e4 to ints, for arguments that are annotated as int and not as float.

    Args:
        groups: the config groups to convert. `seed` and `threads` are always converted.
    """
    top = {key: as_whole(value) if key in ("seed", "threads") else value for key, value in config.items()}
    for group in groups:
        if isinstance(config.get(group), Mapping):
            kinds = _annotations(config, group)
            keys = {k: _with_kind(v, _kinds_in(kinds.get(k))) for k, v in config[group].items()}
            top[group] = keys
    return top


def _annotations(config: Config, group: str) -> dict[str, Any]:
    """The type annotations of what a group builds; empty if it cannot be found, which is reported later."""
    takers: list[Any] = [Solver.__init__] if group == "solver" else []
    try:
        takers.append(Settings if group == "trainer" else _object(_target(config, group), group))
        called = [getattr(f, "__init__") if isinstance(f, type) else f for f in takers]  # noqa: B009
        return {k: v for f in called for k, v in get_type_hints(f).items()}
    except Exception:  # annotations of a user's class can be anything
        return {}


def _kinds_in(annotation: Any) -> set[Any]:
    """The plain types in an annotation: int and NoneType for `Sequence[int] | None`."""
    inside = get_args(annotation)
    return set().union(*map(_kinds_in, inside)) if inside else {annotation}


def _with_kind(value: Any, kinds: set[Any]) -> Any:
    if int not in kinds or float in kinds:
        return value
    return [as_whole(item) for item in value] if isinstance(value, list) else as_whole(value)


def resolve_device(name: str) -> torch.device:
    """auto (a GPU where there is one) | cpu | cuda[:i].

    Raises:
        ConfigError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device={name}: choose auto, cpu, cuda or cuda:0")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; try device=auto")
    return torch.device(name)


def _wanted(config: Config, group: str, offered: Config) -> dict[str, Any]:
    """Those of the `offered` arguments that what a group names takes."""
    known = inspect.signature(_object(_target(config, group), group)).parameters
    return {key: value for key, value in offered.items() if key in known}


def _object(target: str, group: str) -> Any:
    """The class or function of that name."""
    try:
        found = resolve_name(target)
    except Exception as e:  # importing by name can fail in any way
        raise ConfigError(f"{group}: {target} is not to be had here: {first_line(e)}") from e
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{group}: {target} is no class or function that says what it takes ({e})") from e
    return found


def _target(config: Config, group: str) -> str:
    target = config[group].get("_target_") if isinstance(config.get(group), Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{group}: the config names no class to build (_target_)")
    return RENAMED.get(target, target)


def _call(config: Config, group: str, **extra: Any) -> Any:
    """Calls the `_target_` of a group with the group's other keys (but `name`, a label) and `extra`."""
    _target(config, group)
    return _checked_call(_function({k: v for k, v in config[group].items() if k != "name"}, group), group, extra)


def _built(value: Any, group: str) -> Any:
    """The value, with what its nested mappings name by `_target_` in their place."""
    if isinstance(value, list):
        return [_built(item, group) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "_target_" not in value:
        return {k: _built(v, group) for k, v in value.items()}
    function = _function(value, group)
    return function if value.get("_partial_") else _checked_call(function, group, {})


def _function(value: Mapping[str, Any], group: str) -> Any:
    """What `_target_` names, with the other keys as its arguments; those in the list `_args_` are positional."""
    target = str(value["_target_"])
    arguments = {k: _built(v, group) for k, v in value.items() if k not in RESERVED}
    return partial(_object(RENAMED.get(target, target), group), *_built(value.get("_args_", []), group), **arguments)


def _checked_call(function: Any, group: str, arguments: dict[str, Any]) -> Any:
    """Calls, with an unknown or missing argument turned into a message that lists what there is."""
    if getattr(function, "args", ()):
        return function(**arguments)
    original = getattr(function, "func", function)
    given = {**getattr(function, "keywords", {}), **arguments}
    known = inspect.signature(original).parameters
    named = {k: p for k, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [key for key in given if key not in known and not takes_any]
    missing = [k for k, p in named.items() if k not in given and p.default is p.empty]
    if unknown or missing:
        names = [k for k in named if k not in (*arguments, *GIVEN)]
        takes = f"{original.__name__} takes"
        if unknown:
            raise ConfigError(f"{group}: unknown key {', '.join(unknown)}; {choose(unknown[0], names, takes)}")
        raise ConfigError(f"{group}: missing key {', '.join(missing)}; {takes} {', '.join(names)}")
    return function(**arguments)
