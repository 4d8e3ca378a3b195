"""Flow matching, its couplings, reflow and the hybrid: values, minimizers, refusals, resume, the commands."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, stop_at
from torch import Tensor, nn

from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.scale import Standardize
from flowtrain.build import build_data, build_flow, build_objective, build_settings, load
from flowtrain.cli.messages import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.divergence import TraceRule
from flowtrain.errors import ConfigError
from flowtrain.fields.mlp import MLPField
from flowtrain.flow import Flow
from flowtrain.objectives.coupling import optimal
from flowtrain.objectives.flow_matching import FlowMatching
from flowtrain.objectives.hybrid import Hybrid
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.objectives.matching import Ends, stratified
from flowtrain.objectives.rectified import Rectified, drawn
from flowtrain.paths import config_dir
from flowtrain.regularizers import Regularizer, spectral
from flowtrain.solvers import ode_solver, record_solves
from flowtrain.training import checkpoint
from flowtrain.training.loop import Trainer

SMALL = ["trainer.batch_size=16", "trainer.log_every=1", "data.n_val=20", "data.n_test=20", "model.hidden=[8]"]
PLAIN = Regularizer()


def around(field: nn.Module, *, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()) -> Flow:
    continuous = Continuous(field, ode_solver("dopri5", rtol=1e-9), TraceRule("exact"))
    return Flow((2,), Chain([*before, continuous, *after]))


class Linear(nn.Module):
    """v = a + B x, whatever the time: the regression on it is solved by hand."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.a + x @ self.b.T


