"""The command line of `flowtrain from=RUN`: the choices of model and data that the run makes."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from flowtrain.cli.config_files import options
from flowtrain.cli.output_files import is_path
from flowtrain.cli.overrides import keys_of
from flowtrain.runs.compose import TARGET_CHOICES
from flowtrain.training import checkpoint_files
from flowtrain.utils.errors import ConfigError

FROM_MESSAGE = "the new run has the model and data of from=RUN_DIR; leave this option out"


def with_choices_of_from(arguments: Sequence[str]) -> list[str]:
    """Adds to the arguments the model and data choices of the run that `from` names, with their defaults and recipes.

    Raises:
        ConfigError: other arguments choose another model or other data.
        CheckpointError: the run cannot be loaded.
    """
    places = [i for i, a in enumerate(arguments) if a.lstrip("+").startswith("from=")]
    if not places:
        return list(arguments)
    override = OverridesParser.create().parse_override(arguments[places[-1]])
    run = override.value()
    if run is None:
        return list(arguments)
    if not isinstance(run, str) or not run or override.is_sweep_override():
        raise ConfigError(f"{arguments[places[-1]]}: give one run directory")
    has_target = chooses_target(arguments)
    changed = [] if has_target else target_keys(arguments)
    fixed = ("model", "experiment", "recipe", *(() if has_target else ("data",)))
    refuse_changes(arguments, FROM_MESSAGE, fixed)
    path = checkpoint_files.find(Path(run.replace("\\${", "${")).expanduser())
    # imports torch
    from flowtrain.training import checkpoint

    saved = checkpoint.load(path)["config"]
    names = {group: saved[group].get("name") for group in ("model", "data")}
    if has_target:
        names = {"model": names["model"], "data": "target"}
    elif saved.get("target"):
        names["target"] = saved["target"].get("name")
    elif changed:
        raise ConfigError(
            f"{changed[0]}: the run of from= has no target to change; choose a target, as in target=funnel"
        )
    if names["data"] == "target":
        names |= {k: v for k, v in TARGET_CHOICES.items() if k == "objective" and k not in keys_of(arguments)}
    ours = [f"{group}={name}" for group, name in names.items() if name in options(group)]
    # the choices are inserted right before from=, because elsewhere they could separate a flag from its value
    return [*arguments[: places[-1]], *ours, *arguments[places[-1] :]]


def chooses_target(arguments: Sequence[str]) -> bool:
    """Returns whether a command line chooses a target by its name."""
    return any(a.lstrip("+").startswith("target=") for a in arguments)


def target_keys(arguments: Sequence[str]) -> list[str]:
    """Returns the keys of the target that a command line sets, such as target.dim."""
    return sorted(key for key in keys_of(arguments) if key.startswith("target."))


def keeps_target(arguments: Sequence[str]) -> bool:
    """Returns whether `with_choices_of_from` has added the target, so that the user has chosen none.

    The added choices precede `from=`, in the order model, data, target, objective. A target of the user is not among
    them.

    Example:
        >>> keeps_target(["data=target", "target=funnel", "objective=reverse_kl", "from=a"])
        True
        >>> keeps_target(["target=funnel", "model=nsf", "data=target", "objective=reverse_kl", "from=a"])
        False
    """
    before = list(arguments)[: next((i for i, a in enumerate(arguments) if a.lstrip("+").startswith("from=")), 0)]
    if before and before[-1].startswith("objective="):
        before.pop()
    return len(before) > 1 and before[-1].startswith("target=") and before[-2] == "data=target"


def refuse_changes(overrides: Sequence[str], why: str, groups: Sequence[str] = ("model", "data")) -> None:
    """Raises ConfigError for overrides of `groups`, except paths of data files."""
    for key in (a.lstrip("+~").partition("=")[0] for a in overrides):
        group, _, name = key.partition("@")[0].partition(".")
        if group in groups and not is_path(name):
            raise ConfigError(f"{key}: {why}")
