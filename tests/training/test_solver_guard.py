"""The guard against fields that exploit a coarse solver, and the tolerance of training."""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Compose, MakeTrainer
from torch import Tensor, nn

from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.flow import DensityPass
from flowtrain.ode import Problem, SolveOptions, Solver, ode_solver, record_solves
from flowtrain.runs.load import load
from flowtrain.training import solver_guard
from flowtrain.training.solver_guard import SolverGuard, exploited
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError, SolverError

pytestmark = pytest.mark.usefixtures("float32")


class Lines(logging.Handler):
    """Collects the messages of a logger. caplog misses them after a command has turned off propagation."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    handler = Lines()
    solver_guard.log.addHandler(handler)
    yield handler.lines
    solver_guard.log.removeHandler(handler)


# a single step of rk4, and a learning rate at which the field learns to exploit the error of this step
EXPLOIT = ["solver=rk4", "solver.step_size=1.0", "trainer.lr=0.02", "trainer.lr_decay=constant", "trainer.steps=150"]


def reported_and_true(run: Trainer) -> tuple[float, float]:
    """Returns the NLL of training data in nats, computed with the run's steps and with very short steps."""
    x = run.data.train_batch(run.step - 1, 1000, 0)
    solver = run.flow.eval().solver
    assert solver is not None
    reported = -log_probs(run.flow, x).mean().item()
    fine = run.flow.with_solver(solver.replace(step_size=0.01))
    return reported, -log_probs(fine, x).mean().item()


def test_guard_detects_a_field_that_exploits_solver_error(
    tmp_path: Path, lines: list[str], guarded_trainer: MakeTrainer, guarded_config: Compose
) -> None:
    run = guarded_trainer(tmp_path / "off", guarded_config(*EXPLOIT, "trainer.guard_every=null"))
    run.fit()
    reported, true = reported_and_true(run)
    assert reported < true - 0.3
    assert not lines
    run = guarded_trainer(tmp_path / "on", guarded_config(*EXPLOIT))
    run.fit()
    reported, true = reported_and_true(run)
    assert abs(reported - true) < 0.05
    assert any("step_size is reduced from 1 to 0.5" in line for line in lines)
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
def test_exploited_solver_criterion(gap: Tensor, d: int, expected: bool) -> None:
    tight = torch.linspace(-100, 0, len(gap))
    assert exploited(tight + gap, tight, d) is expected


class FakeFlow(nn.Module):
    """A flow with log p = log_p_error(solver), which records a random draw per call in place of trace probes."""

    event_shape = (2,)

    def __init__(self, solver: Solver, log_p_error: Callable[[Solver], float]) -> None:
        super().__init__()
        self.solver, self.log_p_error = solver, log_p_error
        self.probes: list[Tensor] = []

    def use_solver(self, solver: Solver) -> None:
        self.solver = solver

    def density_pass(self, x: Tensor, label: Tensor | None, options: SolveOptions) -> DensityPass:
        self.probes.append(torch.rand(3))
        zero = torch.zeros_like(x)
        self.solver.solve(Problem(lambda t, y: torch.zeros_like(y), None, zero, 0.0, 1.0), options)
        return DensityPass(torch.full((len(x),), self.log_p_error(self.solver.replace(**options.settings))), x)


def guarded(
    solver: Solver, log_p_error: Callable[[Solver], float], every: int | None = 10
) -> tuple[SolverGuard, FakeFlow]:
    flow = FakeFlow(solver, log_p_error)
    return SolverGuard(flow, every), flow  # type: ignore[arg-type]


X = torch.zeros(8, 2)


def test_tolerance_is_tightened_until_the_check_passes(lines: list[str]) -> None:
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
    # with control=all, training already solves as tightly as evaluation
    assert len(lines) == (3 if control == "state" else 2)
    assert ("solver.rtol=0.001" in lines[-1]) is (control == "state")
    solves = len(flow.probes)
    watch.check(40, X, 0)
    assert len(flow.probes) == solves
    # a resumed run with a smaller rtol is checked again
    flow.solver = solver.replace(rtol=1e-4)
    watch.check(50, X, 0)
    assert len(flow.probes) > solves


