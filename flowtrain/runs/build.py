"""Builds the objects of a run from its config. Only this module calls the classes that a config names."""

import inspect
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import Tensor

from flowtrain.bases import ConditionalMixture, GaussianMixture
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.linear import FromGaussian, Preconditioned
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.bijections.scale import Standardize
from flowtrain.data.base import Dataset, Samples
from flowtrain.data.context import feature_count
from flowtrain.data.targets.base import FunctionTarget, Target, TargetData
from flowtrain.data.types import circular_columns
from flowtrain.flow import Density, Flow
from flowtrain.models.described import TARGET
from flowtrain.models.support import support_of
from flowtrain.objectives.base import Objective
from flowtrain.objectives.flow_matching import COUPLINGS, FlowMatching
from flowtrain.ode import Solver
from flowtrain.training.old_checkpoints import RENAMED
from flowtrain.training.settings import Settings
from flowtrain.utils.arguments import as_whole, choose
from flowtrain.utils.errors import ConfigError, first_line

Config = Mapping[str, Any]

# arguments that are passed in addition to the keys of a group; messages do not list them
GIVEN = ("event_shape", "solver", "classes", "context", "circular", "earlier")
# attributes of a flow that describe its samples
OF_SAMPLES = ("integer_valued", "levels", "centered", "noisy", "class_counts", "types")
# keys that are not arguments, as in hydra.utils.instantiate
RESERVED = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def build_data(config: Config, earlier: Samples | None = None, **tables: Any) -> Dataset:
    """Builds the data set of a config. For data=target, it also builds the target.

    Args:
        earlier: the samples of an earlier training of the flow, which determine the categories of columns. None for a
            new flow.
        tables: tables in memory that replace the paths in the config.

    Raises:
        ConfigError: data=target is given without a target, or a target with other data.
    """
    needs_target = uses_target(config)
    if needs_target and not config.get("target"):
        raise ConfigError(
            "data=target needs a target: give its name, as in target=funnel, or your function, as in target=custom "
            "target._target_=mypkg.log_density target.dim=2"
        )
    if config.get("target") and not needs_target:
        raise ConfigError(
            f"target={config['target'].get('name')}: only possible with data=target; leave out one of data and target"
        )
    given = {} if earlier is None else _wanted(config, "data", {"earlier": earlier})
    if needs_target:
        given["target"] = build_target(config)
    return cast(Dataset, _call(config, "data", **tables, **given))


def uses_target(config: Config) -> bool:
    """Returns whether the data set of a config is a target."""
    return bool(_wanted(config, "data", {"target": None}))


