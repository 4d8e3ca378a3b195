"""`floweval`: the NLL of a checkpoint on held-out data."""

import sys
from pathlib import Path
from typing import Any

from flowtrain import build
from flowtrain.cli.common import overridden, run_command, split_own
from flowtrain.cli.train import absolute_paths
from flowtrain.errors import ConfigError
from flowtrain.evaluation import BATCH, evaluate
from flowtrain.run import messages, set_threads, write_json
from flowtrain.training import checkpoint

USAGE = """floweval ckpt=RUN_DIR_OR_FILE [split=test] [out=FILE] [KEY=VALUE ...]

  ckpt         a run directory (its best checkpoint) or a .pt file
  split        test (default) or val
  out          where the JSON goes; default: eval.json in the run directory
  device       auto (default), cpu, cuda or cuda:0
  batch_size   rows scored at a time
  trust        packages besides flowtrain that the checkpoint may build from: trust=[mypkg]

Any key of the run's config can be changed, as in solver.rtol=1e-7, solver=tsit5, data=circles,
model.eval_trace=hutchinson."""


def main() -> None:
    with messages():
        run_command("floweval", _command)


def _command() -> int:
    own: dict[str, Any] = {
        "ckpt": None,
        "split": "test",
        "out": None,
        "device": "auto",
        "batch_size": BATCH,
        "trust": [],
    }
    own, overrides = split_own(sys.argv[1:], own, USAGE)
    if own["ckpt"] is None:
        raise ConfigError("ckpt=RUN_DIR_OR_FILE is needed; see floweval --help")
    batch_size = own["batch_size"]
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: give a whole number, at least 1")
    path = checkpoint.find(Path(str(own["ckpt"])))
    saved = checkpoint.load(path)
    build.check_targets(saved["config"], own["trust"])
    config = overridden(saved["config"], overrides, tuple(own))
    data = build.build_data(absolute_paths(config))
    set_threads(config, data.event_shape)
    # how the flow is preprocessed belongs to the data it was trained on, whatever it is now scored on
    own_data = {**config, "data": saved["config"]["data"]}
    flow = build.restore({**saved, "config": own_data}, build.resolve_device(own["device"]), own["trust"])
    result = evaluate(flow, data, str(own["split"]), saved["step"], batch_size)
    out = Path(str(own["out"])) if own["out"] else run_dir_of(path) / "eval.json"
    write_json(out, result.to_dict())
    print(result.table())
    print(f"{'written to':>13}  {out}")
    return 0


def run_dir_of(path: Path) -> Path:
    """The run directory of a checkpoint file; for one kept elsewhere, the folder it lies in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
