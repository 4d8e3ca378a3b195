"""`flowexport`: writes a checkpoint as programs that run without flowtrain, in .pt2 or ONNX."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowtrain.cli.load_run import LoadedRun, load_run
from flowtrain.cli.output_files import check_outputs, written_as
from flowtrain.data.base import changes
from flowtrain.evaluation import check_fits
from flowtrain.export import ENDINGS, FIXED_STEP_METHODS, TOLERANCE, checked_path, export, paths_beside
from flowtrain.utils.arguments import number, one_of, whole
from flowtrain.utils.errors import DataError, FlowtrainError
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")


def run(own: dict[str, Any], overrides: Sequence[str]) -> int:
    """Runs the command. Returns the exit code.

    Args:
        own: the values of the options of the command.
        overrides: overrides of the saved config.
    """
    given = written_as("out", own["out"], *ENDINGS)
    if given is not None:
        # a missing package is reported before anything is read
        checked_path(given)
    solver = None if own["solver"] is None else one_of("solver", own["solver"], FIXED_STEP_METHODS)
    steps = None if own["steps"] is None else whole("steps", own["steps"])
    tolerance = TOLERANCE if own["tolerance"] is None else number("tolerance", own["tolerance"])
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
