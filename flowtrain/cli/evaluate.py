"""`floweval`: the NLL of a checkpoint on held-out or new data, with its error and checks on the density."""

import copy
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.cli.arguments import split_own
from flowtrain.cli.config_files import compose_defaults, options
from flowtrain.cli.error_messages import run_command
from flowtrain.cli.load_run import LoadedRun, load_run, set_name
from flowtrain.cli.output_files import check_outputs, paths_of, run_dir_of, written_as
from flowtrain.cli.overrides import keys_of
from flowtrain.cli.provenance import provenance
from flowtrain.data.base import FILE, Dataset, Samples, changes
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.evaluation import NAMES, check_fits, evaluate
from flowtrain.evaluation.baselines import MOST_SECONDS
from flowtrain.evaluation.report import write_report
from flowtrain.models.ensemble import Ensemble
from flowtrain.plotting import pictures
from flowtrain.plotting.options import DEFAULT, FORMATS, PlotOptions
from flowtrain.runs.console import data_name, messages, title_of
from flowtrain.runs.finish import draw_figures
from flowtrain.runs.search import metrics_of, validations_of
from flowtrain.utils.arguments import flag, one_of, whole
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError
from flowtrain.utils.files import write_json, write_npy
from flowtrain.utils.process import own_settings
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")

USAGE = """floweval ckpt=RUN_DIR_OR_FILE [split=test] [scores=FILE.npy] [ood=FILE] [baselines=true] [report=true]
                  [plots=true] [KEY=VALUE ...]

  ckpt         a run directory (its best checkpoint) or a .pt file; the name may be left out, as in floweval RUN_DIR. A
               sweep directory, or a list of runs with the same data as in ckpt=[RUN1,RUN2], is an ensemble: p(x) is
               the weighted mean of the densities of the runs
  weights      of the members of an ensemble, as in weights=[0.3,0.7], or weights=equal; default: those with the highest
               likelihood of the validation rows
  split        test (default), val, or all: every row of data.path, in its order, which is the default with data.path
  scores       a .npy file for log p(x) of every row, in nats, in the order of the rows: -inf where the density is zero,
               NaN where it cannot be computed. Of an ensemble, FILE_members.npy also has log p of each member,
               (rows, members)
  ood          another set to tell from this one by log p: a file of samples, or data by name as in ood=fashion_mnist
               (its test set). Adds the AUROC to the table and plots/ood.png; with scores, also FILE_ood.npy. The
               entropy H of the typicality score is the NLL of the run's validation set. If that set is missing, it
               is the NLL of the scored rows
  baselines    true: NLL on the same rows of a Gaussian mixture and of a kernel density estimate beside the Gaussian's,
               all fitted to the training rows of the run, in up to 20 s. For tables; the mixture needs scikit-learn
               (pip install 'flowtrain[baselines]')
  plots        true: draws all figures of the run again: samples, training curves, calibration and the others that
               training draws. With new data, samples are drawn beside them. Without it, only calibration and OOD are
               drawn. Keys of figures: plots.format=[png,pdf,svg], plots.title=false, plots.columns=[0,2:5]
  report       true: all of it in report.md and in report.html, one file with its figures inside
  out          the JSON file. Figures and report are written beside it, under its name. Default: eval.json in the run
               directory for the run's own test set, otherwise eval-NAME.json, with NAME also in the names of figures
               and report: eval-new.json for data.path=new.csv, eval-val.json for split=val
  dtype        float32 (default) or float64
  device       auto (default), cpu, cuda or cuda:0
  batch_size   rows scored at a time; default: by the size of a sample
  dequantization_samples
               of whole numbers: noise draws averaged inside the log; default 1, and the more the tighter the bound
  seed         of the noise of dequantization and of estimated traces; default 0
  trust        packages besides flowtrain that the checkpoint may build from: trust=[mypkg]

Keys of data and solver can be changed, as in solver.rtol=1e-7, solver=tsit5 or data=circles, and how a trace is taken:
model.eval_trace=hutchinson, model.noise, model.noise_samples. data.path=NEW.csv scores new data. --config-dir DIR finds
your own configs of data and solvers."""

# the keys of data=array that say how a file is read
READ = ("key", "columns", "label", "header", "decimal")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main() -> None:
    """The command `floweval`."""
    with messages(), own_settings(torch.device("cpu")):
        run_command("floweval", _command)


