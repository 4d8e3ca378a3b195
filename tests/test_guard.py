"""The guard against fields that exploit a coarse solver, and training's own tolerance."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import stop_at
from torch import Tensor, nn

from flowtrain import run as runs
from flowtrain.build import build_data, build_flow, build_objective, build_settings, load
from flowtrain.cli.messages import compose_defaults
from flowtrain.cli.overrides import overridden
from flowtrain.errors import ConfigError, SolverError
from flowtrain.scores import log_probs
from flowtrain.solvers import Problem, Solver, ode_solver, record_solves
from flowtrain.training import checkpoint, guard
from flowtrain.training.guard import Guard, exploited
from flowtrain.training.loop import Trainer

SMALL = ["data.n_val=100", "data.n_test=20", "trainer.batch_size=64", "model.hidden=[16,16]", "trainer.ema=null"]


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


class Lines(logging.Handler):
    """The messages of a logger; caplog misses them once a command has turned propagation off."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    handler = Lines()
    guard.log.addHandler(handler)
    yield handler.lines
    guard.log.removeHandler(handler)


def compose(*overrides: str) -> dict[str, Any]:
    return compose_defaults([*SMALL, *overrides])


def trainer(run_dir: Path, config: dict[str, Any], saved: dict[str, Any] | None = None) -> Trainer:
    torch.manual_seed(config["seed"])
    data = build_data(config)
    flow = build_flow(config, data.samples)
    return Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, saved)


def rows(run: Trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.metrics.rows]


# one step of rk4 and a learning rate at which the field finds out what it does not see
EXPLOIT = ["solver=rk4", "solver.step_size=1.0", "trainer.lr=0.02", "trainer.lr_decay=constant", "trainer.steps=150"]


def reported_and_true(run: Trainer) -> tuple[float, float]:
    """NLL in nats of training data, by the run's steps and by very short ones."""
    x = run.data.train_batch(run.step - 1, 1000, 0)
    solver = run.flow.eval().solver
    assert solver is not None
    reported = -log_probs(run.flow, x).mean().item()
    with solver.using(step_size=0.01):
        return reported, -log_probs(run.flow, x).mean().item()


def test_a_field_that_exploits_a_coarse_solver_is_caught(tmp_path: Path, lines: list[str]) -> None:
    run = trainer(tmp_path / "off", compose(*EXPLOIT, "trainer.guard_every=null"))
    run.fit()
    reported, true = reported_and_true(run)
    assert reported < true - 0.3
    assert not lines
    run = trainer(tmp_path / "on", compose(*EXPLOIT))
    run.fit()
    reported, true = reported_and_true(run)
    assert abs(reported - true) < 0.05
    assert any("step_size goes from 1 to 0.5" in line for line in lines)
    solver = load(tmp_path / "on").solver
    assert solver is not None
    assert run.flow.solver is not None
    assert solver.step_size == run.flow.solver.step_size < 1


GAP = torch.randn(400, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("gap", "d", "expected"),
    [
        (0.1 + 0.1 * GAP, 2, True),
        (-0.1 + 0.1 * GAP, 2, False),
        (0.1 + 3 * GAP, 2, False),
        (torch.full((400,), 1.9e-3), 2, False),
        (torch.full((400,), 2.1e-3), 2, True),
        (torch.full((400,), 2.1e-3), 3, False),
        (torch.ones(1), 2, False),
    ],
    ids=["clear", "worse", "noise", "floor", "above the floor", "floor in 3-D", "one row"],
)
def test_what_counts_as_exploited(gap: Tensor, d: int, expected: bool) -> None:
    tight = torch.linspace(-100, 0, len(gap))
    assert exploited(tight + gap, tight, d) is expected


class Fake(nn.Module):
    """A flow whose log p is what `lie` makes of its solver's settings, and whose trace probes are recorded."""

    event_shape = (2,)

    def __init__(self, solver: Solver, lie: Callable[[Solver], float]) -> None:
        super().__init__()
        self.solver, self.lie = solver, lie
        self.probes: list[Tensor] = []

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        self.probes.append(torch.rand(3))
        zero = torch.zeros_like(x)
        self.solver.solve(Problem(lambda t, y: torch.zeros_like(y), None, zero, 0.0, 1.0))
        return torch.full((len(x),), self.lie(self.solver))


def guarded(solver: Solver, lie: Callable[[Solver], float], every: int | None = 10) -> tuple[Guard, Fake]:
    flow = Fake(solver, lie)
    return Guard(flow, solver, every), flow  # type: ignore[arg-type]


X = torch.zeros(8, 2)


def test_tightens_until_it_passes(lines: list[str]) -> None:
    solver = ode_solver("dopri5", rtol=1e-5, atol=1e-7, train_rtol=1e-1)
    watch, _ = guarded(solver, lambda s: 1.0 if s.rtol > 2e-3 else 0.0)
    assert watch.check(10, X, 0)
    assert watch.tolerance_at(10) == pytest.approx((1e-3, 1e-5))
    assert (solver.rtol, solver.atol) == (1e-5, 1e-7)
    assert len(lines) == 2
    for part in ("step 10", "-1.0000", "-0.0000", "0.1", "0.01"):
        assert part in lines[0]
    assert not watch.check(20, X, 0)


