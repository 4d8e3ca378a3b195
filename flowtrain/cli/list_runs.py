"""`flowtrain runs`: lists the runs in directories, and draws the validation curves of several runs."""

import csv
import io
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from flowtrain.cli.output_files import check_outputs, run_dir_of, written_as
from flowtrain.cli.overrides import OUTPUTS
from flowtrain.cli.usage import Usage
from flowtrain.runs.console import messages, shortest
from flowtrain.runs.listing import COLUMNS, ListedRun, find_runs, read_rows
from flowtrain.utils.arguments import choose
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import to_json, write_text
from flowtrain.utils.formatting import counted, with_error

log = logging.getLogger("flowtrain")

KEYS = ("out", "plot")
# the longest cell of the table
WIDEST_CELL = 60

USAGE = Usage(
    name="flowtrain runs",
    summary="lists runs with their NLL, and draws their validation curves",
    arguments=["[DIR ...] [out=FILE.csv|FILE.json] [plot=FILE.png]"],
    examples=[
        ("flowtrain runs", "the runs in outputs/, the last one last"),
        ("flowtrain runs outputs/multirun", "the runs of all sweeps"),
        ("flowtrain runs out=runs.csv", "the same as a table with all digits"),
        ("flowtrain runs outputs/first outputs/second", "two runs, with their curves in runs.png"),
    ],
    options={
        "DIR": "A run, a sweep, or a directory that contains runs. Default: outputs",
        "out": "A .csv or .json file with a row for each run. NLL is in nats",
        "plot": "A .png file with the validation NLL of the runs by step and by seconds. Default: if two or more runs "
        "are given, runs.png in the working directory, or runs-2.png if that exists",
    },
    notes=[
        "Columns: the name is the path below DIR. The NLL is measured on the test set. It is in nats or, for images, "
        "in bits/dim, with its standard error. (val) marks the lowest validation NLL of a run without a result. The "
        "state is finished, running (a process holds the lock of the directory), failed, or stopped at step K. The "
        "runs of a sweep follow below its line. The candidates of a search are left out. No checkpoint is read, and no "
        "code of a run is executed."
    ],
)


