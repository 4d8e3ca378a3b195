"""`floweval`: computes the NLL of a checkpoint on held-out or new data, with its error and checks of the density."""

import copy
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowtrain.cli.config_files import compose_defaults, options
from flowtrain.cli.evaluate import OWN
from flowtrain.cli.evaluate_target import evaluate_target_run
from flowtrain.cli.evaluation_files import OutputPaths, curves_of
from flowtrain.cli.load_run import LoadedRun, load_run, same_data, set_name
from flowtrain.cli.output_files import written_as
from flowtrain.cli.overrides import keys_of
from flowtrain.cli.provenance import provenance
from flowtrain.cli.score_files import for_each_row, write_anomalies, write_scores
from flowtrain.data.base import FILE, Dataset, Samples, changes
from flowtrain.data.tables.output import NAMED, sample_names
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.evaluation import NAMES, Evaluation, check_fits, evaluate
from flowtrain.evaluation.anomalies import Rate, with_anomalies
from flowtrain.evaluation.baselines import MOST_SECONDS
from flowtrain.evaluation.evaluate import row_spread
from flowtrain.evaluation.report import write_report
from flowtrain.evaluation.sbc import SAMPLES
from flowtrain.models.ensemble import Ensemble
from flowtrain.plotting import pictures
from flowtrain.plotting.density_grid import check_has_grid, density_grid
from flowtrain.runs.build import uses_target
from flowtrain.runs.console import data_name, title_of
from flowtrain.runs.finish import draw_figures
from flowtrain.runs.source import ROLES
from flowtrain.utils.arguments import flag, one_of, whole
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError
from flowtrain.utils.files import write_json, write_npy, write_npz
from flowtrain.utils.process import own_settings
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")


# the keys of data=array that control how a file is read
READ = ("key", "columns", "label", "id", "header", "decimal", "missing", "na", "context", "weights", "signed_weights")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@own_settings(torch.device("cpu"))
def run(own: dict[str, Any], overrides: Sequence[str]) -> int:
    """Runs the command. Returns the exit code.

    Args:
        own: the values of the options of the command.
        overrides: overrides of the saved config.
    """
    batch_size = None if own["batch_size"] is None else whole("batch_size", own["batch_size"])
    draws, seed = whole("dequantization_samples", own["dequantization_samples"]), whole("seed", own["seed"], least=0)
    dtype, wants_report = DTYPES[one_of("dtype", own["dtype"], DTYPES)], flag("report", own["report"])
    wants_baselines, wants_plots = flag("baselines", own["baselines"]), flag("plots", own["plots"])
    scores, grid = written_as("scores", own["scores"], ".npy", *NAMED), written_as("grid", own["grid"], ".npz")
    points = whole("grid_points", own["grid_points"], least=2)
    sbc = sbc_samples(flag("sbc", own["sbc"]), own["sbc_samples"])
    label = None if own["label"] is None else whole("label", own["label"], least=0)
    if label is not None and grid is None:
        raise ConfigError("label: only used with grid=FILE.npz; leave this option out")
    out, anomalies = Path(str(own["out"])).expanduser() if own["out"] else None, anomaly_options(own)
    loaded_run = load_run(own, overrides)
    if loaded_run.data_is_target:
        return evaluate_target_run(loaded_run, own, OWN, overrides, dtype, batch_size, out)
    split = str(own["split"] or default_split(overrides))
    options = loaded_run.plot_options
    outputs = OutputPaths(
        loaded_run.run_dir,
        out,
        scores,
        set_name(loaded_run, split, overrides),
        options,
        grid,
        anomalies and anomalies.path,
    )
    inputs = [*loaded_run.inputs, own["ood"]]
    outputs.check(own["ood"] is not None, bool(sbc), wants_report, isinstance(loaded_run.flow, Ensemble), inputs)
    if grid is not None:
        check_has_grid(loaded_run.flow, grid, label)
    data, other, trained_on = read_sets(
        loaded_run, own["ood"], split, overrides, wants_baselines, own["data.anomaly_label"]
    )
    known = calibration_set(loaded_run, data, split, anomalies)
    result = evaluate(
        loaded_run.flow.to(dtype),
        data,
        split,
        loaded_run.step,
        batch_size,
        draws,
        None if other is None else (other[0], other[1].test, other[1].test_context),
        seed,
        trained_on,
        baseline_seconds=MOST_SECONDS if wants_baselines else 0.0,
        sbc=sbc,
    )
    if anomalies is not None and known is not None:
        scoring = {"batch_size": batch_size, "draws": draws, "seed": seed}
        result = with_anomalies(result, loaded_run.flow, data, *known, anomalies.rate, options=scoring)

    write_json(outputs.json, result.to_dict())
    written = [outputs.json, *write_all_scores(outputs, result, data, split, None if other is None else other[1])]
    if anomalies is not None:
        write_anomalies(anomalies.path, data, split, result, sample_names(loaded_run.samples))
        written.append(anomalies.path)
    if grid is not None:
        columns = loaded_run.samples.columns
        with status("computing the grid"):
            arrays = density_grid(
                loaded_run.flow, data.split(split), points, columns, label, batch_size=batch_size, seed=seed
            )
        write_npz(grid, arrays)
        written.append(grid)
    config, title = loaded_run.config, title_of(loaded_run.config)
    if wants_plots:
        shown, rows = data_shown(data, split), curves_of(loaded_run)
        figures = draw_figures(loaded_run.flow, shown, result, rows, config, outputs.figure, options)
    else:
        figures = pictures.draw_evaluation(result, data, title, data_name(config), outputs.figure, options)
    written += figures
    if wants_report:
        with status("writing the report"):
            written += write_report(
                result,
                title,
                str(loaded_run.path),
                outputs.report,
                outputs.others(figures),
                provenance(loaded_run, sys.argv[1:], seed),
            )
    print(result.table())
    print("\n".join(f"{'written to' if i == 0 else '':>{NAMES}}  {path}" for i, path in enumerate(written)))
    return 0