def _command() -> int:
    own: dict[str, Any] = {
        "ckpt": None,
        "split": None,
        "out": None,
        "scores": None,
        "ood": None,
        "baselines": False,
        "plots": False,
        "report": False,
        "dtype": "float32",
        "device": "auto",
        "batch_size": None,
        "dequantization_samples": 1,
        "seed": 0,
        "trust": [],
        "weights": None,
    }
    own, overrides = split_own(sys.argv[1:], own, USAGE)
    batch_size = None if own["batch_size"] is None else whole("batch_size", own["batch_size"])
    draws, seed = whole("dequantization_samples", own["dequantization_samples"]), whole("seed", own["seed"], least=0)
    dtype, wants_report = DTYPES[one_of("dtype", own["dtype"], DTYPES)], flag("report", own["report"])
    wants_baselines, wants_plots = flag("baselines", own["baselines"]), flag("plots", own["plots"])
    scores = written_as("scores", own["scores"], ".npy")
    out = Path(str(own["out"])).expanduser() if own["out"] else None
    loaded_run = load_run(own, overrides)
    split = str(own["split"] or default_split(overrides))
    options = loaded_run.plot_options
    place = OutputPaths(loaded_run.run_dir, out, scores, set_name(loaded_run, split, overrides), options)
    inputs = [*loaded_run.files, own["ood"], *paths_of(loaded_run.config["data"])]
    place.check(own["ood"] is not None, wants_report, isinstance(loaded_run.flow, Ensemble), inputs)
    with status("reading the data"):
        data = data_of(loaded_run, split, overrides)
        other = None if own["ood"] is None else other_set(str(own["ood"]), loaded_run)
        trained_on = data if loaded_run.config["data"] == loaded_run.own_data and split != "all" else None
        if trained_on is None and wants_baselines:
            trained_on = training_data(loaded_run, [FILE, "val"])
        elif trained_on is None and other is not None:
            trained_on = own_data_of(loaded_run)
    result = evaluate(
        loaded_run.flow.to(dtype),
        data,
        split,
        loaded_run.step,
        batch_size,
        draws,
        other,
        seed,
        trained_on,
        baseline_seconds=MOST_SECONDS if wants_baselines else 0.0,
    )

    write_json(place.json, result.to_dict())
    written = [place.json]
    if scores is not None:
        write_npy(scores, result.scores.numpy())
        written.append(scores)
        if result.member_scores is not None:
            write_npy(place.member_scores, result.member_scores.numpy())
            written.append(place.member_scores)
        if result.sets is not None:
            write_npy(place.other_scores, result.sets[1].numpy())
            written.append(place.other_scores)
    config, title = loaded_run.config, title_of(loaded_run.config)
    if wants_plots:
        shown, rows = data_shown(data, split), curves_of(loaded_run)
        figures = draw_figures(loaded_run.flow, shown, result, rows, config, place.figure, options)
    else:
        figures = pictures.draw_evaluation(result, data, title, data_name(config), place.figure, options)
    written += figures
    if wants_report:
        with status("writing the report"):
            written += write_report(
                result,
                title,
                str(loaded_run.path),
                place.report,
                place.others(figures),
                provenance(loaded_run, sys.argv[1:], seed),
            )
    print(result.table())
    print("\n".join(f"{'written to' if i == 0 else '':>{NAMES}}  {path}" for i, path in enumerate(written)))
    return 0


def data_shown(data: Dataset, split: str) -> Dataset:
    """The data with the evaluated set in the place of the test set, which figures show."""
    if split != "val":
        return data
    shown = copy.copy(data)
    shown.test, shown.test_labels = data.val, data.val_labels
    return shown


def curves_of(loaded_run: LoadedRun) -> list[dict[str, Any]]:
    """The rows of the training curves; for an ensemble of runs, the validations of its members.

    Empty with other data than those of the run, because the curves do not show them.
    """
    if loaded_run.config["data"] != loaded_run.own_data:
        return []
    if loaded_run.members:
        return validations_of({run_dir_of(path).name: run_dir_of(path) for path in loaded_run.members})
    return metrics_of(loaded_run.run_dir)


class OutputPaths:
    """The paths of the files to write: in the run directory, or beside `out` and under its name.

    Args:
        name: the name of the evaluated set, see `set_name`.
        options: the options of figures, which give their formats.
    """

    def __init__(
        self, run_dir: Path, out: Path | None, scores: Path | None, name: str, options: PlotOptions = DEFAULT
    ) -> None:
        self.run_dir, self.out, self.scores, self.suffix = run_dir, out, scores, name and f"-{name}"
        self.options = options
        self.json = out or run_dir / f"eval{self.suffix}.json"
        # callers replace .json by .md or .html; without it, a dot in the name would be taken for a suffix
        self.report = out or run_dir / f"report{self.suffix}.json"

    @property
    def other_scores(self) -> Path:
        """Those of the other set, beside the first."""
        assert self.scores is not None
        return self.scores.with_name(f"{self.scores.stem}_ood.npy")

    @property
    def member_scores(self) -> Path:
        """Those of the members of an ensemble, beside the scores."""
        assert self.scores is not None
        return self.scores.with_name(f"{self.scores.stem}_members.npy")

    def check(self, ood: bool, report: bool, ensemble: bool, inputs: list[Any]) -> None:
        """Everything that will be written, before any work is done; see `check_outputs`."""
        paths = [self.json, *self.options.files(self.figure("calibration"))]
        paths += self.options.files(self.figure("ood")) if ood else []
        paths += [] if self.scores is None else [self.scores, *([self.other_scores] if ood else [])]
        paths += [self.member_scores] if ensemble and self.scores is not None else []
        paths += [self.report.with_suffix(ending) for ending in (".md", ".html")] if report else []
        check_outputs(paths, inputs)

    def figure(self, name: str) -> Path:
        """The path of a figure as PNG; other formats lie beside it."""
        if self.out is None:
            return self.run_dir / f"plots/{name}{self.suffix}.png"
        return self.out.with_name(f"{self.out.stem}_{name}.png")

    def others(self, drawn: list[Path]) -> list[Path]:
        """The files of the figures of a report: those that were drawn, and the samples and curves of the run."""
        found = list(drawn)
        for name in ("samples", "curves"):
            if not {*self.options.files(self.figure(name))} & {*drawn}:
                path = self.run_dir / f"plots/{name}.png"
                found += [file for kind in FORMATS if (file := path.with_suffix(f".{kind}")).is_file()]
        return found


