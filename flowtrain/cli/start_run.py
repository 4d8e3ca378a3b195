"""Starts or resumes a run in its directory, and removes the files of a refused command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain.cli.config_files import config_dirs, plain
from flowtrain.cli.from_run import chooses_target, keeps_target, refuse_changes, target_keys
from flowtrain.cli.output_files import absolute_paths, is_path
from flowtrain.cli.overrides import check_known_keys, keys_of, rename_old_config_keys, trusted
from flowtrain.cli.saved_config import overridden, without_unused_key
from flowtrain.runs.build import is_description, with_whole_numbers
from flowtrain.runs.compose import applied_recipes
from flowtrain.runs.console import messages
from flowtrain.runs.load import check_targets
from flowtrain.runs.run import train
from flowtrain.runs.run_directory import (
    claim_directory,
    cleaned_up_unless_begun,
    locked_directory,
    remove_empty,
)
from flowtrain.runs.search import SEARCH, best_candidate, config_of_search
from flowtrain.training import checkpoint, checkpoint_files
from flowtrain.utils import ranks
from flowtrain.utils.errors import CheckpointError, ConfigError, FlowtrainError
from flowtrain.utils.files import config_groups
from flowtrain.utils.formatting import option
from flowtrain.utils.process import keep_freed_memory
from flowtrain.utils.status import command_begun, status

# errors after which the files of a run that never began are removed. After any other error they are kept for a report
REFUSAL_ERRORS = (FlowtrainError, HydraException, OmegaConfBaseException, OSError, KeyboardInterrupt, MemoryError)
# the directories that Hydra creates for this command, innermost first
_CREATED: list[Path] = []


class DirectoryRecorder(Callback):
    """A callback of Hydra that records the directory of a run or a sweep before Hydra creates the directory."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        record_directory(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        record_directory(Path(str(config.hydra.sweep.dir)))


def record_directory(folder: Path) -> None:
    """Records which of a directory and its parents do not exist yet."""
    folder = folder.absolute()
    _CREATED[:] = [path for path in (folder, *folder.parents) if not path.exists()]


def is_created_here(folder: Path) -> bool:
    """Whether this command creates `folder`, one of the directories recorded by `record_directory`."""
    return folder.absolute() in _CREATED


@contextmanager
def removing_empty_directories() -> Iterator[None]:
    """Removes the empty directories that the command has created, on exit or after an error."""
    _CREATED.clear()
    try:
        yield
    finally:
        remove_empty(_CREATED)


def start_run(config: DictConfig, run_dir: Path) -> tuple[float, int]:
    """Starts a run with a config of Hydra. Returns the best validation NLL and the exit code, see `train`."""
    when = command_begun()
    with locked_directory(run_dir):
        if ranks.is_first():
            claim_directory(run_dir)
            # the path is saved after the claim. Otherwise a restarted process could continue the run of another command
            ranks.save_run_dir(run_dir)
        cleanup = cleaned_up_unless_begun(run_dir, REFUSAL_ERRORS, is_created_here(run_dir))
        with cleanup if ranks.is_first() else nullcontext():
            overrides = HydraConfig.get().overrides.task
            whole = rename_old_config_keys(check_known_keys(plain(config)), overrides)
            whole = with_config_of_from(whole, overrides)
            if whole["resume"] is not None:
                raise ConfigError(f"resume={whole['resume']}: give resume= without + and without -m")
            trust = trusted(whole["trust"])
            whole = with_whole_numbers(whole, config_groups())
            if ranks.is_first():
                write_hydra(run_dir, OmegaConf.create(whole))
            del whole["trust"], whole["name"]
            recipes = applied_recipes(HydraConfig.get().runtime.choices, whole, config_dirs())
            keep_freed_memory()
            with messages(run_dir / "flowtrain.log"):
                ended = train(absolute_paths(whole), run_dir, trust=trust, begun=when, recipes=recipes)
                return ended.best, ended.code


