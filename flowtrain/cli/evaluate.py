"""`floweval`: the NLL of a checkpoint on held-out data."""

import sys
from pathlib import Path
from typing import Any

from flowtrain.build import build_data
from flowtrain.checks import whole
from flowtrain.cli.common import open_checkpoint, run_command, run_dir_of, split_own
from flowtrain.evaluation import evaluate
from flowtrain.run import messages, write_json

USAGE = """floweval ckpt=RUN_DIR_OR_FILE [split=test] [out=FILE] [KEY=VALUE ...]

  ckpt         a run directory (its best checkpoint) or a .pt file
  split        test (default) or val
  out          where the JSON goes; default: eval.json in the run directory
  device       auto (default), cpu, cuda or cuda:0
  batch_size   rows scored at a time; default: by the size of a sample
  dequantization_samples
               of whole numbers: noise draws averaged inside the log; default 1, and the more the tighter the bound
  trust        packages besides flowtrain that the checkpoint may build from: trust=[mypkg]

Keys of data and solver can be changed, as in solver.rtol=1e-7, solver=tsit5 or data=circles, and how a trace is taken:
model.eval_trace=hutchinson, model.noise, model.noise_samples."""


def main() -> None:
    with messages():
        run_command("floweval", _command)


def _command() -> int:
    own: dict[str, Any] = {
        "ckpt": None,
        "split": "test",
        "out": None,
        "device": "auto",
        "batch_size": None,
        "dequantization_samples": 1,
        "trust": [],
    }
    own, overrides = split_own(sys.argv[1:], own, USAGE)
    batch_size = None if own["batch_size"] is None else whole("batch_size", own["batch_size"])
    draws = whole("dequantization_samples", own["dequantization_samples"])
    opened = open_checkpoint(own, overrides)
    result = evaluate(opened.flow, build_data(opened.config), str(own["split"]), opened.step, batch_size, draws)
    out = Path(str(own["out"])) if own["out"] else run_dir_of(opened.path) / "eval.json"
    write_json(out, result.to_dict())
    print(result.table())
    print(f"{'written to':>13}  {out}")
    return 0
