"""Loads a checkpoint for `floweval`, `flowsample` and `flowexport`."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from flowtrain.cli.output_files import absolute_paths, run_dir_of
from flowtrain.cli.overrides import check_kept, keys_of, overridden, trusted, with_array
from flowtrain.data.base import Dataset, Samples
from flowtrain.flow import Flow
from flowtrain.runs.build import build_data, build_solver, resolve_device
from flowtrain.runs.console import name_of, title_of, without_warnings
from flowtrain.runs.load import check_targets, restore, samples_of
from flowtrain.training import checkpoint
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.process import choose_threads, keep_freed_memory
from flowtrain.utils.status import status

# the parts of a saved config that scoring and sampling read
USED = ("model", "data", "solver", "threads")


class LoadedRun(NamedTuple):
    """A checkpoint file, its flow and step, its samples, and its config with the overrides of the command line.

    Attributes:
        changed: whether there are overrides.
        own_data: the config of the data that the flow was trained on.
    """

    path: Path
    flow: Flow
    step: int
    samples: Samples
    config: dict[str, Any]
    changed: bool
    own_data: dict[str, Any]

    def titled(self, words: str) -> str:
        """The title of a picture: the run, its NLL on the test set where result.json has that, and words."""
        nll = "" if self.changed else reached(self.path, self.step)
        return ", ".join(filter(None, (title_of(self.config), nll, words)))

    def build(self, data: Mapping[str, Any] | None = None) -> Dataset:
        """Builds the data set of this config, or of another config of data.

        Warnings about the data that the flow was trained on are suppressed, because training has already given them.

        Raises:
            DataError: a flow that was saved from Python knows no data, and the command line names none.
        """
        data = self.config["data"] if data is None else data
        if "_target_" not in data:
            raise DataError(
                f"{self.path} was saved from Python and does not say what data it was trained on: give data.path=FILE, "
                "or data by name such as data=moons"
            )
        with without_warnings() if data == self.own_data else nullcontext():
            return build_data({**self.config, "data": data})


def reached(path: Path, step: int) -> str:
    """What result.json says of a checkpoint file of that step, as "test NLL 2.396 +- 0.007 nats"; else nothing.

    Example:
        >>> reached(Path("nowhere/checkpoints/best.pt"), 600)
        ''
    """
    try:
        result = json.loads((run_dir_of(path) / "result.json").read_text())
        same = path.name == "best.pt" and result["step"] == step
        return f"test {result['headline'].partition(' (')[0]}" if same else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # no more than a word is lost with it
        return ""


def load_run(own: Mapping[str, Any], overrides: Sequence[str]) -> LoadedRun:
    """What the keys `ckpt`, `device` and `trust` and the overrides mean, checked before anything is built.

    Raises:
        ConfigError: no `ckpt`, or an unknown key.
        CheckpointError: missing, damaged, or asking for code that is not trusted.
    """
    if not own["ckpt"]:
        raise ConfigError("ckpt=RUN_DIR_OR_FILE is needed; see --help")
    path = checkpoint.find(Path(str(own["ckpt"])))
    with status("reading the checkpoint"):
        saved = checkpoint.load(path)
    trust = trusted(own["trust"])
    check_targets(saved["config"], trust)
    check_kept(overrides)
    overrides = with_array(saved["config"], overrides)
    config = absolute_paths(overridden(saved["config"], overrides, tuple(own), USED))
    if overrides:
        # a mistake in the overrides must not be reported as a damaged checkpoint
        build_solver(config)
    # how the flow is preprocessed belongs to the data it was trained on, whatever it now meets
    trained_on = {**config, "data": saved["config"]["data"]}
    with status("building the model"):
        flow = restore({**saved, "config": trained_on}, resolve_device(own["device"]), trust)
    choose_threads(config.get("threads"), flow.event_shape)
    keep_freed_memory()
    own_data = absolute_paths({"data": saved["config"]["data"]})["data"]
    return LoadedRun(path, flow, saved["step"], samples_of(saved), config, bool(overrides), own_data)


def set_name(loaded_run: LoadedRun, split: str, overrides: Sequence[str]) -> str:
    """A name for the evaluated set, used in file names; empty for the run's own test set.

    With split=all, it is the stem of the data.path in the overrides, or "all". Otherwise, it joins what differs from
    the run's data and the split: "val", "circles" or "new-test".
    """
    data = loaded_run.config["data"]
    if split == "all":
        return stem_of(data["path"]) if "data.path" in keys_of(overrides) and data.get("path") else "all"
    before = loaded_run.own_data
    changed = {key: value for key, value in data.items() if key not in before or before[key] != value}
    if not changed:
        words = []
    elif "path" in changed or "_target_" in changed:
        words = [stem_of(data["path"]) if data.get("path") else name_of(data)]
    elif f"{split}_path" in changed:
        words = [stem_of(changed[f"{split}_path"])]
    else:
        words = [re.sub(r"[^\w.+]+", "-", f"{key}={value}").strip("-") for key, value in sorted(changed.items())]
    if split != "test" or "path" in changed:
        words.append(split)
    return "-".join(words)[:100]


def stem_of(path: Any) -> str:
    """The name of a file without its suffix. The suffix is kept if the stem is the name of a split.

    Example:
        >>> stem_of("some/where/new.csv"), stem_of("plain.csv.gz"), stem_of("gas/val.csv")
        ('new', 'plain', 'val.csv')
    """
    name = Path(str(path)).name
    stem = Path(name.removesuffix(".gz")).stem
    return name if stem in ("all", "val") else stem