class GaussianField(nn.Module):
    """The minimizer E[x1 - x0 | x_t] in closed form for independent x0 ~ N(0, 1), x1 ~ N(m, s^2), per coordinate."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m, self.s = m, s
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(-1, 1) if t.dim() else t
        variance = (1 - t) ** 2 + (t * self.s) ** 2
        return self.m + (t * self.s**2 - (1 - t)) / variance * (x - t * self.m) + 0 * self.unused


def test_the_minimizer_of_flow_matching_has_the_density_of_the_data() -> None:
    """Theorem 1 of Lipman et al., with the exact field of a Gaussian: the likelihood is then that of the Gaussian."""
    flow = around(GaussianField(1.5, 0.4)).eval()
    x = 1.5 + 0.4 * torch.randn(200, 2)
    expected = torch.distributions.Normal(1.5, 0.4).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-6, atol=1e-6)


def test_no_field_beats_the_minimizer() -> None:
    """Its loss is what E Var[x1 - x0 | x_t] leaves, 2 int_0^1 s^2 / ((1 - t)^2 + t^2 s^2) dt."""
    s, n = 0.4, 200_000
    x = 1.5 + s * torch.randn(n, 2)

    def loss(m: float, spread: float) -> float:
        torch.manual_seed(1)
        return FlowMatching(around(GaussianField(m, spread)), PLAIN)(x)[0].item()

    t = (torch.arange(10_000) + 0.5) / 10_000
    least = float((2 * s**2 / ((1 - t) ** 2 + (t * s) ** 2)).mean())
    assert loss(1.5, s) == pytest.approx(least, rel=0.01)
    assert min(loss(1.7, s), loss(1.3, s), loss(1.5, 0.5), loss(1.5, 0.3)) > loss(1.5, s)


def test_the_loss_and_its_gradient_by_hand() -> None:
    field = Linear(torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.1], [-0.4, 0.2]]))
    objective = FlowMatching(around(field), PLAIN)
    x = torch.randn(50, 2)
    torch.manual_seed(3)
    loss, terms = objective(x)
    loss.backward()
    torch.manual_seed(3)
    x0, t = torch.randn(50, 2), stratified(50, x).unsqueeze(1)
    at = (1 - t) * x0 + t * x
    error = field.a + at @ field.b.T - (x - x0)
    assert set(terms) == {"matching"}
    torch.testing.assert_close(loss, error.square().sum(1).mean())
    torch.testing.assert_close(field.a.grad, 2 * error.mean(0))
    torch.testing.assert_close(field.b.grad, 2 * error.T @ at / 50)


def test_nothing_is_solved_and_only_the_field_is_trained() -> None:
    after = Affine(2)
    objective = FlowMatching(around(MLPField(2, [8], "concat", "tanh"), after=(after,)), PLAIN).train()
    with record_solves() as solves:
        objective(torch.randn(10, 2))[0].backward()
    assert solves == []
    assert all(p.grad is None for p in after.parameters())
    assert all(p.grad is not None for p in objective.ends.continuous.field.parameters())


def test_times_are_stratified_and_uniform() -> None:
    t = torch.stack([stratified(20, torch.zeros(())) for _ in range(500)])
    assert bool((t.sort(1).values * 20).floor().eq(torch.arange(20)).all())
    # each row of the batch meets all times
    assert float(t[:, 0].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(t[:, 0].var()) == pytest.approx(1 / 12, rel=0.15)


def test_optimal_coupling_is_the_best_of_all_pairings() -> None:
    z, x = torch.randn(7, 2), 2 * torch.randn(7, 2) + 1

    def cost(order: tuple[int, ...]) -> float:
        return float((z[list(order)] - x).square().sum())

    best = min(itertools.permutations(range(7)), key=cost)
    assert torch.equal(optimal(z, x), z[list(best)])


def test_optimal_coupling_of_images_permutes() -> None:
    z, x = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    found = optimal(z, x)
    assert found.shape == z.shape
    assert {tuple(row.flatten().tolist()) for row in found} == {tuple(row.flatten().tolist()) for row in z}


def test_coupling_without_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"flowtrain\[ot\]"):
        optimal(torch.randn(3, 2), torch.randn(3, 2))


def test_optimal_coupling_stays_within_classes() -> None:
    """Base points that depended on the label would not be those that samples are drawn from."""
    field = MLPField(2, [8], "concat", "tanh", classes=2)
    flow = Flow((2,), Chain([Continuous(field, ode_solver("dopri5"), TraceRule("exact"))]), classes=2)
    label = torch.arange(200) % 2
    # the classes lie apart: paired over both, base points left of 0 would all go to class 0
    x = torch.randn(200, 2) * 0.1 + (2.0 * label - 1).unsqueeze(1)
    x0, x1, labels = FlowMatching(flow, PLAIN, "optimal").pairs(x, label)
    assert labels is not None
    assert torch.equal(x1, x)
    for y in (0, 1):
        assert float(x0[labels == y].mean()) == pytest.approx(0, abs=0.3)
    # and within a class the order is that of the samples
    assert float((x0 - x1)[labels == 0].square().sum()) < float((torch.randn(100, 2) - x1[labels == 0]).square().sum())


def test_the_ends_of_the_continuous_part() -> None:
    before, after, scale = Affine(2), Affine(2), Standardize((2,))
    with torch.no_grad():
        for p in (*before.parameters(), *after.parameters()):
            p.add_(0.3 * torch.randn_like(p))
    scale.fit(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5]))
    flow = around(Linear(torch.ones(2), -torch.eye(2)), before=(before,), after=(Chain([after]), scale)).eval()
    ends, z = Ends(flow), torch.randn(5, 2)
    x = flow(z)
    x0, x1 = ends.from_base(z, None), ends.from_data(x, None)
    torch.testing.assert_close(ends.continuous.map_forward(x0), x1)


@pytest.mark.parametrize(
    ("bijection", "words"),
    [
        (lambda: Chain([Affine(2)]), "has 0"),
        (lambda: Chain([continuous(), continuous()]), "has 2"),
        (lambda: Nested(continuous()), "has 1"),
    ],
)
def test_flows_refused(bijection: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FlowMatching(Flow((2,), bijection()), PLAIN)


def continuous() -> Continuous:
    return Continuous(MLPField(2, [4], "concat", "tanh"), ode_solver("dopri5"), TraceRule("exact"))


class Nested(Affine):
    """A continuous part inside another bijection than a chain."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(2)
        self.inner = inner


