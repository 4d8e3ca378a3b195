"""Loads a checkpoint, or the checkpoints of an ensemble, for `floweval`, `flowsample` and `flowexport`."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from flowtrain.cli.output_files import absolute_paths, paths_of, run_dir_of
from flowtrain.cli.overrides import keys_of, trusted
from flowtrain.cli.saved_config import check_kept, overridden, with_array
from flowtrain.data.base import Dataset, Samples
from flowtrain.flow import Density, Flow
from flowtrain.plotting.options import PlotOptions
from flowtrain.runs.build import build_data, build_solver, resolve_device, uses_target
from flowtrain.runs.console import name_of, shortest, title_of, without_warnings
from flowtrain.runs.ensembles import Run, ensemble_of, runs_of
from flowtrain.runs.load import check_targets, restore, samples_of
from flowtrain.runs.search import best_candidate
from flowtrain.training import checkpoint, checkpoint_files
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.formatting import option
from flowtrain.utils.process import choose_threads, keep_freed_memory
from flowtrain.utils.status import status

# the keys of a saved config that scoring and sampling read
USED = ("model", "data", "solver", "target", "threads", "plots")


class LoadedRun(NamedTuple):
    """A loaded run: the path of the checkpoint, its flow, its step, its samples, and its config with the overrides.

    For an ensemble, `path` is a directory, and the config and the samples are from the first member.

    Attributes:
        changed: whether there are overrides that can change the numbers, which are all but `plots` and `data.id`.
        own_data: the config of the data that the flow was trained on.
        own_target: the config of the target that the flow was trained on, or None.
        members: the files of an ensemble.
        tag: for runs that are given as a list, the part of the names of output files that identifies them; else empty.
        built: the data set of `own_data`, if it is already built.
    """

    path: Path
    flow: Density
    step: int
    samples: Samples
    config: dict[str, Any]
    changed: bool
    own_data: dict[str, Any]
    own_target: dict[str, Any] | None = None
    members: tuple[Path, ...] = ()
    tag: str = ""
    built: Dataset | None = None

    def titled(self, words: str) -> str:
        """Returns the title of a figure: the run, its step, its test NLL if result.json contains it, and `words`."""
        nll = "" if self.changed else known_test_nll(self.path, self.step)
        step = "" if self.members else f"step {self.step:,}"
        return ", ".join(filter(None, (title_of(self.config), step, nll, words)))

    @property
    def plot_options(self) -> PlotOptions:
        """The options of the figures.

        Raises:
            ConfigError: an option that is not valid, or columns that the flow does not have.
        """
        options = PlotOptions.of(self.config)
        options.positions(self.flow.event_shape, self.samples.columns)
        return options

    @property
    def run_dir(self) -> Path:
        """The default directory for the files that a command writes."""
        return self.path if self.path.is_dir() else run_dir_of(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The checkpoint files."""
        return self.members or (self.path,)

    @property
    def inputs(self) -> list[Any]:
        """The files that a command must not overwrite: the checkpoints, and the files of the data and of the target."""
        groups = (self.config["data"], self.own_data, self.config.get("target"), self.own_target)
        return [*self.files, *(path for group in groups for path in paths_of(group or {}))]

    def single_flow(self, what: str, command: str) -> Flow:
        """Returns the flow, or raises ConfigError for an ensemble.

        Args:
            what: the task that needs a single flow, for the message.
            command: the command of that task, with {} in place of ckpt=RUN.

        Raises:
            ConfigError: the checkpoints are an ensemble. For a search, the message has the command for the best
                candidate.
        """
        if isinstance(self.flow, Flow):
            return self.flow
        best = best_candidate(self.run_dir)
        which = "give one of its members"
        if best is not None:
            which = f"for its best candidate: {command.format(option('ckpt', shortest(best)))}"
        raise ConfigError(f"{what} needs a single flow, and {self.path} is an ensemble; {which}")

    @property
    def data_is_target(self) -> bool:
        """Whether the data set of the config is a target, and not samples."""
        return "_target_" in self.config["data"] and uses_target(self.config)

    def build(self, data: Mapping[str, Any] | None = None) -> Dataset:
        """Builds the data set of `data`, or of the config of this run. The target comes from the config.

        Warnings about the data that the flow was trained on are suppressed, because training has already given them.

        Raises:
            DataError: neither the file, which was saved from Python, nor the command line names the data.
        """
        data = self.config["data"] if data is None else data
        target = self.config.get("target")
        if self.built is not None and data == self.own_data and target == self.own_target:
            return self.built
        if "_target_" not in data:
            raise DataError(
                f"{self.path} was saved from Python and does not say what data it was trained on: give data.path=FILE, "
                "or data by name such as data=moons"
            )
        config = {**self.config, "data": data}
        if target == self.own_target and not uses_target(config):
            # the flow was trained on a target, and now scores samples
            config["target"] = None
        with without_warnings() if same_data(data, self.own_data) else nullcontext():
            return build_data(config, self.samples)


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two data configs give the same sets. The column of ids is not compared."""
    return without_id(one) == without_id(other)


def without_id(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a data config without the key `id`."""
    return {key: value for key, value in data.items() if key != "id"}