def resume_run(
    run_dir: Path, trust: Sequence[str] = (), rest: Sequence[str] = (), own: Sequence[str] = ()
) -> tuple[float, int]:
    """Continues a run from its last checkpoint. Returns the same as `start_run`.

    Args:
        rest: overrides of the config of the run.
        own: the options of the command, for messages.

    Raises:
        CheckpointError: the last checkpoint is missing or damaged, is not from a run, or needs untrusted code.
        ConfigError: overrides of the model, the data, `name` or `from`, unknown overrides, or a missing device.
        InUseError: another process is using the run directory.
        FlowtrainError: an error of training or evaluation, see `train`.
    """
    when = command_begun()
    with locked_directory(run_dir), messages(run_dir / "flowtrain.log"):
        config_before = config_of_search(run_dir)
        with status("reading the checkpoint"):
            # the directory of a search that has just begun contains only the checkpoints of the candidates
            has_own = config_before is None or checkpoint_files.has_checkpoint(run_dir)
            saved = checkpoint.load(checkpoint_files.find(run_dir, prefer="last")) if has_own else {}
        if config_before is not None or SEARCH in saved:
            saved["config"] = config_before or saved[SEARCH]
        elif "optimizer" not in saved:
            raise CheckpointError(f"{run_dir}/checkpoints/last.pt contains no training state, so it cannot be resumed")
        check_targets(saved["config"], trust)
        refuse_changes(rest, "a resumed run keeps its model and data; start a new run to change them")
        refuse_changes(rest, "a resumed run continues from its own checkpoint; leave this option out", ("from",))
        refuse_changes(rest, "a resumed run keeps its directory; leave this option out", ("name",))
        config = absolute_paths(overridden(saved["config"], rest, own))
        keep_freed_memory()
        ended = train(config, run_dir, saved, trust, when, recipes_of(run_dir))
        return ended.best, ended.code


def recipes_of(run_dir: Path) -> dict[str, list[str]] | None:
    """Returns the recipes that applied when a run began, with the keys that each recipe set.

    Returns None if .hydra cannot be read.
    """
    try:
        composed = plain(cast(DictConfig, OmegaConf.load(run_dir / ".hydra/config.yaml")))
        choices = plain(cast(DictConfig, OmegaConf.load(run_dir / ".hydra/hydra.yaml")).hydra.runtime.choices)
    except Exception:  # a user may have changed or removed the files
        return None
    return applied_recipes(choices, composed, config_dirs())


def with_config_of_from(config: dict[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Returns the config of a run. With `from`, the model and the data are replaced by those in the named run.

    Args:
        given: the overrides of the command line. They may contain new paths of the data files.

    Raises:
        CheckpointError: the other run cannot be loaded, or needs code that is not trusted.
    """
    if config["from"] is None:
        return config
    path = checkpoint_files.find(Path(str(config["from"])).expanduser().absolute())
    content = checkpoint.load(path)
    saved = content["config"]
    check_targets(saved, trusted(config["trust"]))
    if SEARCH in content and is_description(saved["model"]):
        best = best_candidate(path.parent.parent)
        known = "" if best is None else f", such as {option('from', best)}"
        raise ConfigError(f"from={path} is the ensemble of a search; give one of its candidates{known}")
    if is_description(saved["model"]):
        raise ConfigError(
            f"from={path}: this flow was saved from Python and does not say what data it was trained on; train it "
            "further from Python"
        )
    if chooses_target(given) and not keeps_target(given):
        # the new target replaces the data of the first run
        return {**config, "from": str(path), "model": saved["model"]}
    keys = keys_of(given)
    target = {}
    if saved.get("target"):
        changed = {key.removeprefix("target.") for key in target_keys(given)}
        target["target"] = saved["target"] | {k: v for k, v in config["target"].items() if k in changed}
    moved = {key: value for key, value in config["data"].items() if is_path(key) and f"data.{key}" in keys}
    data = without_unused_key({**saved["data"], **moved}) if "path" in moved else saved["data"] | moved
    return {**config, "from": str(path), "model": saved["model"], "data": data, **target}


def write_hydra(run_dir: Path, config: DictConfig) -> None:
    """Writes the .hydra folder in the format of Hydra."""
    folder = run_dir / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    full = HydraConfig.instance().cfg
    OmegaConf.save(config, folder / "config.yaml")
    OmegaConf.save(full, folder / "hydra.yaml")
    OmegaConf.save(HydraConfig.get().overrides.task, folder / "overrides.yaml")