@pytest.mark.parametrize("key", ["kinetic", "jacobian", "acceleration", "end_time"])
def test_path_regularizers_are_refused_where_nothing_is_solved(key: str) -> None:
    with pytest.raises(ConfigError, match="solves none"):
        FlowMatching(around(MLPField(2, [4], "concat", "tanh")), Regularizer(**{key: 0.1}))


def test_spectral_norm_is_added_to_matching() -> None:
    field = MLPField(2, [4], "concat", "tanh")
    objective = FlowMatching(around(field), Regularizer(spectral=0.3))
    loss, terms = objective(torch.randn(9, 2))
    torch.testing.assert_close(terms["spectral"], spectral(field))
    torch.testing.assert_close(loss, terms["matching"] + 0.3 * terms["spectral"])


def test_reflow_pairs_are_the_ends_of_the_teachers_paths() -> None:
    a, b = torch.tensor([0.5, -1.0]), torch.tensor([[0.2, -0.7], [0.6, 0.1]])
    x0, x1, labels = drawn(around(Linear(a, b)).eval(), 30, rtol=1e-9)
    # x' = a + B x: [x; 1] moves by the exponential of [[B, a], [0, 0]]
    generator = torch.zeros(3, 3)
    generator[:2, :2], generator[:2, 2] = b, a
    move = torch.linalg.matrix_exp(generator)
    torch.testing.assert_close(x1, x0 @ move[:2, :2].T + move[:2, 2], rtol=1e-6, atol=1e-6)
    assert labels is None


def test_reflow_straightens() -> None:
    """A rotation by a quarter turn, reflowed: one Euler step then lands where the teacher's exact solve does."""
    torch.manual_seed(0)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) * math.pi / 2
    teacher = around(Linear(torch.zeros(2), turn)).eval()
    student = around(MLPField(2, [32, 32], "concat", "swish"))
    objective = Rectified(student, PLAIN, teacher, seed=0, pairs=2000, rtol=1e-6)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        objective(torch.empty(256, 2))[0].backward()
        optimizer.step()
    z = torch.randn(500, 2)
    (student_part,) = (m for m in student.modules() if isinstance(m, Continuous))
    (teacher_part,) = (m for m in teacher.modules() if isinstance(m, Continuous))
    student_part.solver = ode_solver("euler", steps=1)
    teacher_part.solver = ode_solver("dopri5")
    with torch.no_grad():
        exact = teacher(z)
        one = (student.eval()(z) - exact).square().mean().sqrt()
        teacher_part.solver = ode_solver("euler", steps=1)
        before = (teacher(z) - exact).square().mean().sqrt()
    assert float(one) < 0.2 * float(before)


def test_pairs_are_keyed_by_the_seed_and_leave_the_callers_randomness() -> None:
    flow = around(MLPField(2, [4], "concat", "tanh"))
    state = torch.get_rng_state()
    pools = [Rectified(flow, PLAIN, flow, seed=seed, pairs=10).pool[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[0], pools[2])


def test_hybrid_changes_its_loss_once() -> None:
    flow = around(MLPField(2, [4], "concat", "tanh"))
    objective = Hybrid(flow, Regularizer(kinetic=0.1, spectral=0.1), steps=10, matching=0.7)
    x = torch.randn(5, 2)
    names = []
    for step in range(10):
        objective.begin(step)
        names.append(tuple(objective(x)[1]))
    assert names == [("matching", "spectral")] * 7 + [("nll", "kinetic", "spectral")] * 3
    assert objective.likelihood_from == 7
    torch.manual_seed(0)
    expected = Likelihood(flow, Regularizer(kinetic=0.1, spectral=0.1)).train()(x)[0]
    torch.testing.assert_close(objective.train()(x)[0], expected)


@pytest.mark.parametrize("share", [0.0, 0.01, 2.5, 10, "half"])
def test_shares_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match=r"objective.matching"):
        Hybrid(around(MLPField(2, [4], "concat", "tanh")), PLAIN, steps=10, matching=share)