def known_test_nll(path: Path, step: int) -> str:
    """Returns the test NLL in result.json, as "test NLL 2.396 +- 0.007 nats".

    The text is empty if result.json belongs to another checkpoint file or step.

    Example:
        >>> known_test_nll(Path("nowhere/checkpoints/best.pt"), 600)
        ''
    """
    try:
        result = json.loads((run_dir_of(path) / "result.json").read_text())
        same = path.name == "best.pt" and result["step"] == step
        # a run on a target has no test set
        which = "" if "log_z" in result else "test "
        return f"{which}{result['headline'].partition(' (')[0]}" if same else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # the title of a figure then has no NLL
        return ""


def load_run(own: Mapping[str, Any], overrides: Sequence[str]) -> LoadedRun:
    """Loads the checkpoints that `ckpt` names, with the overrides. Everything is checked before anything is built.

    Overrides apply to every member of an ensemble.

    Raises:
        ConfigError: `ckpt` is missing, or a key is unknown.
        CheckpointError: a checkpoint is missing or damaged, or needs code that is not trusted, or the data of
            members differ.
        DataError: the validation rows, which determine the weights of an ensemble, are missing or have changed.
    """
    given, weights = own["ckpt"], own.get("weights")
    if not given:
        raise ConfigError("ckpt=RUN_DIR_OR_FILE is needed; see --help")
    trust = trusted(own["trust"])
    check_kept(overrides)
    runs = runs_of([str(each) for each in given] if isinstance(given, list) else str(given))
    if runs is None:
        if weights is not None:
            raise ConfigError(f"weights: {given} is a single run; give a sweep directory or a list of runs")
        return _load_one(Path(str(given)), own, overrides, trust)
    members = [_load_one(run, own, overrides, trust) for run in runs]
    one = members[0]
    is_list = isinstance(given, list)
    path = Path(os.path.commonpath([run.absolute() for run in runs])) if is_list else Path(str(given)).expanduser()
    found = one._replace(
        path=path,
        members=tuple(member.path for member in members),
        step=max(member.step for member in members),
        tag="+".join(run.name for run in runs)[:60] if is_list else "",
        config={**one.config, "model": {"name": f"ensemble of {len(members)}"}},
    )
    parts = [
        Run(str(run), member.flow, {"data": member.own_data, "target": member.own_target}, member.samples, member.step)
        for run, member in zip(runs, members, strict=True)
    ]
    data: list[Dataset] = []

    def build() -> Dataset:
        own = found._replace(config={**found.config, "target": found.own_target})
        data.append(own.build(found.own_data))
        return data[0]

    flow = ensemble_of(parts, weights, build)
    choose_threads(found.config.get("threads"), flow.event_shape)
    return found._replace(flow=flow, built=data[0] if data else None)