def build_target(config: Config) -> Target:
    """Builds the target of a config from a class, or from a function log p~(x).

    For a function, a key that is not an argument of `FunctionTarget` is passed to the function. A class that is not a
    target makes the function, and these keys are passed to the class.

    Raises:
        ConfigError: an unknown or missing key.
    """
    if config["target"].get("_target_") is None:
        raise ConfigError(
            "target._target_ is missing: give your function, as in target._target_=mypkg.log_density target.dim=2"
        )
    function = _object(_target(config, "target"), "target")
    own = {name: p.default for name, p in inspect.signature(FunctionTarget).parameters.items() if name != "function"}
    parameters = inspect.signature(function).parameters
    if isinstance(function, type) and issubclass(function, Target):
        # keys of target=custom that have their default value, and that the class does not have
        unused = [k for k, default in own.items() if k not in parameters and config["target"].get(k) in (None, default)]
        kept = {k: v for k, v in config["target"].items() if k not in unused}
        return cast(Target, _call({**config, "target": kept}, "target"))
    is_class = isinstance(function, type)
    # the first argument of a function is x
    known = dict(list(parameters.items())[0 if is_class else 1 :])
    shared = [name for name in known if name in own]
    if shared:
        raise ConfigError(
            f"target: {config['target']['_target_']} has the argument {shared[0]}, which is also a key of targets, "
            "with another meaning; rename the argument"
        )
    settings = {k: _built(v, "target") for k, v in config["target"].items() if k not in (*RESERVED, "name")}
    rest = {key: value for key, value in settings.items() if key not in own}
    named = [k for k, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [key for key in rest if key not in named and not takes_any]
    if unknown:
        raise ConfigError(
            f"target: unknown key {', '.join(unknown)}; {choose(unknown[0], [*own, *named], 'the keys are')}"
        )
    missing = [k for k in named if k not in rest and known[k].default is inspect.Parameter.empty]
    if missing:
        raise ConfigError(
            f"target: {config['target']['_target_']} needs the argument {missing[0]}; give it with "
            f"+target.{missing[0]}=VALUE"
        )
    if settings.get("dim") is None:
        raise ConfigError("target.dim: give the number of columns of x")
    given = {key: value for key, value in settings.items() if key in own}
    if is_class:
        return FunctionTarget(function(**rest), **given)
    return FunctionTarget(partial(function, **rest) if rest else function, **given)


def build_solver(config: Config) -> Solver:
    """Builds the ODE solver. A flow that solves no ODE does not use the solver."""
    return cast(Solver, _call(config, "solver"))


def build_objective(config: Config, flow: Flow, teacher: Flow | None = None, data: Dataset | None = None) -> Objective:
    """Builds the objective with its regularizer.

    Steps, seed and teacher are passed if the constructor of the objective has these arguments.

    Args:
        teacher: the flow of the run `from`; None without such a run.
        data: the data set, from which contexts are drawn.

    Raises:
        ConfigError: an invalid key of the objective or the regularizer, or a missing teacher.
    """
    # checkpoints of older versions have no regularizer
    regularizer = _call(config, "regularizer") if "regularizer" in config else Regularizer()
    if takes_teacher(config) and teacher is None:
        raise ConfigError(
            f"objective={config['objective'].get('name')} needs a trained flow: give the run directory, from=RUN_DIR"
        )

    def contexts(n: int) -> Tensor | None:
        return None if data is None else data.context_share(0, n, config["seed"], slice(None))

    offered = {
        "steps": config["trainer"]["steps"],
        "batch_size": config["trainer"]["batch_size"],
        "seed": config["seed"],
        "teacher": teacher,
        "contexts": contexts,
        "target": data.target if isinstance(data, TargetData) else None,
    }
    if offered["target"] is None and _wanted(config, "objective", {"target": None}):
        raise ConfigError(
            f"objective={config['objective'].get('name')} needs a target instead of data: give data=target and "
            "a target, as in target=funnel"
        )
    given = {"flow": flow, "regularizer": regularizer}
    objective = cast(Objective, _call(config, "objective", **given, **_wanted(config, "objective", offered)))
    if isinstance(data, TargetData) and not objective.uses_target:
        raise ConfigError(
            f"objective={config['objective'].get('name')} needs samples, but data=target has none: use "
            "objective=reverse_kl or objective=weighted_forward_kl"
        )
    known = list(inspect.signature(objective.forward).parameters.values())
    if not any(p.name == "options" or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in known):
        raise ConfigError(
            f"objective: {type(objective).__name__}.forward has no argument for the SolveOptions of a step: add "
            "options=AS_CONFIGURED, and pass it to flow.density_pass(x, context, options)"
        )
    if data is not None and data.val_weights is not None and not any(p.name == "weights" for p in known):
        raise ConfigError(
            f"data.weights: {type(objective).__name__}.forward has no argument weights; use another objective, or omit "
            "data.weights"
        )
    if data is not None and data.val_weights is not None:
        check_weighted(objective)
    return objective


def check_weighted(objective: Objective) -> None:
    """Checks that an objective can be used with weights.

    Raises:
        ConfigError: optimal coupling. It would pair base points with rows regardless of their weights, and the base
            points of a region with large weights would not follow the base distribution.
    """
    for part in objective.modules():
        if isinstance(part, FlowMatching) and part.coupling is not COUPLINGS["independent"]:
            raise ConfigError(
                "objective.coupling=optimal is not possible with data.weights, because the pairing ignores the "
                "weights; use objective.coupling=independent"
            )


def takes_teacher(config: Config) -> bool:
    """Returns whether the objective learns from a trained flow."""
    return bool(_wanted(config, "objective", {"teacher": None}))


def build_settings(config: Config) -> Settings:
    """Builds and checks the settings of the trainer."""
    return cast(Settings, _checked_call(partial(Settings, **config["trainer"]), "trainer", {}))


def build_flow(config: Config, samples: Samples) -> Flow:
    """Builds the model with the bijections that preprocess the samples.

    Solver and classes are passed to the model if it has these arguments. From the data to the base, the flow consists
    of:

    - a Logit if the samples are integers in a known range (`samples.levels`)
    - a ToSupport if columns have types with bounds or are circular (`samples.types`)
    - a Standardize if `samples.standardized` or `samples.centered`
    - the bijection of the model
    - if `samples.gaussian_start`, a linear layer with which the flow starts at the Gaussian of the training rows; for
      continuous flows, it is on the data side of the model

    The description of a flow that was built by hand already contains all these parts.

    Raises:
        ConfigError: the config describes an ensemble.
    """
    flow = build_density(config, samples)
    if not isinstance(flow, Flow):
        raise ConfigError(
            "model: this is an ensemble of flows, but a single flow is needed here: give one of its members"
        )
    return flow


def build_density(config: Config, samples: Samples) -> Density:
    """Builds a flow as `build_flow` does, or an ensemble from its description."""
    # the solver is built even if the model does not use it, so that an invalid solver key is reported
    offered: dict[str, Any] = {"solver": build_solver(config), "classes": samples.classes}
    kind = {key: getattr(samples, key) for key in OF_SAMPLES}
    if samples.context:
        kind |= {"context": samples.context, "context_rows": samples.context_rows}
        if not is_description(config["model"]):
            offered |= {"classes": None, "context": feature_count(samples.context)}
    angles = circular_columns(samples.types)
    if angles and not is_description(config["model"]):
        offered["circular"] = angles
    wanted = _wanted(config, "model", offered)
    if "circular" in offered and "circular" not in wanted:
        names = [samples.columns[i] if samples.columns else str(i) for i in angles]
        raise ConfigError(
            f"data.types: model={config['model'].get('name')} cannot have circular columns ({', '.join(names)}); use "
            "model=nsf, maf or ffjord"
        )
    if samples.context and offered.get("context") and "context" not in wanted:
        raise ConfigError(
            f"data.context: model={config['model'].get('name')} cannot be conditional; use a model with the argument "
            "context, such as nsf, maf, realnvp, ffjord, affine or mixture"
        )
    found = cast(Density, _call(config, "model", event_shape=samples.event_shape, **wanted))
    if is_description(config["model"]) or not isinstance(found, Flow):
        return found.with_kind(**kind)
    return found.with_data(_prepared(found, samples), **kind)


def is_description(model: Config) -> bool:
    """Returns whether a model config describes a flow that was built by hand; see `flowtrain.runs.save`."""
    return bool(model.get("_target_") == TARGET)


def _prepared(flow: Flow, samples: Samples) -> Bijection:
    """Returns the bijection of a model, extended by the preprocessing of the samples; see `build_flow`."""
    bijection, circular = flow.bijection, flow.base.circular
    d = math.prod(samples.event_shape)
    # the Gaussian applies to the other columns only
    if samples.gaussian_start and len(circular) < d:
        if flow.ode_blocks:
            bijection = Preconditioned(bijection, d, circular)
        else:
            diagonal = isinstance(flow.base, GaussianMixture | ConditionalMixture)
            bijection = FromGaussian(bijection, d, diagonal, circular)
    if samples.standardized or samples.centered:
        bijection = Chain([bijection, Standardize(samples.event_shape, samples.centered, circular)])
    if samples.levels is not None:
        bijection = Chain([bijection, Logit(samples.levels, samples.alpha)])
    support = support_of(samples.types)
    if support is not None:
        bijection = Chain([bijection, support])
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
    """Returns the type annotations of a group's class or function; empty if it cannot be imported (reported later)."""
    takers: list[Any] = [Solver.__init__] if group == "solver" else []
    try:
        takers.append(Settings if group == "trainer" else _object(_target(config, group), group))
        called = [getattr(f, "__init__") if isinstance(f, type) else f for f in takers]  # noqa: B009
        return {k: v for f in called for k, v in get_type_hints(f).items()}
    except Exception:  # annotations of a user's class can be anything
        return {}


def _kinds_in(annotation: Any) -> set[Any]:
    """Returns the plain types in an annotation: int and NoneType for `Sequence[int] | None`."""
    inside = get_args(annotation)
    return set().union(*map(_kinds_in, inside)) if inside else {annotation}


def _with_kind(value: Any, kinds: set[Any]) -> Any:
    if int not in kinds or float in kinds:
        return value
    return [as_whole(item) for item in value] if isinstance(value, list) else as_whole(value)


def resolve_device(name: str) -> torch.device:
    """Returns the device for a name: auto (a GPU if there is one) | cpu | cuda[:i].

    Raises:
        ConfigError: this machine does not have the device.
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
    """Returns the `offered` arguments that the class or function of a group accepts."""
    known = inspect.signature(_object(_target(config, group), group)).parameters
    return {key: value for key, value in offered.items() if key in known}


def _object(target: str, group: str) -> Any:
    """Imports a class or function by its name."""
    try:
        found = resolve_name(target)
    except Exception as e:  # importing by name can raise any exception
        root = target.partition(".")[0]
        is_missing = isinstance(e, ModuleNotFoundError) and e.name == root
        advice = f". Install it, or if it is in the working directory, give trust=[{root}]" if is_missing else ""
        raise ConfigError(f"{group}: {target} cannot be imported here: {first_line(e)}{advice}") from e
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{group}: {target} is not a class or function with a signature ({e})") from e
    return found


def _target(config: Config, group: str) -> str:
    target = config[group].get("_target_") if isinstance(config.get(group), Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{group}: the config has no _target_, the class to build")
    return RENAMED.get(target, target)


def _call(config: Config, group: str, **extra: Any) -> Any:
    """Calls the `_target_` of a group with the group's other keys, except the label `name`, and `extra`."""
    _target(config, group)
    return _checked_call(_function({k: v for k, v in config[group].items() if k != "name"}, group), group, extra)


def _built(value: Any, group: str) -> Any:
    """Returns the value with each nested mapping that has a `_target_` replaced by the object that it describes."""
    if isinstance(value, list):
        return [_built(item, group) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "_target_" not in value:
        return {k: _built(v, group) for k, v in value.items()}
    function = _function(value, group)
    return function if value.get("_partial_") else _checked_call(function, group, {})


def _function(value: Mapping[str, Any], group: str) -> Any:
    """Returns the class or function of `_target_` with its arguments bound. The items of `_args_` are positional."""
    target = str(value["_target_"])
    arguments = {k: _built(v, group) for k, v in value.items() if k not in RESERVED}
    return partial(_object(RENAMED.get(target, target), group), *_built(value.get("_args_", []), group), **arguments)


def _checked_call(function: Any, group: str, arguments: dict[str, Any]) -> Any:
    """Calls a function of a group.

    Raises:
        ConfigError: an unknown or missing argument. The message lists the valid arguments.
    """
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
        lead = f"the keys of {original.__name__} are"
        if unknown:
            raise ConfigError(f"{group}: unknown key {', '.join(unknown)}; {choose(unknown[0], names, lead)}")
        raise ConfigError(f"{group}: missing key {', '.join(missing)}; {lead} {', '.join(names)}")
    return function(**arguments)