def trained(run_dir: Path, *overrides: str, stop: int | None = None) -> Trainer:
    torch.set_default_dtype(torch.float32)
    config = compose_defaults([*SMALL, *overrides])
    torch.manual_seed(0)
    data = build_data(config)
    flow = build_flow(config, data.samples)
    # untrained, it would be the identity, and its student would have nothing to learn
    teacher = build_flow(config, data.samples)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    last = run_dir / "checkpoints/last.pt"
    saved = checkpoint.load(last) if last.exists() else None
    objective = build_objective(config, flow, teacher)
    trainer = Trainer(objective, flow, data, build_settings(config), run_dir, config, saved)
    if stop:
        stop_at(trainer, stop)
    trainer.fit()
    return trainer


STEPS = ["trainer.steps=10", "trainer.val_every=5"]


@pytest.fixture(scope="module", params=["flow_matching", "hybrid", "rectified"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Trainer]:
    """A run that was never stopped, and its overrides."""
    torch.set_num_threads(1)
    name = request.param
    keys = [f"objective={name}", *STEPS]
    keys += ["objective.matching=0.6"] * (name == "hybrid") + ["objective.pairs=100"] * (name == "rectified")
    return keys, trained(tmp_path_factory.mktemp("whole"), *keys)


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resume_is_exact_to_the_bit(whole: tuple[list[str], Trainer], stop: int, tmp_path: Path) -> None:
    """A stop before, at and after the hybrid's change of loss."""
    keys, run = whole
    assert any(bool(p.abs().max() > 0) for p in run.ema.shadow.values() if p.shape == (2, 8))  # type: ignore[union-attr]
    trained(tmp_path, *keys, stop=stop)
    again = trained(tmp_path, *keys)
    for key, value in run.flow.state_dict().items():
        assert torch.equal(value, again.flow.state_dict()[key]), key


def test_the_hybrid_goes_on_from_its_averaged_weights(tmp_path: Path) -> None:
    keys = ["objective=hybrid", "objective.matching=6", *STEPS, "trainer.ema=0.9"]
    trainer = trained(tmp_path, *keys, stop=6)
    assert trainer.ema is not None
    average = {name: value.clone() for name, value in trainer.ema.shadow.items()}
    assert any(not torch.equal(p, average[name]) for name, p in trainer.flow.named_parameters())
    trainer.begin_anew()
    assert all(torch.equal(p, average[name]) for name, p in trainer.flow.named_parameters())
    assert not trainer.optimizer.state


def train_rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.metrics.rows if row["split"] == "train"]


def test_rows_of_matching_have_null_where_nothing_was_solved(tmp_path: Path) -> None:
    rows = train_rows(trained(tmp_path, "objective=flow_matching", *STEPS))
    assert len(rows) == 10
    for row in rows:
        assert row["matching"] > 0
        assert all(row[key] is None for key in ("nll", "nfe_forward", "nfe_backward", "rtol", "atol"))
        assert {"seconds", "grad_norm", "lr"} <= set(row)


