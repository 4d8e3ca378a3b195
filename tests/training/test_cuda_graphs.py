"""solver.cuda_graphs in training: the same run as without graphs, and what is refused.

Without a GPU, the solves run on the buffers of the graphs, see tests/ode/test_captured_solve.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MakeTrainer
from helpers.processes import fit_outcome

from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import captured_solve
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError

FFJORD = ["model=ffjord", "model.hidden=[8]", "solver.rtol=1e-4", "trainer.steps=12", "trainer.lr=0.01"]
FFJORD += ["trainer.guard_every=4", "trainer.val_every=6", "trainer.log_every=1", "trainer.plot_every=null"]
FFJORD += ["trainer.batch_size=32", "data.n_val=20", "data.n_test=20"]
GRAPHS = "solver.cuda_graphs=true"


def solves(trainer: Trainer) -> int:
    """Returns the number of captured solves."""
    memories = [block.graphs.memory for block in trainer.flow.ode_blocks]
    return sum(0 if memory is None else memory.generation for memory in memories)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    state = found.pop("state")
    for name, value in expected.pop("state").items():
        assert torch.equal(state[name], value), name
    assert found == expected


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.accumulate=2", "trainer.ema=0.9", "trainer.clip_norm=0.1", "model.flows=2"],
        ["objective=hybrid", "objective.matching=4", "regularizer=rnode", "model.trace=hutchinson"],
    ],
)
def test_run_equals_the_run_without_graphs(overrides: list[str], tmp_path: Path, trainer_of: MakeTrainer) -> None:
    graphs = trainer_of(tmp_path / "graphs", [*FFJORD, *overrides, GRAPHS])
    found = fit_outcome(graphs)
    assert found["error"] is None
    assert solves(graphs) >= 5
    assert_same(found, fit_outcome(trainer_of(tmp_path / "plain", [*FFJORD, *overrides])))


def test_resumed_run_equals_the_uninterrupted_run(
    tmp_path: Path, trainer_of: MakeTrainer, stop_at: Callable[..., None]
) -> None:
    whole = fit_outcome(trainer_of(tmp_path / "whole", [*FFJORD, GRAPHS]))
    first = trainer_of(tmp_path / "parts", [*FFJORD, GRAPHS])
    stop_at(first, 7)
    first.fit()
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    second = fit_outcome(trainer_of(tmp_path / "parts", [*FFJORD, GRAPHS], saved))
    # the first run also validated at the step at which it stopped
    del second["rows"], whole["rows"]
    assert_same(second, whole)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_failed_steps_are_treated_as_without_graphs(
    policy: str, tmp_path: Path, trainer_of: MakeTrainer, poisoned_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured_solve, "BEFORE_CAPTURE", 1)
    outcomes = []
    for keys in ([GRAPHS], []):
        torch.manual_seed(0)
        run = trainer_of(
            tmp_path / str(len(keys)), [*FFJORD, f"trainer.on_nonfinite={policy}", *keys], None, poisoned_once(8)
        )
        outcomes.append(fit_outcome(run))
    assert outcomes[0]["error"] is None
    assert_same(*outcomes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=flow_matching"],
        ["data=target", "target=funnel", "objective=reverse_kl", "model.trace=exact"],
        ["trainer.compile=true"],
        ["solver=rk4", "solver.steps=4"],
        ["solver.control=all"],
    ],
)
def test_training_without_solves_that_can_be_captured_is_refused(
    overrides: list[str], tmp_path: Path, trainer_of: MakeTrainer
) -> None:
    with pytest.raises(ConfigError, match=r"solver\.cuda_graphs"):
        trainer_of(tmp_path, [*FFJORD, GRAPHS, *overrides])


def test_field_without_derivatives_is_refused(
    tmp_path: Path, trainer_of: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLPField, "recorder", lambda field, shift=None: None)
    with pytest.raises(ConfigError, match=r"solver\.cuda_graphs"):
        trainer_of(tmp_path, [*FFJORD, GRAPHS])
