"""Sliced Wasserstein distances against closed forms, and sample quality for each number of steps."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import Run
from helpers.contexts import conditional, drawn_from
from torch import Tensor

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.data.toys.shapes import Moons
from flowtrain.evaluation.sample_quality import distance_error, quality, sliced_wasserstein
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.velocity_field import Given
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import ConfigError


def test_wasserstein_distance_of_a_shift_equals_the_closed_form() -> None:
    """SW_2^2(x, x + c) = E <a, c>^2 = |c|^2 / d."""
    x, c = torch.randn(500, 3), torch.tensor([1.0, -2.0, 0.5])
    found = sliced_wasserstein(x, x + c, projections=5000)
    assert found == pytest.approx(float(c.norm()) / math.sqrt(3), rel=0.02)


def test_wasserstein_distance_of_scaled_gaussians() -> None:
    """W_2 of N(0, 1) and N(0, s^2) is |s - 1| for every projection, and the order of the rows does not matter."""
    x = torch.randn(5000, 2)
    y = 1.5 * torch.randn(5000, 2)
    assert sliced_wasserstein(x, y) == pytest.approx(0.5, rel=0.05)
    assert sliced_wasserstein(x, x[torch.randperm(len(x))]) == 0


def test_wasserstein_distance_is_symmetric_and_leaves_rng_unchanged() -> None:
    x, y = torch.randn(50, 1, 2, 2), torch.randn(50, 1, 2, 2)
    state = torch.get_rng_state()
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(y, x), rel=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_use_the_labels_of_the_data() -> None:
    """The field moves class 0 to -5 and class 1 to 5, and nearly all data are of class 0."""
    field = MLPField(2, [8], "concat", "tanh", classes=2)
    flow = Flow((2,), Chain([Continuous(ByClass(field), ode_solver("dopri5"), TraceRule("exact"))]), classes=2)
    data = Moons(n_val=400, n_test=400)
    data.classes = 2
    label = (torch.arange(400) % 20 == 0).long()
    data.val_labels = data.test_labels = label
    shift = (10.0 * label - 5).unsqueeze(1)
    data.val, data.test = torch.randn(400, 2) + shift, torch.randn(400, 2) + shift
    found = quality(flow, data, [1])
    assert found.exact.sliced_wasserstein < 0.4
    assert found.data < 0.4
    # the solver of the flow is restored
    assert flow.solver is not None
    assert flow.solver.method == "dopri5"


class ByClass(MLPField):
    def __init__(self, field: MLPField) -> None:
        super().__init__(2, [8], "concat", "tanh", classes=2)

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        assert shift is not None
        return shift[..., :2] + 0 * x

    def given(self, label: Tensor) -> Given:
        return Given(self, (10.0 * label - 5).unsqueeze(1).expand(-1, 2))


def test_flow_without_ode_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes no steps"):
        quality(Flow((2,), Chain([Affine(2)])), Moons(n_val=10, n_test=10), [1])


@pytest.mark.slow
def test_sample_quality_is_reported_per_step_count(run: Run, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    small = ["trainer.steps=3", "trainer.batch_size=16", "data.n_val=300", "data.n_test=200", "model.hidden=[8]"]
    small += ["trainer.plot_every=null"]
    code, out, err = run("flowtrain", "objective=flow_matching", *small)
    assert code == 0, err
    run_dir = Path(out.strip().splitlines()[-1])
    # solver.steps replaces the step size of the run
    code, out, err = run("flowtrain", "solver=rk4", "solver.step_size=0.5", *small)
    assert code == 0, err
    code, out, err = run("floweval", f"ckpt={out.strip().splitlines()[-1]}", "solver.steps=4", "out=e.json")
    assert code == 0, err
    assert json.loads(Path("e.json").read_text())["solver"]["step_size"] == 0.25
    # the fixture draws blank figures, but this test checks the quality figure
    request.getfixturevalue("full_size")
    code, out, err = run("flowsample", f"ckpt={run_dir}", "quality=[1,4]")
    assert code == 0, err
    found = json.loads((run_dir / "quality.json").read_text())
    assert [(row["method"], row["steps"], row["nfe"]) for row in found["rows"]] == [
        ("euler", 1, 1), ("euler", 4, 4), ("midpoint", 1, 2), ("midpoint", 4, 8),
    ]  # fmt: skip
    assert found["n"] == 200
    assert (run_dir / "plots/quality.png").stat().st_size > 10_000
    assert "sliced W2" in out
    code, out, err = run("flowsample", f"ckpt={run_dir}", "quality=[2]", "solver=rk4", "solver.steps=9", "out=q.json")
    assert code == 0, err
    assert [row["method"] for row in json.loads(Path("q.json").read_text())["rows"]] == ["rk4"]
    for bad, words in ((["quality=3"], "quality"), (["quality=[2]", "n=5"], "n: ")):
        code, _, err = run("flowsample", f"ckpt={run_dir}", *bad)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert words in err
    code, out, err = run("flowsample", f"ckpt={run_dir}", "solver=euler", "solver.steps=4", "n=50")
    assert code == 0, err


def test_the_standard_error_is_the_spread_of_repeated_distances() -> None:
    found, errors = [], []
    for _ in range(60):
        x, y = torch.randn(300, 2), torch.randn(300, 2) + 0.4
        found.append(sliced_wasserstein(x, y, 64))
        errors.append(distance_error(x, y))
    spread = float(torch.tensor(found).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.25)


def test_the_standard_error_needs_enough_rows_and_ignores_their_order() -> None:
    assert math.isnan(distance_error(torch.randn(39, 2), torch.randn(39, 2)))
    x, y = torch.randn(400, 2).sort(0).values, torch.randn(400, 2).sort(0).values + 1
    shuffled = distance_error(x[torch.randperm(400)], y[torch.randperm(400)])
    assert distance_error(x, y) == pytest.approx(shuffled, rel=0.8)


def test_samples_of_a_flow_with_context_columns_have_the_contexts_of_the_test_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow, given = conditional("ffjord"), []
    data, sample = drawn_from(flow, 60), Flow.sample
    monkeypatch.setattr(
        Flow, "sample", lambda self, n, context: (given.append(context), sample(self, n, context=context))[1]
    )
    quality(flow, data, [2])
    # the first samples only warm up
    assert len(given) == 4
    assert all(torch.equal(context, data.test_context) for context in given[1:])
