"""`flowexport`: writes a checkpoint as programs that run without flowtrain, in .pt2 or ONNX."""

import logging
import sys
from typing import Any

from torch import Tensor

from flowtrain.cli.arguments import split_own
from flowtrain.cli.error_messages import run_command
from flowtrain.cli.load_run import LoadedRun, load_run
from flowtrain.cli.output_files import check_outputs, written_as
from flowtrain.cli.usage import TRUST_TEXT, Usage
from flowtrain.data.base import changes
from flowtrain.evaluation import check_fits
from flowtrain.export import ENDINGS, FIXED_STEP_METHODS, TOLERANCE, checked_path, export, paths_beside
from flowtrain.runs.console import messages
from flowtrain.utils.arguments import number, one_of, whole
from flowtrain.utils.errors import DataError, FlowtrainError
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")

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
    "tolerance": TOLERANCE,
    "trust": [],
}


def main() -> None:
    """Runs the console script `flowexport`."""
    with messages():
        run_command("flowexport", _command)


def _command() -> int:
    own, overrides = split_own(sys.argv[1:], OWN, USAGE)
    given = written_as("out", own["out"], *ENDINGS)
    if given is not None:
        # a missing package is reported before anything is read
        checked_path(given)
    solver = None if own["solver"] is None else one_of("solver", own["solver"], FIXED_STEP_METHODS)
    steps = None if own["steps"] is None else whole("steps", own["steps"])
    tolerance = number("tolerance", own["tolerance"])
    loaded_run = load_run({**own, "device": "cpu"}, overrides)
    flow = loaded_run.single_flow("an export", "flowexport {}")
    out = given or loaded_run.run_dir / "flow.pt2"
    check_outputs(list(paths_beside(out).values()), loaded_run.inputs)
    with status("reading the data"):
        x, context = test_rows(loaded_run)
    exported = export(
        flow,
        out,
        x,
        context,
        solver=solver,
        steps=steps,
        tolerance=tolerance,
        columns=loaded_run.samples.columns,
        rows_from="test set of the run",
    )
    print(exported.table())
    return 0


def test_rows(loaded_run: LoadedRun) -> tuple[Tensor | None, Tensor | None]:
    """Returns rows of the test set and their context. If the data are missing or do not fit, warns and returns None."""
    try:
        data = loaded_run.build()
        check_fits(loaded_run.flow, data)
        if change := changes(loaded_run.samples.record, data.record, ["test"]):
            raise DataError(f"since the run was trained, {change}")
    except (FlowtrainError, OSError) as e:
        log.warning("the programs are compared with the flow on samples of the flow, not on test rows: %s", e)
        return None, None
    context = data.split_context("test") if loaded_run.flow.conditional else None
    if loaded_run.flow.conditional and context is None:
        what = "context" if loaded_run.flow.context else "labels"
        log.warning("the programs are compared with the flow on samples of the flow: the data have no %s", what)
        return None, None
    return data.test, context