def test_the_likelihood_of_a_hybrid_begins_anew(tmp_path: Path) -> None:
    keys = ["objective=hybrid", "objective.matching=0.6", "trainer.lr=0.01", "trainer.lr_warmup=2", *STEPS]
    trainer = trained(tmp_path, *keys, "solver.warmup=2", "solver.train_rtol=null", "trainer.ema=0.9")
    rows = train_rows(trainer)
    assert [row["nll"] is None for row in rows] == [True] * 6 + [False] * 4
    # the cosine comes down before the change and starts again there, after its warm-up; so does the tolerance
    assert [row["lr"] for row in rows[:2]] == pytest.approx([row["lr"] for row in rows[6:8]], rel=0.2)
    assert rows[5]["lr"] < 0.3 * rows[1]["lr"]
    assert [row["rtol"] for row in rows[6:]] == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5])
    # averaging too: four updates since
    assert trainer.ema is not None
    assert trainer.ema.updates == 4
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {4}


def test_plateau_tightens_the_tolerance_with_the_learning_rate_and_only_then_stops_early(tmp_path: Path) -> None:
    """A learning rate of next to nothing finds no new best: every validation halves it, until patience runs out."""
    plateau = ["trainer.lr_decay=plateau", "trainer.lr_plateau_patience=1", "trainer.patience=3", "trainer.lr_warmup=0"]
    keys = ["trainer.lr=1e-12", "trainer.steps=50", "trainer.val_every=1", "trainer.ema=null"]
    trainer = trained(tmp_path, *plateau, *keys)
    rows = train_rows(trainer)
    # the first validation is a best; from the second on each halves
    assert [row["rtol"] for row in rows[:6]] == pytest.approx([1e-3, 1e-3, 10**-3.5, 1e-4, 10**-4.5, 1e-5])
    assert "early stopping" in str(trainer.stopped_by)
    assert trainer.step == 7


