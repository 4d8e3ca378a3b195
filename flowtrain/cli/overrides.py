"""Applies overrides in Hydra's grammar to a saved config."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from flowtrain.build import with_whole_numbers
from flowtrain.cli.folders import look_here
from flowtrain.cli.grammar import check_option
from flowtrain.cli.messages import compose_defaults, plain, unknown_key
from flowtrain.errors import ConfigError
from flowtrain.paths import config_groups
from flowtrain.training.tensorboard import DEFAULT


def trusted(value: Any) -> list[str]:
    """The packages that `trust` names, which are then looked for in the working directory too.

    Raises:
        ConfigError: a value that is not a name or a list of names, or a name without a package.
    """
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"trust={value}: give names of packages, as in trust=[mypkg]")
    if names:
        look_here()
    for name in names:
        if not _is_package(name):
            raise ConfigError(f"trust={name}: no package or module of that name was found")
    return names


def _is_package(name: str) -> bool:
    """Whether Python would find the package. Does not import it."""
    try:
        return find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def overridden(
    saved: Mapping[str, Any], overrides: Sequence[str], own: Sequence[str] = (), used: Sequence[str] = ()
) -> dict[str, Any]:
    """A saved config with overrides: GROUP=NAME takes the group anew from the configs, KEY=VALUE sets a key.

    Args:
        own: the command's own keys, for the message.
        used: the keys of the config that the command reads; empty for all. Others are refused, not passed over.

    Raises:
        ConfigError: an unknown or unused key, or another model, which would not fit the weights.
    """
    # an older flowtrain did not have these keys
    solver, logger = saved["solver"], saved.get("logger", list(DEFAULT))
    config = OmegaConf.create(
        {"time_budget": None, **saved, "solver": {**solver, "steps": solver.get("steps")}, "logger": logger}
    )
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        group = override.key_or_group
        top = group.partition(".")[0]
        if override.is_delete():
            raise ConfigError(f"{override.input_line}: a key of a saved config cannot be removed; give it a value")
        if override.package is not None:
            raise ConfigError(f"{override.input_line}: the groups of a saved config cannot be moved; leave out @")
        if override.is_sweep_override():
            raise ConfigError(f"{group}: several values make a sweep, which only flowtrain -m can run; give one")
        if used and top in config and top not in used:
            raise ConfigError(f"{group}: has no use here; give {', '.join(own)}, or keys of {', '.join(used)}")
        if group in config_groups():
            if group in ("model", "experiment", "recipe"):
                raise ConfigError(f"{group}={override.value()}: the checkpoint has its own model; leave it out")
            check_option(override)
            config[group] = compose_defaults([f"{group}={override.value()}"])[group]
    for override in parsed:
        key = override.key_or_group
        if key in config_groups():
            continue
        # a key with + may be new, but its group must exist
        needed = key if not override.is_add() or "." not in key else key.partition(".")[0]
        if OmegaConf.select(config, needed, default=overridden) is overridden:
            raise ConfigError(unknown_key(key, {**dict.fromkeys(own), **plain(config)}))
        OmegaConf.update(config, key, override.value(), force_add=override.is_add())
        if key in SAME and SAME[key] not in [other.key_or_group for other in parsed]:
            OmegaConf.update(config, SAME[key], None)
    found = plain(config)
    keys = [override.key_or_group for override in parsed]
    if "data.path" in keys and "data.key" not in keys:
        found["data"] = less_key(found["data"])
    groups = {key.partition(".")[0] for key in keys}
    return with_whole_numbers(found, groups & {*config_groups()})


def less_key(data: Mapping[str, Any]) -> dict[str, Any]:
    """Sets data.key to null if data.path no longer names an .npz file."""
    is_archive = str(data.get("path")).lower().endswith(".npz")
    return {**data, "key": None} if data.get("key") is not None and not is_archive else dict(data)


# two keys for one thing: to set one takes the other back
SAME = {"solver.steps": "solver.step_size", "solver.step_size": "solver.steps"}


# what may be changed of a saved model, and what may not of its data
MODEL = ("eval_trace", "noise", "noise_samples")
TRAINED = ("data.alpha", "data.standardize", "data.gaussian_start")


def check_kept(overrides: Sequence[str]) -> None:
    """Refuses to change what the weights were trained with: they would be scored as those of another density."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key.startswith("model.") and key.removeprefix("model.") not in MODEL:
            free = ", ".join(f"model.{name}" for name in MODEL)
            raise ConfigError(f"{key}: the checkpoint has its own model, of which {free} can be changed; leave it out")
        if key in TRAINED:
            raise ConfigError(f"{key}: the checkpoint keeps what it was trained with; leave it out")


def keys_of(overrides: Sequence[str]) -> set[str]:
    """What KEY=VALUE overrides set."""
    return {a.lstrip("+").partition("=")[0] for a in overrides}


def with_array(saved: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """With data=array where only its path was given, and the flow was trained on data that have none."""
    keys = keys_of(overrides)
    if "data.path" in keys and "data" not in keys and "path" not in saved["data"]:
        return ["data=array", *overrides]
    return list(overrides)