def sbc_samples(wanted: bool, samples: Any) -> int:
    """Returns the number of samples for each row for `sbc=true`, or 0 without it.

    Raises:
        ConfigError: a number of samples without sbc=true.
    """
    if samples is not None and not wanted:
        raise ConfigError(f"sbc_samples={samples}: also give sbc=true")
    return (SAMPLES if samples is None else whole("sbc_samples", samples)) if wanted else 0


class AnomalyOptions(NamedTuple):
    """The file of anomalies, and the error rate of the decisions."""

    path: Path
    rate: Rate


def anomaly_options(own: Mapping[str, Any]) -> AnomalyOptions | None:
    """Returns the options of anomalies; None if they were not requested.

    Raises:
        ConfigError: another kind of file, both rates or a rate out of range, or an option without a file.
    """
    path = written_as("anomalies", own["anomalies"], *NAMED)
    given = [
        key for key in ("false_positive_rate", "false_discovery_rate", "data.anomaly_label") if own[key] is not None
    ]
    if path is None and given:
        raise ConfigError(f"{given[0]}={own[given[0]]}: also give anomalies=FILE.csv")
    rate = Rate.of(own["false_positive_rate"], own["false_discovery_rate"])
    return None if path is None else AnomalyOptions(path, rate)


def calibration_set(
    loaded_run: LoadedRun, data: Dataset, split: str, anomalies: AnomalyOptions | None
) -> tuple[Dataset, Tensor | None] | None:
    """Returns what anomalies are found with; None if they were not requested.

    Args:
        data: the evaluated data set.

    Returns:
        (the data set whose validation rows are compared with the scored rows, the labels of the scored rows, (n,), or
        None).

    Raises:
        ConfigError: the scored rows are the validation rows, or there are too few validation rows.
        DataError: the data of the run are missing, have changed, or do not fit the flow; or labels other than 0 and 1.
    """
    if anomalies is None:
        return None
    if same_data(loaded_run.config["data"], loaded_run.own_data) and split != "all":
        if split == "val":
            raise ConfigError("anomalies: split=val are the rows that others are compared with; give data.path=FILE")
        found = data
    else:
        found = training_data(loaded_run, ["val"], ". Restore the data, or leave out anomalies")
    if found.val_weights is not None:
        log.warning("anomalies: the weights of the validation rows are not used; all rows count equally")
    anomalies.rate.check(len(found.val))
    return found, data.anomaly_labels() if isinstance(data, RowsToScore) else None


