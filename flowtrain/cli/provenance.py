"""The provenance in the report of `floweval`: commands, seeds, dates, versions and device."""

import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from flowtrain.cli.arguments import versions
from flowtrain.cli.load_run import LoadedRun
from flowtrain.cli.output_files import run_dir_of
from flowtrain.runs.banner import describe_device
from flowtrain.runs.sweep_directory import overrides_of

# the start of a message in flowtrain.log
STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d,\d{3} ", re.M)
# the largest number of members of an ensemble whose training is listed
MEMBERS = 20


def provenance(loaded_run: LoadedRun, arguments: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Returns names and values that describe the training and the evaluation.

    A value that is not recorded, such as the command of a flow trained from Python, is left out.

    Args:
        arguments: the arguments of the evaluating command.
        seed: the seed of the evaluation.
    """
    rows = []
    for path in loaded_run.files[:MEMBERS]:
        run_dir = run_dir_of(path)
        of = f" ({run_dir.name})" if loaded_run.members else ""
        overrides = overrides_of(run_dir)
        if overrides is not None:
            rows.append((f"training{of}", shlex.join(["flowtrain", *overrides])))
        if dates := training_dates(run_dir):
            rows.append((f"trained on{of}", dates))
    if not loaded_run.members and "seed" in loaded_run.config:
        rows.append(("seed of the training", str(loaded_run.config["seed"])))
    return [
        *rows,
        ("evaluation", shlex.join(["floweval", *arguments])),
        ("evaluated on", f"{datetime.now():%Y-%m-%d %H:%M}"),
        ("seed of the evaluation", str(seed)),
        ("versions", versions()),
        ("device", describe_device(loaded_run.flow.like.device)),
    ]


def training_dates(run_dir: Path) -> str:
    """Returns the first and the last date in the log of a run, as in "2026-01-31 12:00 to 2026-01-31 14:30".

    The text is empty if there is no log.
    """
    try:
        found = STAMP.findall((run_dir / "flowtrain.log").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""