def test_steps_are_halved_until_max_nfe(lines: list[str]) -> None:
    solver = ode_solver("rk4", step_size=4.0, max_nfe=20)
    watch, _ = guarded(solver, lambda s: 1 / s.steps_between(0, 1))
    assert watch.check(10, X, 0)
    # a step size of 4 and of 2 both give a single step, because t has an interval of length 1
    assert "from 4 to 0.5" in lines[0]
    # each step has 4 evaluations, so max_nfe=20 allows 4 steps but not 8
    assert watch.solver.step_size == 0.25
    assert not watch.check(20, X, 0)
    assert [line for line in lines if "max_nfe=20" in line] == lines[-1:]


@pytest.mark.parametrize("kind", ["raises", "nan"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_failing_tight_solve_tightens_the_tolerance(kind: str, method: str, lines: list[str]) -> None:
    def log_p_error(s: Solver) -> float:
        if (s.adaptive and s.control == "state") or s.step_size in (0.5, 0.25, 0.125):
            return 0.0
        if kind == "nan":
            return math.nan
        raise SolverError("broken at t=0.5.")

    settings: dict[str, Any] = {"rtol": 1e-3, "train_rtol": 1e-2} if method == "dopri5" else {"step_size": 0.5}
    solver = ode_solver(method, max_nfe=20, **settings)
    watch, _ = guarded(solver, log_p_error)
    assert watch.check(10, X, 0)
    assert len(lines) == 1
    assert ("broken" if kind == "raises" else "NaN") in lines[0]
    assert (watch.tolerance_at(10)[0] == 1e-3) if method == "dopri5" else (watch.solver.step_size == 0.25)
    for step in (20, 30):
        assert not watch.check(step, X, 0)
    assert len(lines) == 2


def test_failing_coarse_solve_does_not_tighten_the_tolerance(lines: list[str]) -> None:
    def log_p_error(s: Solver) -> float:
        raise SolverError("broken")

    watch, flow = guarded(ode_solver("rk4", step_size=0.5), log_p_error)
    assert not watch.check(10, X, 0)
    assert len(flow.probes) == 1
    assert not lines


def test_checks_share_probes_and_leave_random_state_unchanged() -> None:
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


def test_checks_run_only_when_due() -> None:
    for every, expected in ((10, 2), (None, 0)):
        watch, flow = guarded(ode_solver("rk4", step_size=0.5), lambda s: 0.0, every)
        for step in range(1, 20):
            watch.check(step, X, 0)
        assert len(flow.probes) == expected


def test_training_tolerance_is_tightened_by_a_factor_of_ten() -> None:
    solver = ode_solver("dopri5", rtol=1e-5, atol=1e-7, train_rtol=1e-3)
    assert solver.tolerance_at(0) == solver.tolerance_at(99) == pytest.approx((1e-3, 1e-5))
    assert solver.tolerance_at(0, 1) == pytest.approx((1e-4, 1e-6))
    assert solver.tolerance_at(0, 2) == solver.tolerance_at(0, 9) == (1e-5, 1e-7)
    warmed = ode_solver("dopri5", rtol=1e-5, train_rtol=1e-3, warmup=10, warmup_rtol=1e-1)
    found = [warmed.tolerance_at(step, n)[0] for step, n in ((0, 0), (5, 0), (10, 0), (0, 1), (0, 4), (5, 4))]
    assert found == pytest.approx([1e-1, 1e-2, 1e-3, 1e-2, 1e-5, 1e-5])
    # a recipe's train_rtol does not override a looser rtol
    assert ode_solver("dopri5", rtol=1e-2, train_rtol=1e-3).tolerance_at(0) == (1e-2, 1e-2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("solver.train_rtol=0", "solver.train_rtol=0"),
        ("trainer.guard_every=0", "trainer.guard_every=0"),
        ("trainer.guard_every=often", "whole number"),
    ],
)
def test_invalid_settings_are_refused(
    override: str, words: str, tmp_path: Path, guarded_trainer: MakeTrainer, guarded_config: Compose
) -> None:
    with pytest.raises(ConfigError, match=words):
        guarded_trainer(tmp_path, guarded_config(override))


def test_fixed_step_solver_ignores_the_training_tolerance() -> None:
    assert ode_solver("rk4", step_size=0.5, train_rtol=1e-2).step_size == 0.5
