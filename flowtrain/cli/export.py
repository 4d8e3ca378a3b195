"""The command line of `flowexport`: its options, and their help. This module does not import torch."""

import sys
from typing import Any

from flowtrain.cli.arguments import split_own
from flowtrain.cli.error_messages import run_command
from flowtrain.cli.late_imports import loading
from flowtrain.cli.usage import TRUST_TEXT, Usage
from flowtrain.runs.console import messages

USAGE = Usage(
    name="flowexport",
    summary="writes a run as programs that need only PyTorch or onnxruntime",
    arguments=["RUN [KEY=VALUE ...]"],
    examples=[
        ("flowexport outputs/first", "flow.pt2, for torch.export.load"),
        ("flowexport outputs/first out=flow.onnx", "the same for onnxruntime"),
        ("flowexport outputs/first solver=rk4 steps=16", "a continuous flow with 16 steps"),
    ],
    options={
        "ckpt": "A run directory (its best checkpoint) or a .pt file. ckpt= may be left out",
        "out": "The file of log_prob, FILE.pt2 or FILE.onnx (default: flow.pt2 in the run directory). The program "
        "maps x to log p(x) in nats. FILE.inverse.pt2 (x to z) and FILE.sample.pt2 (z to x) are written beside it. "
        "torch.export.load reads .pt2, and onnxruntime reads .onnx; .onnx "
        "needs the extra: pip install 'flowtrain[onnx]'",
        "solver": "For continuous flows: euler, midpoint, heun or rk4. These methods have fixed steps. Default: the "
        "solver of the run if it has fixed steps, otherwise rk4",
        "steps": "For continuous flows: number of steps. Default: as in the run if it has fixed steps. Otherwise the "
        "smallest of 8, 16, 32, 64 and 128 with a bias of log p of at most 1e-3 nats (root mean square), or 128",
        "tolerance": "Largest allowed difference between a program and the flow (default: 1e-4). The flow is solved "
        "with the same steps. The unit is nats for log_prob, and standard deviations for the others. A program that "
        "differs by more is not written",
        "trust": TRUST_TEXT,
    },
    notes=[
        "The programs are compared with the flow on rows of the test set of the run. Keys of data can be changed, as "
        "in data.path=FILE. If the trace of the flow is estimated, model.eval_trace=exact exports the exact trace. "
        "That program is slower."
    ],
)

OWN: dict[str, Any] = {
    "ckpt": None,
    "out": None,
    "solver": None,
    "steps": None,
    "tolerance": None,
    "trust": [],
}


def main() -> None:
    """Runs the command `flowexport`."""
    with messages():
        run_command("flowexport", _command)


def _command() -> int:
    own, overrides = split_own(sys.argv[1:], OWN, USAGE)
    with loading():
        from flowtrain.cli.export_run import run
    return run(own, overrides)