def command(arguments: Sequence[str]) -> int:
    """Runs `flowtrain runs` with its arguments; returns the exit code.

    Raises:
        ConfigError: an unknown option, a directory that does not exist, or runs whose curves cannot be drawn.
    """
    paths, given = _parsed(arguments)
    out, plot = written_as("out", given.get("out"), ".csv", ".json"), written_as("plot", given.get("plot"), ".png")
    roots = [_root_of(path) for path in paths] if paths else [Path(OUTPUTS)]
    runs: dict[Path, tuple[Path, ListedRun]] = {}
    for root in roots:
        runs |= {run.path.resolve(): (root, run) for run in find_runs(root) if run.path.resolve() not in runs}
    found = [run for _, run in runs.values()]
    if not found:
        print(f"no runs in {', '.join(map(str, roots))}")
    else:
        print("\n".join(_lines([*runs.values()])))
    if plot is None and len(roots) > 1 and [run.path for run in found] == roots:
        plot = _free(Path("runs.png"))
    check_outputs([path for path in (out, plot) if path is not None], [*_files_of(found)])
    if out is not None:
        text = as_csv(found) if out.suffix == ".csv" else to_json({"runs": [r.to_dict() for r in found]}, 2)
        # paths that are not UTF-8 contain surrogates
        write_text(out, text.encode(errors="backslashreplace").decode())
        print(f"written to {out}")
    if plot is not None:
        with messages():
            draw(plot, found)
        print(f"curves in {plot}")
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Returns the directories, and the values of the options."""
    paths, given = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in KEYS:
            given[key] = value
        elif argument.startswith("-") or not argument.strip():
            raise ConfigError(f"{argument!r}: flowtrain runs has no such flag; see flowtrain runs --help")
        elif equals and not Path(argument).exists():
            raise ConfigError(f"{argument}: flowtrain runs has no option {key}; {choose(key, KEYS)}")
        else:
            paths.append(Path(argument).expanduser())
    return paths, given


def _root_of(path: Path) -> Path:
    """Returns a directory if it exists. For a checkpoint file, returns the run directory."""
    if path.is_file() and path.suffix == ".pt":
        return run_dir_of(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such directory; give run directories, or directories that contain runs")
    return path


def _files_of(runs: Sequence[ListedRun]) -> Iterator[Path]:
    """Yields the files of runs and sweeps that have an ending that `flowtrain runs` can write."""
    for folder in {folder for run in runs for folder in (run.path, run.sweep) if folder is not None}:
        yield from (path for path in folder.glob("*") if path.suffix in (".csv", ".json", ".png"))


def _free(path: Path) -> Path:
    """Returns the path, or the first of NAME-2, NAME-3 ... that does not exist."""
    names = (path.with_stem(f"{path.stem}-{i}") if i > 1 else path for i in count(1))
    return next(name for name in names if not name.exists())


def _lines(runs: Sequence[tuple[Path, ListedRun]]) -> list[str]:
    """Returns the table of runs. The runs of a sweep are indented below a line with the name of the sweep."""
    head = ["name", "model", "data", "NLL (test)", "seconds", "state", "path"]
    rows: list[list[str]] = [head]
    sweep = None
    for root, run in runs:
        if run.sweep is not None and run.sweep != sweep:
            members = sum(other.sweep == run.sweep for _, other in runs)
            name = str(run.sweep.relative_to(root)) if run.sweep != root else run.sweep.name
            rows.append([name, f"sweep of {counted(members, 'run')}", "", "", "", "", str(shortest(run.sweep))])
        sweep = run.sweep
        name = run.name
        if sweep is not None:
            keys = " ".join(f"{key}={value}" for key, value in run.overrides.items())
            name = f"  {run.path.relative_to(sweep)}  {keys}".rstrip()
        seconds = "" if run.train_seconds is None else f"{run.train_seconds:,.0f}"
        state = f"{run.state}; {run.problem}" if run.problem else run.state
        rows.append([name, run.model or "?", run.data or "?", nll_of(run), seconds, state, str(shortest(run.path))])
    rows = [[*(_shortened(cell) for cell in row[:-1]), _printable(row[-1])] for row in rows]
    # the row of a sweep has the number of runs in column 1. This cell is wide, because the next columns are empty
    widths = [max(len(row[i]) for row in rows if i != 1 or row[2] or row[5]) for i in range(len(head))]
    return [_line(row, widths) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if i == 4 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    if not any(row[2:6]):
        # the line of a sweep
        between = sum(widths[1:6]) + 2 * 4
        return f"{cells[0]}  {row[1]:{between}}  {row[6]}".rstrip()
    return "  ".join(cells).rstrip()


def _printable(text: str) -> str:
    """Returns a text without control characters, which could change the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _shortened(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= WIDEST_CELL else f"{text[: WIDEST_CELL - 1]}…"


def nll_of(run: ListedRun) -> str:
    """Returns the NLL of a run with its standard error. (val) marks an NLL of the validation set.

    Example:
        >>> nll_of(ListedRun(Path("r"), "r", split="val", nll=2.40213, nll_stderr=0.00581))
        '2.402 +- 0.006 (val)'
    """
    if run.nll is None:
        return "-"
    error = math.nan if run.nll_stderr is None else run.nll_stderr
    mark = " (val)" if run.split == "val" else ""
    if run.bits_per_dim is None:
        return with_error(run.nll, error) + mark
    factor = run.bits_per_dim / run.nll if run.nll else math.nan
    return f"{with_error(run.bits_per_dim, error * abs(factor))} bits/dim{mark}"


def as_csv(runs: Sequence[ListedRun]) -> str:
    """Returns the runs as CSV: the names of the columns, and a row for each run, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        row = run.to_dict()
        row["overrides"] = " ".join(f"{key}={value}" for key, value in run.overrides.items())
        writer.writerow(["" if row[name] is None else row[name] for name in COLUMNS])
    return text.getvalue()


def draw(path: Path, runs: Sequence[ListedRun]) -> None:
    """Draws the validation curves of runs. Runs without a validation are left out with a warning.

    Raises:
        ConfigError: no run has a validation, or there are more than MOST_RUNS curves.
    """
    # a list without a figure imports neither torch nor matplotlib
    from flowtrain.plotting.curves import series_of
    from flowtrain.plotting.runs_figure import MOST_RUNS, draw_runs

    rows = {_label(run): [row for row in read_rows(run.path) if row.get("split") == "val"] for run in runs}
    curves = {name: validations for name, validations in rows.items() if series_of(validations, "nll")}
    if left := [name for name in rows if name not in curves]:
        log.warning("%s: no validation in metrics.jsonl, so no curve is drawn", ", ".join(left))
    if not curves:
        raise ConfigError("no curves: none of the runs has a validation yet")
    if len(curves) > MOST_RUNS:
        raise ConfigError(f"{len(curves)} curves cannot be told apart: give at most {MOST_RUNS} runs")
    if len(data := {run.data or "?" for run in runs if _label(run) in curves}) > 1:
        log.warning("the runs have different data (%s): their NLL cannot be compared", ", ".join(sorted(data)))
    draw_runs(path, runs=curves, title=f"validation NLL of {counted(len(curves), 'run')}")


def _label(run: ListedRun) -> str:
    return " ".join([str(shortest(run.path)), *(f"{key}={value}" for key, value in run.overrides.items())])