def test_from_begins_with_the_weights_model_and_data_of_a_run(run: Run, tmp_path: Path) -> None:
    small = ["trainer.steps=3", "trainer.batch_size=16", "data.n_val=50", "data.n_test=50"]
    code, out, err = run("flowtrain", "objective=flow_matching", "data=circles", "model.hidden=[6]", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    # a learning rate of next to nothing: what it began with is what it ends with
    code, out, err = run("flowtrain", f"from={first}", "trainer.steps=1", "trainer.lr=1e-12", "trainer.ema=null")
    assert code == 0, err
    second = out.strip().splitlines()[-1]
    x = torch.randn(20, 2)
    torch.testing.assert_close(load(second).log_prob(x), load(first).log_prob(x))
    assert "on circles" in err
    code, out, err = run("flowtrain", "objective=rectified", f"from={first}", "objective.pairs=100", "trainer.steps=4")
    assert code == 0, err
    third = Path(out.strip().splitlines()[-1])
    saved = checkpoint.load(third / "checkpoints/last.pt")
    assert saved["config"]["from"] == str(Path(first).absolute() / "checkpoints/best.pt")
    code, _, err = run("flowtrain", f"resume={third}", "trainer.steps=6")
    assert code == 0, err


def test_rectified_goes_on_without_the_run_it_began_from_and_hybrid_to_more_steps(run: Run, tmp_path: Path) -> None:
    small = ["trainer.batch_size=16", "data.n_val=50", "data.n_test=50", "model.hidden=[6]", "trainer.val_every=5"]
    code, out, err = run("flowtrain", "objective=hybrid", "trainer.steps=10", "objective.matching=0.5", *small)
    assert code == 0, err
    first = Path(out.strip().splitlines()[-1])
    code, _, err = run("flowtrain", f"resume={first}", "trainer.steps=14")
    assert code == 0, err
    saved = checkpoint.load(first / "checkpoints/last.pt")
    # the change stays where it was
    assert saved["config"]["objective"]["matching"] == 5
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert all(row["nll"] is not None for row in rows if row["step"] > 5)
    short = ["objective.pairs=100", "trainer.val_every=2"]
    code, out, err = run("flowtrain", "objective=rectified", f"from={first}", "trainer.steps=4", *short)
    assert code == 0, err
    second = Path(out.strip().splitlines()[-1])
    first.rename(tmp_path / "gone")
    code, _, err = run("flowtrain", f"resume={second}", "trainer.steps=6")
    assert code == 0, err
    code, _, err = run("flowtrain", f"resume={second}", "from=elsewhere")
    assert code == 2
    assert "its own checkpoint" in err


def test_the_teacher_that_is_kept_is_the_one_that_was_learnt_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run goes on while the pairs are drawn."""
    small = ["trainer.steps=2", "trainer.batch_size=16", "data.n_val=50", "data.n_test=50", "model.hidden=[4]"]
    code, out, err = run("flowtrain", *small)
    assert code == 0, err
    best = Path(out.strip().splitlines()[-1]) / "checkpoints/best.pt"
    before = checkpoint.load(best)

    def meanwhile(*arguments: Any) -> Any:
        checkpoint.save(best, {**before, "step": 77})
        return drawn(*arguments)

    monkeypatch.setattr("flowtrain.objectives.rectified.drawn", meanwhile)
    code, out, err = run("flowtrain", "objective=rectified", f"from={best}", "objective.pairs=50", "trainer.steps=2")
    assert code == 0, err
    assert checkpoint.load(best)["step"] == 77
    kept = checkpoint.load(Path(out.strip().splitlines()[-1]) / "checkpoints/teacher.pt")
    assert kept["step"] == before["step"]


def test_a_refused_reflow_leaves_its_directory_free(run: Run) -> None:
    small = ["trainer.steps=2", "trainer.batch_size=16", "data.n_val=50", "data.n_test=50"]
    code, out, err = run("flowtrain", "model.flows=2", "model.hidden=[4]", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    reflow = ["objective=rectified", "hydra.run.dir=here"]
    code, _, err = run("flowtrain", f"from={first}", *reflow, "trainer.steps=2")
    assert code == 2
    assert "has 2" in err
    # what follows a flag is no override, and what the run brings stands before it
    code, out, err = run("flowtrain", f"from={first}", "objective=likelihood", "hydra.run.dir=here", "--cfg", "job")
    assert code == 0, err
    code, _, err = run("flowtrain", f"from={first}", "hydra.run.dir=here", "trainer.steps=2")
    assert code == 0, err
    for bad in ("from=", "from=a,b"):
        code, _, err = run("flowtrain", bad)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert "give one run directory" in err


def test_a_change_of_loss_that_was_moved_behind_the_step_still_begins_anew(tmp_path: Path) -> None:
    keys = ["objective=hybrid", *STEPS, "trainer.ema=0.9"]
    trained(tmp_path, *keys, "objective.matching=8", stop=5)
    trainer = trained(tmp_path, *keys, "objective.matching=3")
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {5}


def test_a_run_from_another_gets_what_suits_its_model(run: Run) -> None:
    small = ["trainer.batch_size=16", "data.n_val=50", "data.n_test=50"]
    code, out, err = run("flowtrain", "model=realnvp", "data=circles", "trainer.steps=2", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    code, out, err = run("flowtrain", f"from={first}", "trainer.steps=2")
    assert code == 0, err
    second = Path(out.strip().splitlines()[-1])
    saved = checkpoint.load(second / "checkpoints/last.pt")["config"]
    assert (saved["trainer"]["lr"], saved["model"]["name"]) == (0.005, "realnvp")
    assert "realnvp" in (second / ".hydra/config.yaml").read_text()


@pytest.mark.parametrize("resumed", [False, True])
def test_the_run_that_another_begins_from_runs_no_code(resumed: bool, run: Run, tmp_path: Path) -> None:
    """Neither its own config nor that of the run on it can grant it trust."""
    small = ["trainer.batch_size=16", "data.n_val=50", "data.n_test=50", "model.hidden=[6]", "trainer.steps=2"]
    code, out, err = run("flowtrain", *small)
    assert code == 0, err
    first = Path(out.strip().splitlines()[-1])
    best = checkpoint.load(first / "checkpoints/best.pt")
    evil = {"_target_": "shutil.copyfile", "src": "/etc/hostname", "dst": str(tmp_path / "stolen")}
    if resumed:
        code, out, err = run(
            "flowtrain", "objective=rectified", f"from={first}", "objective.pairs=9", "trainer.steps=2"
        )
        assert code == 0, err
        first = Path(out.strip().splitlines()[-1])
        last = checkpoint.load(first / "checkpoints/last.pt")
        checkpoint.save(first / "checkpoints/last.pt", {**last, "config": {**last["config"], "trust": ["shutil"]}})
        checkpoint.save(first / "checkpoints/teacher.pt", {**best, "config": {**best["config"], "solver": evil}})
        code, _, err = run("flowtrain", f"resume={first}", "trainer.steps=3")
    else:
        checkpoint.save(first / "checkpoints/best.pt", {**best, "config": {**best["config"], "solver": evil}})
        code, _, err = run("flowtrain", f"from={first}", "trainer.steps=3")
    assert code != 0
    assert "is trusted there" in err
    assert not (tmp_path / "stolen").exists()


def test_from_on_data_of_another_kind_names_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(f"{i},{i * i % 7}" for i in range(50)))
    (tmp_path / "b.csv").write_text("\n".join(f"{i},{i * i % 7},{i % 3}" for i in range(50)))
    small = ["trainer.steps=2", "model.hidden=[4]", "trainer.batch_size=8"]
    code, out, err = run("flowtrain", "data=array", f"data.path={tmp_path}/a.csv", *small)
    assert code == 0, err
    first = out.strip().splitlines()[-1]
    (tmp_path / "a.csv").rename(tmp_path / "moved.csv")
    code, _, err = run("flowtrain", f"from={first}", f"data.path={tmp_path}/moved.csv", "trainer.steps=2")
    assert code == 0, err
    code, _, err = run("flowtrain", f"from={first}", f"data.path={tmp_path}/b.csv", "trainer.steps=2")
    assert code == 2
    assert "from: the run was trained on samples whose event_shape" in err


def test_patience_can_run_out_where_it_is_given() -> None:
    """A run of fewer validations than its patience would never stop early."""
    for keys in (
        ["data=array", "data.path=x"],
        ["data=array", "data.path=x", "model=realnvp"],
        ["data=array", "data.path=x", "model=glow"],
        ["data=array", "data.path=x", "objective=flow_matching"],
        ["data=mnist", "model=realnvp"],
        ["data=mnist", "model=glow"],
    ):
        trainer = compose_defaults(keys)["trainer"]
        settled = 2 / 3 if "model=realnvp" not in keys and "model=glow" not in keys and len(keys) == 2 else 0
        assert trainer["steps"] * (1 - settled) / trainer["val_every"] > trainer["patience"], keys


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["objective=rectified"], "from=RUN_DIR"),
        (["from=nowhere", "experiment=rings"], "experiment"),
        (["from=nowhere", "~model.activation"], "model.activation"),
        (["objective=rectified", "from=nowhere"], "there is no such file"),
        (["objective=rectified", "from=nowhere", "model.hidden=[3]"], "model.hidden"),
        (["from=nowhere", "data=circles"], "data"),
        (["objective=flow_matching", "model=realnvp"], "has 0"),
        (["objective=flow_matching", "objective.coupling=best"], "independent, optimal"),
        (["objective=flow_matching", "model.flows=2"], "has 2"),
        (["objective=hybrid", "objective.matching=1.5"], "objective.matching"),
        (["objective=flow_matching", "regularizer=rnode"], "solves none"),
        (["solver=euler", "solver.steps=4", "solver.step_size=0.1"], "give one of them"),
        (["solver.steps=4"], "chooses its own"),
        (["model.init_scale=0"], "model.init_scale"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], words: str, run: Run) -> None:
    code, _, err = run("flowtrain", *arguments, "trainer.steps=2")
    assert (code, len(err.strip().splitlines())) in ((2, 1), (1, 1)), err
    assert words in err


def test_first_weights_spread_over_the_data() -> None:
    """Ridges w x + b = 0 at distances -b / |w| from 0 that are spread like points along w, not all near it."""
    torch.manual_seed(0)
    layer = MLPField(3, [4000, 2], "concatsquash", "tanh", init_scale=1.5).requires_grad_(False).body[0].linear
    norms = layer.weight.norm(dim=1)
    assert float(norms.square().mean().sqrt()) == pytest.approx(1.5 * 2**0.5, rel=0.05)
    assert float((-layer.bias / norms).std()) == pytest.approx(2, rel=0.05)


def test_steps_are_a_step_size() -> None:
    assert ode_solver("euler", steps=4).step_size == 0.25
    assert ode_solver("rk4", steps=3).steps_between(0.0, 1.0) == 3


def test_images_with_one_continuous_part_are_matched(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    samples = Samples((1, 4, 4), discrete=True, levels=16, classes=3)
    keys = ["model.field=concat", "model.activation=softplus", "model.scales=0", "model.conditional=true"]
    config = compose_defaults(["objective=flow_matching", *keys, "model.hidden=[4]"])
    flow = build_flow(config, samples)
    x, label = torch.randint(16, (9, 1, 4, 4), dtype=torch.uint8), torch.arange(9) % 3
    flow.bijection.initialize(flow.dequantized(x), label)
    loss, _ = build_objective(config, flow).train()(x, label)
    loss.backward()
    assert bool(torch.isfinite(loss))
    with pytest.raises(ConfigError, match="scales=0"):
        build_objective(config, build_flow({**config, "model": {**config["model"], "scales": 1}}, samples))


@pytest.mark.usefixtures("full_size")
def test_quality_against_steps(run: Run, tmp_path: Path) -> None:
    small = ["trainer.steps=3", "trainer.batch_size=16", "data.n_val=300", "data.n_test=200", "model.hidden=[8]"]
    code, out, err = run("flowtrain", "objective=flow_matching", *small)
    assert code == 0, err
    run_dir = Path(out.strip().splitlines()[-1])
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
    for bad, words in ((["quality=3"], "quality"), (["quality=[2]", "n=5"], "n: has no use")):
        code, _, err = run("flowsample", f"ckpt={run_dir}", *bad)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert words in err
    code, out, err = run("flowsample", f"ckpt={run_dir}", "solver=euler", "solver.steps=4", "n=50")
    assert code == 0, err
    # of a run with a step size, steps take its place
    code, out, err = run("flowtrain", "solver=rk4", "solver.step_size=0.5", *small)
    assert code == 0, err
    code, out, err = run("floweval", f"ckpt={out.strip().splitlines()[-1]}", "solver.steps=4", "out=e.json")
    assert code == 0, err
    assert json.loads(Path("e.json").read_text())["solver"]["step_size"] == 0.25


OTHERS = sorted(
    p.stem for p in (config_dir() / "experiment").glob("*.yaml") if not p.stem.startswith(("mnist_", "search_"))
)


@pytest.mark.parametrize("experiment", OTHERS)
def test_every_other_experiment_trains(experiment: str, run: Run, tmp_path: Path) -> None:
    small = ["trainer.batch_size=4", "trainer.steps=2", "model.hidden=[4]"]
    if experiment == "gas_ffjord":
        (tmp_path / "a.csv").write_text("\n".join(f"{i},{i * i % 7}" for i in range(50)))
        small += ["data.path=a.csv", "objective.matching=1"]
    else:
        small += ["data.n_val=10", "data.n_test=10"]
    code, out, err = run("flowtrain", f"experiment={experiment}", *small)
    assert code == 0, err
    assert (Path(out.splitlines()[-1]) / "result.json").exists()
