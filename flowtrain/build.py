"""From a plain config to objects. The only place that calls what a config names, and decides what it may name."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import torch
from hydra.utils import instantiate
from torch import Tensor

from flowtrain.bijections.base import Chain
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.scale import Standardize
from flowtrain.checks import below_half
from flowtrain.data.base import Dataset, Samples
from flowtrain.errors import CheckpointError, ConfigError, FlowtrainError, first_line
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.regularizers import Regularizer
from flowtrain.solvers import Solver
from flowtrain.training import checkpoint
from flowtrain.training.settings import Settings

Config = Mapping[str, Any]

# the package that each config group draws from, when the config comes out of a file
PACKAGES = {
    "model": "models",
    "data": "data",
    "solver": "solvers",
    "objective": "objectives",
    "regularizer": "regularizers",
}

# arguments that recipes and solvers take besides the keys of their group
GIVEN = ("event_shape", "solver", "classes", "settings")


def build_data(config: Config) -> Dataset:
    """The data set that `config.data` names."""
    return cast(Dataset, _call(config, "data"))


def build_solver(config: Config) -> Solver:
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
    return cast(Objective, _call(config, "objective", **given, **_wanted(config, "objective", offered)))


def takes_teacher(config: Config) -> bool:
    """Whether the objective learns from a trained flow."""
    return bool(_wanted(config, "objective", {"teacher": None}))


def build_settings(config: Config) -> Settings:
    return cast(Settings, _checked_call(partial(Settings, **config["trainer"]), "trainer", {}))


def build_flow(config: Config, samples: Samples) -> Flow:
    """The model, with the solver and the classes where its recipe asks for them, and what prepares the samples for it.

    From the data to the base: a Logit for whole numbers in a known range, or a Standardize where asked; the model.
    """
    # built in any case, so that a mistake in it is not passed over
    offered = {"solver": build_solver(config), "classes": samples.classes}
    wanted = _wanted(config, "model", offered)
    flow = cast(Flow, _call(config, "model", event_shape=samples.event_shape, **wanted))
    if samples.standardized:
        flow.bijection = Chain([flow.bijection, Standardize(samples.event_shape)])
    if samples.levels is not None:
        flow.bijection = Chain([flow.bijection, Logit(samples.levels, samples.alpha)])
    flow.discrete, flow.levels = samples.discrete, samples.levels
    return flow


def load(path: str | Path, device: str = "cpu", trust: Sequence[str] = ()) -> Flow:
    """The flow of a checkpoint, in evaluation mode, with the averaged weights where EMA was on.

    Args:
        path: a run directory (its best checkpoint) or a .pt file.
        trust: packages besides flowtrain that the checkpoint's config may build from, such as ("mypkg",).

    Raises:
        CheckpointError: missing, damaged, or asking for code that is not trusted.
    """
    return restore(checkpoint.load(checkpoint.find(Path(path))), resolve_device(device), trust)


def restore(saved: Mapping[str, Any], device: torch.device, trust: Sequence[str] = ()) -> Flow:
    """The flow of a checkpoint that has been read; see `load`."""
    check_targets(saved["config"], trust)
    samples = samples_of(saved)
    # building draws initial weights; reading a checkpoint must not shift the caller's random numbers
    with torch.random.fork_rng(devices=[]):
        check_sizes(saved, samples)
        flow = build_flow(saved["config"], samples)
    try:
        flow.load_state_dict(saved["weights"])
        if saved.get("ema"):
            averaged = {k: v for k, v in saved["ema"].items() if k != "updates"}
            flow.load_state_dict(averaged, strict=False)
    except RuntimeError as e:
        first = " ".join(str(e).split())[:160]
        raise CheckpointError(f"the checkpoint's weights do not fit the model of its config ({first} ...)") from e
    return flow.to(device).eval()


# what a number in a checkpoint may be whatever its weights are, and how many elements a sample may have
SMALL_NUMBER, SMALL_SAMPLE = 1024, 2**24


def check_sizes(saved: Mapping[str, Any], samples: Samples) -> None:
    """Refuses a config that would build more than the checkpoint's weights fill, before any memory is asked for.

    No whole number in the model's config may exceed all the weights there are; and the model, sketched without memory
    (on torch's meta device), must have weights of their shapes.

    Raises:
        CheckpointError: the config is not that of the weights, or builds no flow at all.
    """
    weights = saved["weights"]
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    most = max(SMALL_NUMBER, sum(w.numel() for w in weights.values()))
    for where, value in _leaves({"model": saved["config"]["model"]}, ()):
        if isinstance(value, int) and abs(value) > most:
            raise CheckpointError(f"the checkpoint's {'.'.join(where)} is {value}, and its weights are {most} numbers")
    if math.prod(samples.event_shape) > max(SMALL_SAMPLE, most):
        raise CheckpointError(f"the checkpoint's samples would be of shape {samples.event_shape}")
    try:
        with torch.device("meta"):
            sketch = build_flow(saved["config"], samples)
    except FlowtrainError as e:
        raise CheckpointError(f"the checkpoint's config builds no flow: {e}") from e
    except NotImplementedError:
        # a user's own model that needs values to be built
        return
    except RuntimeError as e:
        if "meta tensors" in str(e):
            return
        raise CheckpointError(f"the checkpoint's config builds no flow: {first_line(e)[:200]}") from e
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError) as e:
        raise CheckpointError(f"the checkpoint's config builds no flow: {first_line(e)[:200]}") from e
    wrong = [name for name, w in sketch.state_dict().items() if not _fits(weights.get(name), w, samples)]
    wrong += [name for name in shapes if name not in sketch.state_dict()]
    averaged = {k: v for k, v in (saved.get("ema") or {}).items() if k != "updates"}
    wrong += [f"ema {k}" for k, v in averaged.items() if not _fits(v, sketch.state_dict().get(k), samples)]
    if wrong:
        raise CheckpointError(f"the checkpoint's weights do not fit the model of its config: {', '.join(wrong[:3])}")


def _fits(value: Any, sketch: Tensor | None, samples: Samples) -> bool:
    """Whether a tensor can take the place of one of the model's: of its shape and kind, and no index out of range."""
    if not isinstance(value, Tensor) or sketch is None or value.shape != sketch.shape:
        return False
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (value, sketch)]
    if kinds[0] != kinds[1]:
        return False
    # what is not a list of indices is a count, as of a batch norm's batches
    if value.is_floating_point() or value.dtype == torch.bool or not value.numel() or not value.dim():
        return True
    return int(value.min()) >= 0 and int(value.max()) < max(SMALL_NUMBER, math.prod(samples.event_shape))


