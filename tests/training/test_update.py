"""Running statistics of batch norms change only with accepted updates."""

from pathlib import Path

import pytest
import torch
from helpers import Compose, MakeTrainer, ReadRows
from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.scale import BatchNorm
from flowtrain.data.base import Dataset
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")

NORMS = ["model=realnvp", "model.batch_norm=true", "model.layers=2", "model.hidden=[4]"]
SHAPES = {"vectors": (2,), "images": (1, 4, 4)}


def statistics(flow: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the buffers that both kinds of batch norm update."""
    names = ("mean", "variance", "running_mean", "running_var", "num_batches_tracked")
    found = {k: v.clone() for k, v in flow.named_buffers() if k.rpartition(".")[2] in names}
    assert found
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_failed_step_leaves_running_statistics_unchanged(
    shape: str, accumulate: int, tmp_path: Path, trainer: MakeTrainer, poisoned: type[Dataset], rows: ReadRows
) -> None:
    keys = [*NORMS, "trainer.on_nonfinite=skip", f"trainer.accumulate={accumulate}", "trainer.steps=9"]
    run = trainer(tmp_path, *keys, data=poisoned(5, SHAPES[shape]))
    kinds = {type(m) for m in run.flow.modules()}
    assert BatchNorm in kinds
    assert (nn.BatchNorm2d in kinds) is (shape == "images")
    take, seen = run.update.take, []

    def watched(step: int, lr: float) -> object:
        before = statistics(run.flow)
        try:
            return take(step, lr)
        finally:
            seen.append(same(before, statistics(run.flow)))

    run.update.take = watched  # type: ignore[method-assign,assignment]
    run.fit()
    assert seen == [step == 5 for step in range(9)]
    assert all(v.isfinite().all() for v in statistics(run.flow).values())
    assert run.train_state.ema is not None
    assert all(v.isfinite().all() for v in run.train_state.ema.shadow.values())
    # validations after the failed step still run
    assert [r["step"] for r in rows(tmp_path) if r["split"] == "val"] == [4, 8, 9]


def test_rewind_restores_running_statistics(tmp_path: Path, trainer: MakeTrainer, poisoned_once: type[Dataset]) -> None:
    run = trainer(tmp_path, *NORMS, "trainer.on_nonfinite=rewind", "trainer.steps=8", data=poisoned_once(5))
    run.fit()
    assert run.failure_policy.rewinds == 1
    assert all(v.isfinite().all() for v in statistics(run.flow).values())


def test_aborted_step_leaves_running_statistics_unchanged(
    tmp_path: Path, trainer: MakeTrainer, poisoned: type[Dataset]
) -> None:
    run = trainer(tmp_path, *NORMS, data=poisoned(0x7FFF))
    before = statistics(run.flow)
    run.update.batches.data = poisoned(0)
    with pytest.raises(NonFiniteError):
        run.update.take(0, 0.1)
    assert same(before, statistics(run.flow))


def test_guard_does_not_change_running_statistics(tmp_path: Path, guarded_config: Compose) -> None:
    """The guard solves twice in training mode if the training tolerance differs from the final tolerance."""
    config = guarded_config("trainer.guard_every=1", "solver.rtol=1e-4", "solver.train_rtol=1e-2")
    torch.manual_seed(0)
    data = build_data(config)
    flow = build_flow(config, data.samples)
    flow.bijection = Chain([flow.bijection, BatchNorm(2)])
    run = Trainer(build_objective(config, flow), flow, data, build_settings(config), tmp_path, config)
    _, batch = run.update.take(0, 1e-3)
    before, calls = statistics(flow), []
    density_pass = flow.density_pass
    flow.density_pass = lambda *arguments: calls.append(flow.training) or density_pass(*arguments)  # type: ignore[assignment,func-returns-value,method-assign]
    run.train_state.check_solver(0, batch)
    assert calls[:2] == [True, True]
    assert same(before, statistics(flow))


def test_resume_restores_running_statistics(tmp_path: Path, trainer: MakeTrainer, poisoned_once: type[Dataset]) -> None:
    keys = [*NORMS, "trainer.on_nonfinite=skip", "trainer.steps=9"]
    whole = trainer(tmp_path / "whole", *keys, data=poisoned_once(5))
    whole.fit()
    first = trainer(tmp_path / "parts", *keys[:-1], "trainer.steps=6", data=poisoned_once(5))
    first.train_state.lr.settings = whole.settings
    first.fit()
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    second = trainer(tmp_path / "parts", *keys, data=poisoned_once(5, times=0), saved=saved)
    second.fit()
    assert same(statistics(whole.flow), statistics(second.flow))