def write_all_scores(
    outputs: OutputPaths, result: Evaluation, data: Dataset, split: str, other: Dataset | None
) -> list[Path]:
    """Writes the scores of the set, of the members of an ensemble, and of a second set. Returns the files."""
    path = outputs.scores
    if path is None:
        return []
    written, members = [path], result.member_scores
    spread = None if members is None else row_spread(members, [member.weight for member in result.members or ()])
    write_scores(path, data, split, result.scores, spread, result.errors)
    if members is not None and path.suffix not in NAMED:
        write_npy(outputs.member_scores, for_each_row(data, members))
        written.append(outputs.member_scores)
    if result.sets is not None and other is not None:
        write_scores(outputs.other_scores, other, "test", result.sets[1])
        written.append(outputs.other_scores)
    return written


def read_sets(
    loaded_run: LoadedRun,
    ood: Any,
    split: str,
    overrides: Sequence[str],
    wants_baselines: bool,
    anomaly_label: str | int | None = None,
) -> tuple[Dataset, tuple[str, Dataset] | None, Dataset | None]:
    """Returns the data to evaluate, the second set with its name, and the data that the flow was trained on.

    The data that the flow was trained on are None if the evaluation does not need them, or if they are optional and
    cannot be read.

    Args:
        ood, anomaly_label: options of the command.

    Raises:
        FlowtrainError: data that cannot be read, do not fit the flow, or have changed.
    """
    with status("reading the data"):
        data = data_of(loaded_run, split, overrides, anomaly_label)
        other = None if ood is None else other_set(str(ood), loaded_run)
        is_own = same_data(loaded_run.config["data"], loaded_run.own_data)
        if is_own and split != "all":
            return data, other, data
        if wants_baselines:
            advice = ". Restore the data, or leave out baselines=true"
            return data, other, training_data(loaded_run, [FILE, "val"], advice)
        return data, other, None if other is None else own_data_of(loaded_run)


def data_shown(data: Dataset, split: str) -> Dataset:
    """Returns the data with the evaluated set as its test set, because figures show the test set."""
    if split != "val":
        return data
    shown = copy.copy(data)
    shown.test, shown.test_labels = data.val, data.val_labels
    shown.test_context, shown.test_weights = data.val_context, data.val_weights
    return shown


def own_data_of(loaded_run: LoadedRun) -> Dataset | None:
    """Returns the data that the flow was trained on. If it is missing or does not fit, warns and returns None."""
    try:
        return training_data(loaded_run, ["val"])
    except (FlowtrainError, OSError) as e:
        log.warning("no validation set, so the typicality score uses the NLL of the scored rows: %s", e)
        return None


def training_data(loaded_run: LoadedRun, sets: Collection[str], advice: str = "") -> Dataset:
    """Returns the data that the flow was trained on.

    Args:
        sets: the sets that must be unchanged: "file", which has the training rows, "val" or "test".
        advice: the end of the message if they have changed.

    Raises:
        DataError: the data are missing, have changed, or do not fit the flow.
    """
    if loaded_run.own_target is not None and uses_target({"data": loaded_run.own_data}):
        raise DataError("the run was trained on a target (data=target), which has no rows to compare with")
    data = loaded_run.build(loaded_run.own_data)
    check_fits(loaded_run.flow, data)
    if change := changes(loaded_run.samples.record, data.record, sets):
        raise DataError(f"since the run was trained, {change}{advice}")
    return data


