"""Help and refused commands do not load torch, NumPy or matplotlib, whose imports take most of the time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowtrain.cli import evaluate, sample
from flowtrain.cli.overrides import check_composition
from flowtrain.evaluation.anomalies import RATE
from flowtrain.utils.errors import ConfigError

# command lines and their exit codes
LINES = [
    ("flowtrain model=nope", 2),
    ("flowtrain trainer.stepss=3", 2),
    ("flowtrain +nope=3", 2),
    ("flowtrain nope", 2),
    ("flowtrain --nope", 2),
    ("flowtrain from=nope", 2),
    ("flowtrain resume=nope", 2),
    ("flowtrain --help", 0),
    ("flowtrain --help all", 0),
    ("flowtrain --help trainer.lr", 0),
    ("flowtrain model=glow data=mnist --help", 0),
    ("flowtrain --version", 0),
    ("flowtrain runs", 0),
    ("flowtrain runs nope", 2),
    ("flowtrain runs --help", 0),
    ("floweval", 2),
    ("floweval nope", 2),
    ("floweval --help all", 0),
    ("floweval --help solver", 0),
    ("flowsample x y", 2),
    ("flowsample --help", 0),
    ("flowexport nope", 2),
    ("flowexport --help", 0),
]

# runs the lines in one process, and prints for each one its exit code and the slow modules that are loaded
CODE = """
import contextlib, io, json, sys
from flowtrain.cli import entry_points
found = []
for line in json.loads(sys.argv[1]):
    sys.argv[:] = line.split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            getattr(entry_points, sys.argv[0])()
        except SystemExit as end:
            code = end.code
    slow = {"torch", "numpy", "matplotlib", "sympy", "scipy", "sklearn", "polars", "tqdm"}
    found.append([line, code, sorted(slow & set(sys.modules))])
print(json.dumps(found))
"""


def test_help_and_refused_commands_do_not_load_torch(tmp_path: Path) -> None:
    given = json.dumps([line for line, _ in LINES])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", CODE, given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [[line, code, []] for line, code in LINES]
    assert list(tmp_path.iterdir()) == []


def test_sweeps_and_flags_are_left_to_hydra() -> None:
    with pytest.raises(ConfigError, match="nope"):
        check_composition(["+nope=1"])
    for flags in (["-m"], ["--cfg", "job"]):
        check_composition(["+nope=1", *flags])


def test_help_agrees_with_constants_of_modules_that_load_torch() -> None:
    assert f"{RATE:g}" in evaluate.USAGE.options["false_positive_rate"]
    assert sample.LOG_WEIGHT in sample.USAGE.options["weights"]
