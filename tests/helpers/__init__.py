"""Types, classes and parameters that tests import by name, because fixtures cannot provide them at import time.

Everything else that tests share is a fixture in a conftest.py.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from flowtrain.cli import evaluate, export, sample, train
from flowtrain.training.trainer import Trainer

# the commands import these modules when they first run. A module that a test with patched functions imports first
# would keep these functions in all later tests
for module in ("evaluate_run", "export_run", "list_runs", "sample_run", "sweep_jobs"):
    import_module(f"flowtrain.cli.{module}")

COMMANDS = {"flowtrain": train.main, "floweval": evaluate.main, "flowsample": sample.main, "flowexport": export.main}

# types of the fixtures in tests/conftest.py that return functions
Run = Callable[..., tuple[int, str, str]]
Train = Callable[..., str]
Evaluate = Callable[..., dict[str, Any]]
Refused = Callable[..., str]
Compose = Callable[..., dict[str, Any]]
MakeTrainer = Callable[..., Trainer]
OnlyPrograms = Callable[..., None]
ReadRows = Callable[[Path], list[dict[str, Any]]]

# overrides for a run of a few steps, and for a small FFJORD
SMALL = ["trainer.steps=4", "trainer.batch_size=16", "trainer.plot_every=null", "data.n_val=20", "data.n_test=50"]
TINY = ["model.hidden=[8]", "solver.rtol=1e-3"]
