"""Applies overrides to the config of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain.cli.config_files import compose_defaults, plain
from flowtrain.cli.error_messages import unknown_key
from flowtrain.cli.overrides import check_option, keys_of
from flowtrain.data.tables.table_reader import takes_key
from flowtrain.plotting.options import DEFAULTS as PLOTS
from flowtrain.runs.build import is_description, with_whole_numbers
from flowtrain.training.tensorboard import DEFAULT
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_groups

# pairs of keys for the same setting. If one is set, the other is reset
SAME_SETTING = {"solver.steps": "solver.step_size", "solver.step_size": "solver.steps"}


def overridden(
    saved: Mapping[str, Any], overrides: Sequence[str], own: Sequence[str] = (), used: Sequence[str] = ()
) -> dict[str, Any]:
    """Applies overrides to a saved config: GROUP=NAME replaces the group by a config file, KEY=VALUE sets a key.

    Args:
        own: the options of the command, for the message.
        used: the groups and keys of the config that the command reads; empty: all. Other keys are refused.

    Raises:
        ConfigError: an unknown or unused key, or another model.
    """
    # configs of earlier versions lack these keys
    solver, logger = saved["solver"], saved.get("logger", list(DEFAULT))
    plots = {**PLOTS, **saved.get("plots", {})}
    # the description of a model has no keys to override, and OmegaConf does not accept its tensors
    described = {"model": {"name": saved["model"].get("name")}} if is_description(saved["model"]) else {}
    config = OmegaConf.create(
        {
            "time_budget": None,
            **saved,
            **described,
            "solver": {**solver, "steps": solver.get("steps")},
            "logger": logger,
            "plots": plots,
        }
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
            raise ConfigError(f"{group}: not used by this command; give {', '.join(own)}, or keys of {', '.join(used)}")
        if group in config_groups():
            if group in ("model", "experiment", "recipe"):
                raise ConfigError(
                    f"{group}={override.value()}: the checkpoint already contains the model; leave this option out"
                )
            check_option(override)
            config[group] = compose_defaults([f"{group}={override.value()}"])[group]
    for override in parsed:
        key = override.key_or_group
        if key in config_groups():
            continue
        # a key with + may be new, but its group must exist
        needed = key if not override.is_add() or "." not in key else key.partition(".")[0]
        if not _has_key(config, needed):
            raise ConfigError(unknown_key(key, {**dict.fromkeys(own), **plain(config)}))
        OmegaConf.update(config, key, override.value(), force_add=override.is_add())
        if key in SAME_SETTING and SAME_SETTING[key] not in [other.key_or_group for other in parsed]:
            OmegaConf.update(config, SAME_SETTING[key], None)
    found = plain(config) | ({"model": saved["model"]} if described else {})
    keys = [override.key_or_group for override in parsed]
    if "data.path" in keys and "data.key" not in keys:
        found["data"] = without_unused_key(found["data"])
    groups = {key.partition(".")[0] for key in keys}
    return with_whole_numbers(found, groups & {*config_groups()})


def _has_key(config: DictConfig, key: str) -> bool:
    try:
        return OmegaConf.select(config, key, default=_has_key) is not _has_key
    except OmegaConfBaseException:
        # a part of the key names an entry of a list
        return False


def without_unused_key(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data config, with `key` set to null if `path` names a file with a single table."""
    unused = data.get("key") is not None and not takes_key(Path(str(data.get("path"))))
    return {**data, "key": None} if unused else dict(data)


# the keys of a saved model that may be changed, and the keys of its data that may not be changed
MODEL_KEYS = ("eval_trace", "noise", "noise_samples")
TRAINED_KEYS = ("data.alpha", "data.standardize", "data.gaussian_start")


def check_kept(overrides: Sequence[str]) -> None:
    """Refuses overrides of keys that the weights depend on. Another value of such a key would change the density."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key.startswith("model.") and key.removeprefix("model.") not in MODEL_KEYS:
            free = ", ".join(f"model.{name}" for name in MODEL_KEYS)
            raise ConfigError(f"{key}: the model of a checkpoint is fixed; only {free} can be changed")
        if key in TRAINED_KEYS:
            raise ConfigError(f"{key}: a checkpoint keeps the value that it was trained with; leave this option out")


def with_array(saved: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Adds data=array if only data.path is given and the flow was trained on data without a path."""
    keys = keys_of(overrides)
    if "data.path" in keys and "data" not in keys and "path" not in saved["data"]:
        return ["data=array", *overrides]
    return list(overrides)