def default_split(overrides: Sequence[str]) -> str:
    """Returns "all" if data.path is given without data.val_path and data.test_path, else "test"."""
    keys = keys_of(overrides)
    return "all" if "data.path" in keys and not keys & {"data.val_path", "data.test_path"} else "test"


def data_of(
    loaded_run: LoadedRun, split: str, overrides: Sequence[str], anomaly_label: str | int | None = None
) -> Dataset:
    """Returns the data set of the config. For split=all, returns a data set of all rows of the file.

    Raises:
        ConfigError: split=all for data without a file of rows, or `anomaly_label` for another split.
        DataError: other names of columns than in training.
    """
    keys = keys_of(overrides)
    data = loaded_run.config["data"]
    if split == "all":
        if keys & {"data.val_path", "data.test_path"}:
            raise ConfigError("split=all scores the rows of data.path only; leave out data.val_path and data.test_path")
        if not data.get("path"):
            raise ConfigError(
                "split=all: this data has no file of rows; choose split=test or split=val, or give data.path"
            )
        asked = {key for key in READ if f"data.{key}" in keys}
        return rows_of(data["path"], loaded_run, data, asked, anomaly_label)
    if anomaly_label is not None:
        raise ConfigError(f"data.anomaly_label={anomaly_label}: only for all rows of a file; give data.path=FILE")
    built = loaded_run.build()
    names = built.samples.columns
    if names and loaded_run.samples.columns and names != loaded_run.samples.columns:
        raise DataError(
            f"{data.get('path')} has the columns {', '.join(names)}, but the flow was trained on "
            f"{', '.join(loaded_run.samples.columns)}. Give split=all, which finds columns by name, or data.columns"
        )
    check_unchanged(loaded_run.samples, built.samples, split, data.get("path"), keys)
    return built


def check_unchanged(before: Samples, now: Samples, split: str, path: str | None, keys: set[str]) -> None:
    """Rejects a held-out set that may contain training rows, because its file or its split has changed.

    A held-out file that the command names is not checked. If the command names another training file, the error is
    only a warning.

    Args:
        keys: the keys that the command sets.

    Raises:
        DataError: the file or its split has changed.
    """
    # the command may choose other columns for the same rows
    other_columns = bool(keys & {f"data.{role}" for role in ROLES})
    change = changes(before.record, now.record, [split], samples_only=other_columns)
    if change is None or f"data.{split}_path" in keys:
        return
    leaks = f"since the run was trained, {change}: the {split} set may contain rows that it was trained on"
    if keys & {"data", "data.path", "data.root"}:
        log.warning("%s: to score every row of another file, give split=all", leaks)
        return
    new = f" (data.path={path} includes the training rows)" if path else ""
    raise DataError(f"{leaks}. Restore the data, or score every row of a file with data.path=FILE{new}")


def rows_of(
    path: str,
    loaded_run: LoadedRun,
    data: Mapping[str, Any],
    asked: Collection[str] = (),
    anomaly_label: str | int | None = None,
) -> RowsToScore:
    """Returns all rows of a file, read with the settings of the data config; see `RowsToScore`."""
    return RowsToScore(
        path,
        loaded_run.samples,
        **{key: data.get(key) for key in READ},
        asked=asked,
        seed=data.get("seed", 0),
        anomaly_label=anomaly_label,
    )


def other_set(value: str, loaded_run: LoadedRun) -> tuple[str, Dataset]:
    """Returns the name and the data of the second set: a data config, whose test set is used, or the rows of a file."""
    if value != "array" and value in options("data"):
        data = loaded_run.build(compose_defaults([f"data={value}"])["data"])
        check_fits(loaded_run.flow, data)
        return value, data
    trained = loaded_run.config["data"]
    return Path(value).name, rows_of(value, loaded_run, trained)
