"""`floweval` for a run on a target: log Z, its error, and the quality of the importance weights."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from flowtrain.cli.evaluation_files import OutputPaths, curves_of
from flowtrain.cli.load_run import LoadedRun, set_name
from flowtrain.cli.provenance import provenance
from flowtrain.data.base import changes
from flowtrain.data.targets.base import TargetData, check_order
from flowtrain.evaluation import NAMES, evaluate_target
from flowtrain.evaluation.report import write_report
from flowtrain.models.ensemble import Ensemble
from flowtrain.runs.console import title_of
from flowtrain.runs.finish import draw_figures
from flowtrain.utils.arguments import flag
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.files import write_json
from flowtrain.utils.status import status

# options that need data
NEED_DATA = (
    "split", "scores", "grid", "grid_points", "label", "ood", "anomalies", "false_positive_rate",
    "false_discovery_rate", "data.anomaly_label", "baselines", "sbc", "sbc_samples", "dequantization_samples", "seed",
)  # fmt: skip
# the figures of a run on a target
FIGURES = ("target", "weights", "modes", "curves")


def evaluate_target_run(
    loaded_run: LoadedRun,
    own: Mapping[str, Any],
    defaults: Mapping[str, Any],
    overrides: Sequence[str],
    dtype: torch.dtype,
    batch_size: int | None,
    out: Path | None,
) -> int:
    """Evaluates a run on its target, and writes JSON, figures and a report. Returns the exit code.

    Args:
        own, defaults: the options of the command, and their default values.
        overrides: the other keys of the command line.

    Raises:
        ConfigError: an option needs data, or an output path is not valid.
    """
    given = [key for key in NEED_DATA if own[key] != defaults[key]]
    if given:
        raise ConfigError(
            f"{', '.join(f'{key}={own[key]}' for key in given)}: not possible for a run on a target, which has no "
            "data. Leave it out, or give data with data=NAME or data.path=FILE. data.n_test and data.seed set the "
            "samples of the evaluation"
        )
    wants_plots, wants_report = flag("plots", own["plots"]), flag("report", own["report"])
    options = loaded_run.plot_options
    outputs = OutputPaths(loaded_run.run_dir, out, None, set_name(loaded_run, "test", overrides), options)
    outputs.check(False, False, wants_report, isinstance(loaded_run.flow, Ensemble), loaded_run.inputs)
    with status("building the target"):
        data = target_data_of(loaded_run)
    flow = loaded_run.flow.to(dtype)
    result = evaluate_target(flow, data.target, len(data.test), data.seed_of("test"), loaded_run.step, batch_size)
    write_json(outputs.json, result.to_dict())
    figures: list[Path] = []
    if wants_plots:
        rows = curves_of(loaded_run)
        figures = draw_figures(flow, data, result, rows, loaded_run.config, outputs.figure, options)
    written = [outputs.json, *figures]
    if wants_report:
        with status("writing the report"):
            written += write_report(
                result,
                title_of(loaded_run.config),
                str(loaded_run.path),
                outputs.report,
                outputs.others(figures, FIGURES),
                provenance(loaded_run, sys.argv[1:], data.seed),
            )
    print(result.table())
    print("\n".join(f"{'written to' if i == 0 else '':>{NAMES}}  {path}" for i, path in enumerate(written)))
    return 0


def target_data_of(loaded_run: LoadedRun) -> TargetData:
    """Builds the data set of a run on a target.

    Raises:
        DataError: the file of the target has changed since the training, and the command does not set another target.
        ConfigError: the target does not fit the flow.
    """
    data = cast(TargetData, loaded_run.build())
    change = changes(loaded_run.samples.record, data.record)
    if change and loaded_run.config.get("target") == loaded_run.own_target:
        raise DataError(
            f"since the run was trained, {change}. Restore it, or give a copy of the changed file by target.path=FILE"
        )
    check_order(loaded_run.samples.columns, data.columns)
    return data
