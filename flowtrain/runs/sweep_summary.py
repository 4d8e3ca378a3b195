"""Summarizes the runs of a sweep as CSV, as a Markdown table and as a figure."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowtrain.plotting.drawing import warn_if_plotting_fails
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.sweep_figure import MOST_SWEPT, Swept, draw_sweep
from flowtrain.runs.console import data_name, name_of
from flowtrain.runs.sweep_directory import CONFIG, MEASURED, OF_TARGET, Job, read, varied_keys
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import write_text
from flowtrain.utils.formatting import as_table, brief, with_error

# headings of some of these keys in tables
SHOWN_OF_TARGET = (("ess", "ESS"), ("pareto_k", "Pareto k"))
# the meaning of the mark * in a table
TIED = "\\* not significantly worse than the best: within 2 standard errors of the difference"
TOLERANCES = ("solver.rtol", "solver.atol")


def write_summary(root: Path) -> tuple[str, int]:
    """Writes sweep.csv, sweep.md and sweep.png into the directory of a sweep.

    A file that cannot be written only causes a warning.

    Returns:
        (the table for the terminal, the number of jobs without a result).
    """
    jobs = read(root)
    if not jobs:
        return "no job was started", 0
    keys = varied_keys(jobs)
    table = as_markdown(jobs, keys)
    done = [job for job in jobs if job.result]
    axes = [key for key in keys if key != "seed"] or keys
    written = {"sweep.csv": as_csv(jobs, keys), "sweep.md": table + "\n"}
    lines = {key: group_by_key(done, key) for key in axes[:MOST_SWEPT]}
    with warn_if_plotting_fails("the sweep", ", nor its files"):
        for name, text in written.items():
            write_text(root / name, text)
        if done and axes:
            config = config_of(root / done[0].name)
            title = title_of_sweep(config, keys, jobs)
            title += f", {len(lines)} of {len(axes)} keys shown" if len(axes) > len(lines) else ""
            draw_sweep(root / "sweep.png", lines=lines, title=title, options=options_of(config))
    return table, len(jobs) - len(done)


def config_of(folder: Path) -> dict[str, Any]:
    """Returns the config of the run in a directory; empty if the config cannot be read."""
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def title_of_sweep(config: Mapping[str, Any], keys: Sequence[str], jobs: Sequence[Job]) -> str:
    """Returns the title of the figure, such as "realnvp on moons: sweep of trainer.lr, 4 of 4 runs done".

    Args:
        config: the config of one run.
        keys: the keys that were swept.
    """
    swept_words = " and ".join(filter(None, (", ".join(keys[:-1]), *keys[-1:])))
    done = f"{sum(bool(job.result) for job in jobs)} of {len(jobs)} runs done"
    try:
        model = "several models" if "model" in keys else name_of(config["model"])
        data = "several data sets" if {"data", "data.path"} & {*keys} else data_name(config)
    except (KeyError, TypeError, AttributeError):
        return f"sweep of {swept_words}, {done}"
    return f"{model} on {data}: sweep of {swept_words}, {done}"


def options_of(config: Mapping[str, Any]) -> PlotOptions:
    """Returns the options of figures in the config of a run; the defaults if the options are not valid."""
    try:
        return PlotOptions.of(config)
    except ConfigError:
        return DEFAULT


def tied_with_best(jobs: Sequence[Job]) -> set[str]:
    """Returns the names of the runs whose validation NLL is not significantly worse than the best.

    The NLL must exceed the best by at most 2 standard errors of the difference. The errors of two runs are assumed
    independent. This makes the set larger, because the errors of runs with the same validation set are correlated.
    """
    best = min(jobs, key=lambda job: job.val_nll, default=None)
    if best is None or not math.isfinite(best.val_nll):
        return set()
    near = {job.name for job in jobs if job.val_nll - best.val_nll <= 2 * math.hypot(job.val_stderr, best.val_stderr)}
    return {best.name, *near}


def as_csv(jobs: Sequence[Job], keys: Sequence[str]) -> str:
    """Formats the jobs as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = (*MEASURED, *(name for name in OF_TARGET if any(name in job.result for job in jobs)))
    writer.writerow(["job", *keys, *names, "as_good_as_best", "state", "error"])
    near = tied_with_best(jobs)
    for job in jobs:
        found = (job.result.get(name) for name in names)
        given = (job.keys.get(key, "") for key in keys)
        measured = ["" if value is None else value for value in found]
        good = str(job.name in near).lower() if job.result else ""
        writer.writerow([job.name, *given, *measured, good, job.state, job.error or ""])
    return text.getvalue()


