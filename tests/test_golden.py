"""Checkpoints of earlier versions keep their density, and evaluate, sample and resume to the same numbers.

tests/golden/README.md explains how these checkpoints were made. If a test here fails, the code is wrong, not the
golden.
"""

import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run
from torch import Tensor
from torch.nn import functional

import flowtrain
from flowtrain import ode
from flowtrain.bijections.continuous import Continuous
from flowtrain.flow import Flow
from flowtrain.nn import conditioners, residual_mlp
from flowtrain.ode.tableaus import TABLEAUS
from flowtrain.training import checkpoint

HERE = Path(__file__).parent / "golden"
GOLDENS = sorted(path.parent for path in HERE.glob("*/*/expected.json"))
NAMES = [f"{path.parent.name}-{path.name}" for path in GOLDENS]

# relative tolerances: rounding differs between machines, and with it the steps of adaptive ODE solvers
FLOAT64, FLOAT32, ADAPTIVE, TRAINED = 1e-9, 1e-5, 1e-4, 1e-4
TORCHDIFFEQ_ENGINE = "flowtrain.ode.torchdiffeq_engine"
# compared keys of a train row in metrics.jsonl
TRAIN_KEYS = ("nll", "lr", "grad_norm", "rtol", "atol")

pytestmark = pytest.mark.usefixtures("float32", "shared_steps", "factors_of_torch")


@pytest.fixture
def shared_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the rows of a batch share the steps of adaptive solvers, as in the versions that made the goldens."""
    problem = Continuous._problem
    monkeypatch.setattr(Continuous, "_problem", lambda *arguments: replace(problem(*arguments), rows=None))


@pytest.fixture
def factors_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch draw the factors of dropout, as in the versions that made the goldens."""

    def drawn(rate: float, width: int, x: Tensor) -> Tensor | None:
        return functional.dropout(x.new_ones(len(x), width), rate).T if rate else None

    for module in (conditioners, residual_mlp):
        monkeypatch.setattr(module, "dropout_factors", drawn)


class Golden:
    """An unpacked, interrupted run of an earlier version, and the numbers which that version computed from it."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.run_dir = folder / "run"
        with tarfile.open(path / "run.tar.xz") as archive:
            archive.extractall(self.run_dir, filter="data")
        self.expected: dict[str, Any] = json.loads((path / "expected.json").read_text())
        self.rows = torch.tensor(self.expected["rows"], dtype=torch.float64)
        labels = self.expected["labels"]
        self.labels = None if labels is None else torch.tensor(labels)
        name = self.expected["data"]
        # the present location of the data
        self.data = [] if name is None else [f"data.path={HERE / 'data' / name}"]

    def flow(self, which: str) -> Flow:
        return flowtrain.load(self.run_dir / f"checkpoints/{which}.pt")

    @torch.no_grad()
    def log_p(self, flow: Flow) -> list[float]:
        found: list[float] = flow.log_prob(self.rows.to(flow.like), self.labels).tolist()
        return found


@pytest.fixture(params=GOLDENS, ids=NAMES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return Golden(request.param, tmp_path)


def close(value: Any, rel: float) -> Any:
    return pytest.approx(value, rel=rel, abs=rel)


def adaptive(flow: Flow) -> bool:
    return flow.solver is not None and flow.solver.adaptive


def test_goldens_cover_every_model() -> None:
    """Also fails if no golden is found."""
    made = {path.parent.name: [p.name for p in GOLDENS if p.parent == path.parent] for path in GOLDENS}
    assert all(any(name.startswith(m) for name in made["1"]) for m in ("affine", "realnvp", "glow", "ffjord"))
    assert len(made["1"]) == 24


@pytest.mark.parametrize("which", ["best", "last"])
def test_density_of_golden_checkpoints_is_unchanged(golden: Golden, which: str) -> None:
    flow = golden.flow(which)
    assert golden.log_p(flow) == close(golden.expected["log_p"][which], ADAPTIVE if adaptive(flow) else FLOAT32)
    flow = flow.double()
    assert golden.log_p(flow) == close(golden.expected["log_p_float64"][which], FLOAT32 if adaptive(flow) else FLOAT64)


def test_separate_steps_change_golden_densities_by_less_than_the_solver_error(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the goldens shared the steps. An accurate solve is nearer to the separate steps of today."""
    flow = golden.flow("best").double()
    if not adaptive(flow) or flow.solver.method not in TABLEAUS or flow.solver.gradient == "adjoint":
        pytest.skip("has no separate steps")
    monkeypatch.undo()
    with torch.no_grad():
        log_p, error = flow.log_prob(golden.rows, golden.labels, with_error=True)
        exact = flow.with_solver(flow.solver.replace(rtol=1e-9, atol=1e-9)).log_prob(golden.rows, golden.labels)
    # the rows near the data
    assert ((log_p - exact).abs() <= error)[:8].all()
    shared = torch.tensor(golden.expected["log_p_float64"]["best"], dtype=torch.float64)
    assert (log_p - exact).abs().max() <= 2 * (shared - exact).abs().max() + 1e-4