@pytest.mark.parametrize("control", ["state", "all"])
def test_tightening_stops_at_the_final_tolerance(control: str, lines: list[str]) -> None:
    solver = ode_solver("dopri5", rtol=1e-3, train_rtol=3e-2, control=control)
    watch, flow = guarded(solver, lambda s: 0.0 if s.rtol == 1e-3 and s.control == "all" else 1.0)
    assert watch.check(10, X, 0)
    assert watch.tolerance_at(10) == (1e-3, 1e-3)
    for step in (20, 30):
        assert not watch.check(step, X, 0)
    # with control=all training then solves as tightly as evaluation
    assert len(lines) == (3 if control == "state" else 2)
    assert ("solver.rtol=0.001" in lines[-1]) is (control == "state")
    solves = len(flow.probes)
    watch.check(40, X, 0)
    assert len(flow.probes) == solves
    # a run that goes on with a smaller rtol is watched again
    solver.rtol = 1e-4
    watch.check(50, X, 0)
    assert len(flow.probes) > solves


def test_steps_are_halved_until_max_nfe(lines: list[str]) -> None:
    solver = ode_solver("rk4", step_size=4.0, max_nfe=20)
    watch, _ = guarded(solver, lambda s: 1 / s.steps_between(0, 1))
    assert watch.check(10, X, 0)
    # half of 4 would be the same single step
    assert "from 4 to 0.5" in lines[0]
    # 4 evaluations a step: 4 steps are within 20, 8 are not
    assert solver.step_size == 0.25
    assert not watch.check(20, X, 0)
    assert [line for line in lines if "max_nfe=20" in line] == lines[-1:]