def _load_one(path: Path, own: Mapping[str, Any], overrides: Sequence[str], trust: Sequence[str]) -> LoadedRun:
    path = checkpoint_files.find(path)
    with status("reading the checkpoint"):
        saved = checkpoint.load(path)
    check_targets(saved["config"], trust)
    overrides = with_array(saved["config"], overrides)
    config = absolute_paths(overridden(saved["config"], overrides, tuple(own), USED))
    if overrides:
        # a mistake in the overrides must not be reported as a damaged checkpoint
        build_solver(config)
    # the flow keeps the preprocessing of the data that it was trained on, also for other data
    trained_on = {**config, "data": saved["config"]["data"]}
    with status("building the model"):
        flow = restore({**saved, "config": trained_on}, resolve_device(own["device"]), trust)
    choose_threads(config.get("threads"), flow.event_shape)
    keep_freed_memory()
    own = absolute_paths({"data": saved["config"]["data"], "target": saved["config"].get("target")})
    changed = any(not key.startswith("plots.") and key != "data.id" for key in keys_of(overrides))
    samples = samples_of(saved)
    return LoadedRun(path, flow, saved["step"], samples, config, changed, own["data"], own["target"])


def set_name(loaded_run: LoadedRun, split: str, overrides: Sequence[str]) -> str:
    """Returns a name for the evaluated set, for file names. It is empty for the test set that a run was trained with.

    The name begins with the `tag` of runs that were given as a list. With split=all, the rest is the stem of data.path
    in the overrides, or "all". Otherwise, the rest consists of the changes of the data and of the split, such as "val",
    "circles" or "new-test".
    """
    return "-".join(filter(None, (loaded_run.tag, _set_name(loaded_run, split, overrides))))


def _set_name(loaded_run: LoadedRun, split: str, overrides: Sequence[str]) -> str:
    data = loaded_run.config["data"]
    if split == "all":
        return stem_of(data["path"]) if "data.path" in keys_of(overrides) and data.get("path") else "all"
    before = loaded_run.own_data
    changed = {key: value for key, value in without_id(data).items() if key not in before or before[key] != value}
    if not changed:
        words = []
    elif "path" in changed or "_target_" in changed:
        words = [stem_of(data["path"]) if data.get("path") else name_of(data)]
    elif f"{split}_path" in changed:
        words = [stem_of(changed[f"{split}_path"])]
    else:
        words = changed_words(changed)
    if split != "test" or "path" in changed:
        words.append(split)
    if loaded_run.data_is_target and loaded_run.config["target"] != loaded_run.own_target:
        words += changed_target_words(loaded_run.config["target"], loaded_run.own_target or {})
    return "-".join(words)[:100]


def changed_target_words(target: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Returns parts of a file name for a changed target: its name, or if it has the same name, its changed keys."""
    if target.get("name") != before.get("name"):
        return [name_of(target)]
    return changed_words({key: value for key, value in target.items() if key not in before or before[key] != value})


def changed_words(changed: Mapping[str, Any]) -> list[str]:
    """Returns changed keys with their values as parts of a file name."""
    return [re.sub(r"[^\w.+]+", "-", f"{key}={value}").strip("-") for key, value in sorted(changed.items())]


def stem_of(path: Any) -> str:
    """Returns the name of a file without its suffix. The suffix is kept if the stem is the name of a split.

    Example:
        >>> stem_of("some/where/new.csv"), stem_of("plain.csv.gz"), stem_of("gas/val.csv")
        ('new', 'plain', 'val.csv')
    """
    name = Path(str(path)).name
    stem = Path(name.removesuffix(".gz")).stem
    return name if stem in ("all", "val") else stem
