"""The comparison script: table cells, figure, and a run with minimal training."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare.py"
ROW: dict[str, Any] = {
    "data": "moons", "method": "flow_matching", "likelihood": "ODE, rtol 1e-05", "nll": 2.4, "nll_stderr": 0.01,
    "entropy": 2.39, "kl": 0.01, "kl_stderr": 0.002, "nfe": 50.0, "train_seconds": 31.0, "sample_seconds": 0.4,
    "sample_nfe": 40.0, "parameters": 9224, "sliced_wasserstein": 0.05, "sliced_wasserstein_4": 0.1,
}  # fmt: skip


@pytest.fixture
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_and_figure_are_written(compare: ModuleType, tmp_path: Path) -> None:
    unsolved = {**ROW, "method": "glow", "nfe": None, "sample_nfe": None, "sliced_wasserstein_4": None}
    unknown = {**ROW, "data": "gas", "entropy": None, "kl": None, "kl_stderr": None}
    assert compare.cells(ROW)[3:5] == ["2.400 ± 0.010", "0.010 ± 0.002"]
    assert compare.cells(unsolved)[7:9] == ["-", "-"]
    assert compare.cells(unknown)[4] == "-"
    compare.draw(tmp_path / "compare.png", [ROW, unsolved, unknown])
    assert (tmp_path / "compare.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    keys = ["trainer.steps=2", "data.n_val=20", "data.n_test=20", "trainer.batch_size=8"]
    command = [sys.executable, str(SCRIPT), "moons", "--methods", "realnvp", "ffjord", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--set", *keys], capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "compare.json").read_text())
    assert [row["method"] for row in rows] == ["realnvp", "ffjord"]
    assert (tmp_path / "compare.md").read_text() == done.stdout