def samples_of(saved: Mapping[str, Any]) -> Samples:
    """What a checkpoint says of the samples it was trained on.

    Raises:
        CheckpointError: a description that is not one.
    """
    event_shape = tuple(saved["event_shape"])
    if "samples" not in saved:
        # written before there were images
        data = saved["config"]["data"]
        return Samples(event_shape, bool(data.get("dequantize")), standardized=bool(data.get("standardize")))
    try:
        samples = Samples(**{**saved["samples"], "event_shape": event_shape})
        alpha = below_half("alpha", samples.alpha)
        counts = [v for v in (samples.levels, samples.classes) if v is not None]
        good = all(type(v) is int and v > 0 for v in counts) and all(isinstance(c, str) for c in samples.columns)
        good &= isinstance(samples.discrete, bool) and isinstance(samples.standardized, bool)
    except (TypeError, ConfigError):
        good = False
    if not good:
        raise CheckpointError(f"the checkpoint describes its samples as {saved['samples']}: not one of ours")
    return replace(samples, alpha=alpha)


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


def check_targets(config: Config, trust: Sequence[str] = ()) -> None:
    """Refuses a config read from a file that names anything outside flowtrain's own groups and `trust`.

    Raises:
        CheckpointError: a foreign `_target_`, or an interpolation.
    """
    if isinstance(trust, str):
        trust = [trust]
    for where, value in _leaves(config, ()):
        if isinstance(value, str) and "${" in value:
            raise CheckpointError(f"the checkpoint's config has an interpolation at {'.'.join(where)}: refused")
        if where[-1] != "_target_":
            continue
        roots = [f"flowtrain.{PACKAGES[where[0]]}"] if where[0] in PACKAGES else []
        roots += list(trust)
        if not _under(value, roots) or not _under(_home(value), roots):
            raise CheckpointError(
                f"the checkpoint's config would run {value} ({'.'.join(where)}); only {', '.join(roots) or 'nothing'} "
                "is trusted there. If it is your own package, name it: trust=[mypkg]"
            )


def _home(target: str) -> str | None:
    """The module in which the object of that name was defined: `flowtrain.models.x.torch.load` is torch's."""
    try:
        return getattr(resolve_name(target), "__module__", None)
    except Exception as e:  # importing by name can fail in any way
        raise CheckpointError(f"the checkpoint's config names {target}, which is not to be had here: {e}") from e


def _under(name: Any, roots: Sequence[str]) -> bool:
    return isinstance(name, str) and any(name == root or name.startswith(root + ".") for root in roots)


def _leaves(node: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*where, str(key)))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _leaves(value, (*where, str(i)))
    else:
        yield where, node


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
    return target


def _call(config: Config, group: str, **extra: Any) -> Any:
    """Calls the `_target_` of a group with the group's other keys (but `name`, a label) and `extra`."""
    target = _target(config, group)
    arguments = {k: v for k, v in config[group].items() if k != "name"}
    made = {**arguments, "_target_": target, "_partial_": True, "_convert_": "all"}
    _object(made["_target_"], group)
    return _checked_call(instantiate(made), group, extra)


def _checked_call(function: Any, group: str, arguments: dict[str, Any]) -> Any:
    """Calls, with an unknown or missing argument turned into a message that lists what there is."""
    original = getattr(function, "func", function)
    given = {**getattr(function, "keywords", {}), **arguments}
    known = inspect.signature(original).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [key for key in given if key not in known and not open_ended]
    missing = [k for k, p in known.items() if k not in given and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if unknown or missing:
        what = f"unknown key {', '.join(unknown)}" if unknown else f"missing key {', '.join(missing)}"
        names = [k for k in known if k not in (*arguments, *GIVEN)]
        raise ConfigError(f"{group}: {what}; {original.__name__} takes {', '.join(names)}")
    return function(**arguments)