def test_resaved_golden_flows_are_bitwise_equal(golden: Golden, tmp_path: Path) -> None:
    flow = golden.flow("best")
    flow.save(tmp_path / "again.pt")
    again = flowtrain.load(tmp_path / "again.pt")
    assert flow.record is not None
    assert again.record is not None
    assert again.record.config["model"] == flow.record.config["model"]
    assert again.record.samples == flow.record.samples
    assert golden.log_p(again) == golden.log_p(flow)


def test_load_imports_torchdiffeq_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` imports torchdiffeq while it builds the flow on the meta device."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchdiffeq" or n == TORCHDIFFEQ_ENGINE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(ode, "torchdiffeq_engine", None, raising=False)
    golden = Golden(HERE / "1/ffjord_adjoint", tmp_path)
    assert golden.log_p(golden.flow("best")) == close(golden.expected["log_p"]["best"], ADAPTIVE)


def test_golden_checkpoints_can_be_sampled(golden: Golden) -> None:
    flow = golden.flow("best")
    x = flow.sample(7)
    assert x.shape == (7, *flow.event_shape)
    assert x.isfinite().all()
    # round trip of the rows near the data
    rows, labels = golden.rows[:8], None if golden.labels is None else golden.labels[:8]
    flow = flow.double()
    with torch.no_grad():
        back = flow.forward(flow.inverse(rows, labels), labels)
    torch.testing.assert_close(back, rows, rtol=0.02 if adaptive(flow) else 1e-6, atol=1e-3)


@pytest.mark.usefixtures("without_figures")
def test_golden_checkpoints_evaluate_to_the_same_numbers(golden: Golden, run: Run) -> None:
    code, _, err = run("floweval", f"ckpt={golden.run_dir}", *golden.data, "split=test", "out=e.json", "device=cpu")
    assert code == 0, err
    same(json.loads(Path("e.json").read_text()), golden.expected["test"])


@pytest.mark.usefixtures("without_figures")
def test_golden_checkpoints_resume_to_the_same_numbers(golden: Golden, run: Run) -> None:
    before = (golden.run_dir / "metrics.jsonl").read_text().splitlines()
    code, _, err = run("flowtrain", f"resume={golden.run_dir}", *golden.data)
    assert code == 0, err
    after = (golden.run_dir / "metrics.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    found, expected = [json.loads(line) for line in after[len(before) :]], golden.expected["resumed"]
    assert [(row["step"], row["split"]) for row in found] == [(r["step"], r["split"]) for r in expected["metrics"]]
    for row, right in zip(found, expected["metrics"], strict=True):
        for key in [key for key in TRAIN_KEYS if key in right]:
            assert row[key] == (None if right[key] is None else close(right[key], TRAINED)), (row["step"], key)
    same(json.loads((golden.run_dir / "result.json").read_text()), expected["test"])
    last = golden.run_dir / "checkpoints/last.pt"
    assert checkpoint.load(last)["step"] == expected["metrics"][-1]["step"]
    assert golden.log_p(flowtrain.load(last)) == close(expected["log_p"], TRAINED)


def same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        assert result[key] == (close(value, TRAINED) if isinstance(value, float) else value), key