def own_data_of(loaded_run: LoadedRun) -> Dataset | None:
    """The data that the flow was trained on. If it is missing or does not fit, warns and returns None."""
    try:
        return training_data(loaded_run, ["val"])
    except (FlowtrainError, OSError) as e:
        log.warning("no validation set, so the typicality score uses the NLL of the scored rows: %s", e)
        return None


def training_data(loaded_run: LoadedRun, sets: Collection[str]) -> Dataset:
    """The data that the flow was trained on.

    Args:
        sets: the sets that must be unchanged: "file", which has the training rows, "val" or "test".

    Raises:
        DataError: the data are missing, have changed, or do not fit the flow.
    """
    data = loaded_run.build(loaded_run.own_data)
    check_fits(loaded_run.flow, data)
    if change := changes(loaded_run.samples.record, data.record, sets):
        raise DataError(f"since the run was trained, {change}")
    return data


def default_split(overrides: Sequence[str]) -> str:
    """All the rows of a file that is given to be scored; the test set otherwise, and where it has a file of its own."""
    keys = keys_of(overrides)
    return "all" if "data.path" in keys and not keys & {"data.val_path", "data.test_path"} else "test"


def data_of(loaded_run: LoadedRun, split: str, overrides: Sequence[str]) -> Dataset:
    """The data set of the config, or all the rows of its file.

    Raises:
        ConfigError: a split that there is not.
        DataError: columns of other names than those that the flow was trained on.
    """
    keys = keys_of(overrides)
    data = loaded_run.config["data"]
    if split == "all":
        if keys & {"data.val_path", "data.test_path"}:
            raise ConfigError("split=all takes the rows of data.path alone: leave data.val_path and data.test_path out")
        if not data.get("path"):
            raise ConfigError("split=all: this data is no file of rows; choose test or val, or give data.path")
        asked = {key for key in READ if f"data.{key}" in keys}
        return rows_of(data["path"], loaded_run, data, asked)
    built = loaded_run.build()
    names = built.samples.columns
    if names and loaded_run.samples.columns and names != loaded_run.samples.columns:
        raise DataError(
            f"{data.get('path')} has the columns {', '.join(names)}, and the flow was trained on "
            f"{', '.join(loaded_run.samples.columns)}: give split=all, which reads them by name, or data.columns"
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
        DataError: saying what has changed.
    """
    change = changes(before.record, now.record, [split])
    if change is None or f"data.{split}_path" in keys:
        return
    leaks = f"since the run was trained, {change}: the {split} set may contain rows that it was trained on"
    if keys & {"data", "data.path", "data.root"}:
        log.warning("%s: to score every row of another file, give split=all", leaks)
        return
    new = f" (data.path={path} includes the training rows)" if path else ""
    raise DataError(f"{leaks}. Restore the data, or score every row of a file with data.path=FILE{new}")


def rows_of(path: str, loaded_run: LoadedRun, data: Mapping[str, Any], asked: Collection[str] = ()) -> RowsToScore:
    """Every row of a file, read as the config of the data says; see `RowsToScore`."""
    return RowsToScore(
        path, loaded_run.samples, **{key: data.get(key) for key in READ}, asked=asked, seed=data.get("seed", 0)
    )


def other_set(value: str, loaded_run: LoadedRun) -> tuple[str, Tensor]:
    """Name and samples of the set that `ood` means: the test set of data by that name, or the rows of a file."""
    if value != "array" and value in options("data"):
        data = loaded_run.build(compose_defaults([f"data={value}"])["data"])
        check_fits(loaded_run.flow, data)
        return value, data.test
    trained = loaded_run.config["data"]
    return Path(value).name, rows_of(value, loaded_run, trained).test