def as_markdown(jobs: Sequence[Job], keys: Sequence[str]) -> str:
    """Formats the jobs as a Markdown table, with significant digits only and without empty columns."""
    columns: dict[str, list[str]] = {"job": [job.name for job in jobs]}
    columns |= {key: [_short(job.keys.get(key, "")) for job in jobs] for key in keys}
    near = tied_with_best(jobs)
    marks = {job.name: " *" if job.name in near and len(near) > 1 else "" for job in jobs}
    columns["validation NLL"] = [_validation(job) + marks[job.name] for job in jobs]
    columns["test NLL"] = [_nll(job.result) for job in jobs]
    columns["log Z"] = [_log_z(job.result) for job in jobs]
    columns |= {words: [_number(job.result.get(name), 2) for job in jobs] for name, words in SHOWN_OF_TARGET}
    for name, words in (("bits_per_dim", "bits/dim"), ("kl", "KL"), ("nfe", "NFE"), ("solver_error", "solver error")):
        columns[words] = [_number(job.result.get(name)) for job in jobs]
    columns["steps"] = [str(job.result.get("steps", "")) for job in jobs]
    columns["seconds"] = [_number(job.result.get("train_seconds"), 3) for job in jobs]
    columns[""] = [_state_text(job) for job in jobs]
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    table = as_table(list(columns), zip(*columns.values(), strict=True))
    return f"{table}\n\n{TIED}" if len(near) > 1 else table


def _validation(job: Job) -> str:
    return with_error(job.val_nll, job.val_stderr) if math.isfinite(job.val_nll) else ""


def _nll(result: dict[str, Any]) -> str:
    return with_error(result["nll"], result["nll_stderr"]) if result.get("nll") is not None else ""


def _log_z(result: dict[str, Any]) -> str:
    error = result.get("log_z_stderr")
    return "" if result.get("log_z") is None or error is None else with_error(result["log_z"], error)


def _short(value: str) -> str:
    """Returns a value as given, or rounded to four digits if it is a long decimal number, as sweepers draw them."""
    number = _as_number(value)
    return value if number is None or len(value) <= 12 or "." not in value else f"{number:.4g}"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else brief(value) if abs(value) < 1e-2 else f"{value:.{digits}g}"


def _state_text(job: Job) -> str:
    if job.state == "done":
        return ""
    last = (job.error or "run the same sweep again to continue it").splitlines()[-1]
    return f"{job.state}: {last if len(last) <= 120 else last[:119] + '…'}"


def group_by_key(jobs: Iterable[Job], key: str) -> Swept:
    """Groups the results of the jobs by their values of one key, regardless of the other keys."""
    values: dict[str, list[Job]] = {}
    for job in jobs:
        values.setdefault(job.keys.get(key, "default"), []).append(job)
    numbers = [_as_number(value) for value in values]
    numeric = all(number is not None for number in numbers)
    order = sorted(values, key=(lambda v: _as_number(v) or 0.0) if numeric else str)
    names = ("val_nll", "nll", "nfe", *(("solver_error",) if key in TOLERANCES else ()))
    found = {name: [[_measured(job, name) for job in values[value]] for value in order] for name in names}
    return Swept(
        values=order,
        numbers=[n for v in order if (n := _as_number(v)) is not None] if numeric else None,
        found={name: rows for name, rows in found.items() if any(map(math.isfinite, (v for row in rows for v in row)))},
        errors={
            name: [[_measured(job, f"{name}_stderr") for job in values[value]] for value in order]
            for name in ("val_nll", "nll")
        },
    )


def _measured(job: Job, name: str) -> float:
    value = job.result.get(name)
    return math.nan if value is None else float(value)


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
