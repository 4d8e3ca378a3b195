"""A checkpoint as the commands that score and sample open it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowtrain.build import resolve_device
from flowtrain.cli.files import absolute_paths, run_dir_of
from flowtrain.cli.overrides import check_kept, overridden, trusted, with_array
from flowtrain.data.base import Samples
from flowtrain.errors import ConfigError
from flowtrain.flow import Flow
from flowtrain.loading import restore, samples_of
from flowtrain.process import prepare_process
from flowtrain.titles import title_of
from flowtrain.training import checkpoint
from flowtrain.trust import check_targets

# the parts of a saved config that scoring and sampling read
USED = ("model", "data", "solver", "threads")


class Opened(NamedTuple):
    """A checkpoint file, its flow and step, its samples, and its config with the overrides of the command line."""

    path: Path
    flow: Flow
    step: int
    samples: Samples
    config: dict[str, Any]
    changed: bool

    def titled(self, words: str) -> str:
        """The title of a picture: the run, its NLL on the test set where result.json has that, and words."""
        nll = "" if self.changed else reached(self.path, self.step)
        return ", ".join(filter(None, (title_of(self.config), nll, words)))


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


def open_checkpoint(own: Mapping[str, Any], overrides: Sequence[str]) -> Opened:
    """What the keys `ckpt`, `device` and `trust` and the overrides mean, checked before anything is built.

    Raises:
        ConfigError: no `ckpt`, or an unknown key.
        CheckpointError: missing, damaged, or asking for code that is not trusted.
    """
    if not own["ckpt"]:
        raise ConfigError("ckpt=RUN_DIR_OR_FILE is needed; see --help")
    path = checkpoint.find(Path(str(own["ckpt"])))
    saved = checkpoint.load(path)
    trust = trusted(own["trust"])
    check_targets(saved["config"], trust)
    check_kept(overrides)
    overrides = with_array(saved["config"], overrides)
    config = absolute_paths(overridden(saved["config"], overrides, tuple(own), USED))
    # how the flow is preprocessed belongs to the data it was trained on, whatever it now meets
    trained_on = {**config, "data": saved["config"]["data"]}
    flow = restore({**saved, "config": trained_on}, resolve_device(own["device"]), trust)
    prepare_process(config, flow.event_shape)
    return Opened(path, flow, saved["step"], samples_of(saved), config, bool(overrides))