@pytest.mark.parametrize("kind", ["raises", "nan"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_failing_tight_solve_tightens_and_does_not_kill(kind: str, method: str, lines: list[str]) -> None:
    def lie(s: Solver) -> float:
        if (s.adaptive and s.control == "state") or s.step_size in (0.5, 0.25, 0.125):
            return 0.0
        if kind == "nan":
            return math.nan
        raise SolverError("broken at t=0.5.")

    settings: dict[str, Any] = {"rtol": 1e-3, "train_rtol": 1e-2} if method == "dopri5" else {"step_size": 0.5}
    solver = ode_solver(method, max_nfe=20, **settings)
    watch, _ = guarded(solver, lie)
    assert watch.check(10, X, 0)
    assert len(lines) == 1
    assert ("broken" if kind == "raises" else "NaN") in lines[0]
    assert (watch.tolerance_at(10)[0] == 1e-3) if method == "dopri5" else (solver.step_size == 0.25)
    for step in (20, 30):
        assert not watch.check(step, X, 0)
    assert len(lines) == 2


def test_a_failing_coarse_solve_is_left_to_training(lines: list[str]) -> None:
    def lie(s: Solver) -> float:
        raise SolverError("broken")

    watch, flow = guarded(ode_solver("rk4", step_size=0.5), lie)
    assert not watch.check(10, X, 0)
    assert len(flow.probes) == 1
    assert not lines


def test_solves_share_their_probes_and_leave_no_trace() -> None:
    watch, flow = guarded(ode_solver("rk4", step_size=0.5), lambda s: 0.0)
    before = torch.get_rng_state()
    with record_solves() as solves:
        watch.check(10, X, 7)
    assert not solves
    assert torch.equal(torch.get_rng_state(), before)
    first, second = flow.probes
    assert torch.equal(first, second)
    watch.check(20, X, 8)
    assert not torch.equal(flow.probes[-1], first)


def test_checks_come_when_due_or_never() -> None:
    for every, expected in ((10, 2), (None, 0)):
        watch, flow = guarded(ode_solver("rk4", step_size=0.5), lambda s: 0.0, every)
        for step in range(1, 20):
            watch.check(step, X, 0)
        assert len(flow.probes) == expected


SHORT = ["trainer.steps=10", "trainer.val_every=4", "trainer.log_every=1", "model.trace=hutchinson"]


def test_a_guard_that_finds_nothing_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for every in ("null", "2"):
        run = trainer(tmp_path / every, compose(*SHORT, "solver.rtol=1e-3", f"trainer.guard_every={every}"))
        run.fit()
        ends.append((rows(run), run.flow.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][key]) for key, value in ends[0][1].items())


def tightens_first(monkeypatch: pytest.MonkeyPatch, run: Trainer, until: int) -> None:
    """At its checks up to the step `until`, the field passes for one that exploits the solver, once a check."""
    judged: set[int] = set()

    def judge(*log_ps: Any) -> bool:
        again = run.step in judged
        judged.add(run.step)
        return run.step < until and not again

    monkeypatch.setattr(guard, "exploited", judge)


ADAPTIVE = ["solver.rtol=1e-4", "solver.train_rtol=1e-1", "solver.warmup=8", "solver.warmup_rtol=3e-1"]
FIXED = ["solver=midpoint", "solver.step_size=0.5"]


@pytest.mark.parametrize("solver", [ADAPTIVE, FIXED], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("stop", [3, 7])
def test_resume_is_exact_after_a_tightening(
    solver: list[str], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(*SHORT, *solver, "trainer.guard_every=2", "trainer.ema=0.9")
    whole = trainer(tmp_path / "whole", config)
    tightens_first(monkeypatch, whole, 2)
    whole.fit()
    first = trainer(tmp_path / "parts", config)
    tightens_first(monkeypatch, first, 2)
    stop_at(first, stop)
    first.fit()
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    assert saved["guard"]["tightenings"] == 1
    # as the command line goes on: from the checkpoint's config
    second = trainer(tmp_path / "parts", overridden(saved["config"], []), saved)
    tightens_first(monkeypatch, second, 2)
    second.fit()
    assert [row for row in rows(second) if row["split"] == "train" or row["step"] != stop] == rows(whole)
    for key, value in whole.flow.state_dict().items():
        assert torch.equal(value, second.flow.state_dict()[key]), key
    assert whole.best == second.best
    assert second.flow.solver is not None
    assert second.flow.solver.step_size == (0.25 if solver is FIXED else None)
    if solver is ADAPTIVE:
        rtols = [row["rtol"] for row in rows(whole) if row["split"] == "train"]
        assert rtols[1] == pytest.approx(10 * 3 ** (1 / 8) * rtols[2])
        assert rtols[-1] == pytest.approx(1e-2)


def test_a_smaller_step_size_reaches_the_checkpoints_and_a_new_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(*SHORT, *FIXED, "trainer.guard_every=5")
    run = trainer(tmp_path, config)
    tightens_first(monkeypatch, run, 6)
    validate, seen = run.validate, []

    def watched() -> None:
        seen.append(run.best)
        validate()

    run.validate = watched  # type: ignore[method-assign]
    run.fit()
    # validated at steps 4, 8 and 10; tightened at 5, the best of step 4 counts no more
    assert [best and best["step"] for best in seen][:2] == [None, None]
    for name in ("best", "last"):
        assert checkpoint.load(tmp_path / f"checkpoints/{name}.pt")["config"]["solver"]["step_size"] == 0.25
    assert config["solver"]["step_size"] == 0.5


def test_the_result_is_scored_with_the_smaller_step_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(guard, "exploited", lambda *log_ps: next(answers))
    monkeypatch.setattr(runs.pictures, "draw", lambda *arguments: None)
    runs.train(compose(*FIXED, "trainer.steps=2", "trainer.guard_every=2"), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["solver"]["step_size"] == 0.25


def test_checkpoints_from_before_the_guard_go_on(tmp_path: Path) -> None:
    trainer(tmp_path, compose(*SHORT, "trainer.steps=2")).fit()
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    del saved["guard"], saved["config"]["trainer"]["guard_every"], saved["config"]["solver"]["train_rtol"]
    saved["config"]["trainer"]["steps"] = 3
    run = trainer(tmp_path, saved["config"], saved)
    run.fit()
    assert run.step == 3


def test_discrete_flows_have_no_guard(tmp_path: Path) -> None:
    config = compose_defaults(["model=affine", *SHORT[:3], "trainer.guard_every=1", "data.n_val=20"])
    run = trainer(tmp_path, config)
    run.fit()
    assert run.guard is None
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["guard"] is None


def test_training_tolerance() -> None:
    solver = ode_solver("dopri5", rtol=1e-5, atol=1e-7, train_rtol=1e-3)
    assert solver.tolerance_at(0) == solver.tolerance_at(99) == pytest.approx((1e-3, 1e-5))
    assert solver.tolerance_at(0, 1) == pytest.approx((1e-4, 1e-6))
    assert solver.tolerance_at(0, 2) == solver.tolerance_at(0, 9) == (1e-5, 1e-7)
    warmed = ode_solver("dopri5", rtol=1e-5, train_rtol=1e-3, warmup=10, warmup_rtol=1e-1)
    found = [warmed.tolerance_at(step, n)[0] for step, n in ((0, 0), (5, 0), (10, 0), (0, 1), (0, 4), (5, 4))]
    assert found == pytest.approx([1e-1, 1e-2, 1e-3, 1e-2, 1e-5, 1e-5])
    # a recipe's train_rtol must not stand in the way of a looser rtol
    assert ode_solver("dopri5", rtol=1e-2, train_rtol=1e-3).tolerance_at(0) == (1e-2, 1e-2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("solver.train_rtol=0", "solver.train_rtol=0"),
        ("trainer.guard_every=0", "trainer.guard_every=0"),
        ("trainer.guard_every=often", "whole number"),
    ],
)
def test_settings_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, compose(override))


def test_fixed_steps_pass_over_the_training_tolerance_of_a_recipe() -> None:
    assert ode_solver("rk4", step_size=0.5, train_rtol=1e-2).step_size == 0.5
