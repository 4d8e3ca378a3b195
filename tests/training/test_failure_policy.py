"""Failing steps are detected before the update, and reported, skipped or rewound."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MakeTrainer, ReadRows
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.runs.load import load
from flowtrain.training import checkpoint
from flowtrain.training.progress import NfeWatch
from flowtrain.utils.errors import NonFiniteError, SolverError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")


def test_nan_in_the_initial_batch_error_names_the_training_data(
    tmp_path: Path, trainer: MakeTrainer, poisoned: type[Dataset]
) -> None:
    with pytest.raises(NonFiniteError, match="training data"):
        trainer(tmp_path, "model=affine", data=poisoned(0))


@pytest.mark.parametrize(("model", "error"), [("realnvp", NonFiniteError), ("ffjord", SolverError)])
def test_nan_stops_before_the_update(
    model: str, error: type[Exception], tmp_path: Path, trainer: MakeTrainer, poisoned: type[Dataset]
) -> None:
    run = trainer(tmp_path, f"model={model}", "model.hidden=[8]", "trainer.steps=9", data=poisoned(5))
    with pytest.raises(error, match=r"step 6: .*resume=") as caught:
        run.fit()
    assert "NaN" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = np.load(tmp_path / "failed/step_000006.npz")
    assert np.isnan(kept["x"][0, 0])
    assert kept["x"].shape == (16, 2)
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    assert saved["step"] == 4
    assert all(torch.isfinite(v).all() for v in saved["weights"].values())
    assert load(tmp_path).log_prob(torch.zeros(1, 2)).isfinite().all()


@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_skip_policy_skips_a_failed_step(
    model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trainer: MakeTrainer,
    poisoned: type[Dataset],
    rows: ReadRows,
) -> None:
    run = trainer(
        tmp_path, f"model={model}", "model.hidden=[8]", "trainer.steps=9", "trainer.on_nonfinite=skip", data=poisoned(5)
    )
    run.fit()
    assert run.step == 9
    assert [r["step"] for r in rows(tmp_path) if r["split"] == "train"] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert caplog.text.count("step 6 is skipped") == 1
    assert all(torch.isfinite(v).all() for v in run.flow.state_dict().values())


def test_at_most_ten_consecutive_steps_are_skipped(
    tmp_path: Path, poisoned: type[Dataset], trainer: MakeTrainer
) -> None:
    class Bad(poisoned):
        def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
            return super().train_batch(step, batch_size, seed) * (torch.nan if step >= 4 else 1)

    run = trainer(
        tmp_path,
        "model=realnvp",
        "model.layers=2",
        "model.hidden=[8]",
        "trainer.steps=90",
        "trainer.on_nonfinite=skip",
        data=Bad(-1),
    )
    with pytest.raises(NonFiniteError, match="step 15: "):
        run.fit()
    assert len(list((tmp_path / "failed").iterdir())) == 5


@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_rewind_halves_the_learning_rate(
    model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trainer: MakeTrainer,
    poisoned_once: type[Dataset],
    rows: ReadRows,
    stop_at: Callable[..., None],
) -> None:
    keys = [
        f"model={model}",
        "model.hidden=[8]",
        "trainer.steps=12",
        "trainer.on_nonfinite=rewind",
        "trainer.lr_decay=constant",
    ]
    keys += ["trainer.lr_warmup=0", "trainer.lr=0.004"]
    run = trainer(tmp_path / "a", *keys, data=poisoned_once(5))
    run.fit()
    trained = [r for r in rows(tmp_path / "a") if r["split"] == "train"]
    assert [(r["step"], r["lr"]) for r in trained] == [(s, 0.004 if s <= 4 else 0.002) for s in range(1, 13)]
    assert re.search(r"step 4\b.*\b0\.5\b", caplog.text)
    # stopping after the rewind and resuming gives bitwise equal weights
    part = trainer(tmp_path / "b", *keys, data=poisoned_once(5))
    stop_at(part, 7)
    part.fit()
    saved = checkpoint.load(tmp_path / "b/checkpoints/last.pt")
    assert saved["trouble"]["rewinds"] == 1
    rest = trainer(tmp_path / "b", *keys, data=poisoned_once(5, times=0), saved=saved)
    rest.fit()
    assert all(torch.equal(v, run.flow.state_dict()[k]) for k, v in rest.flow.state_dict().items())


@pytest.mark.parametrize(("model", "error"), [("realnvp", NonFiniteError), ("ffjord", SolverError)])
def test_number_of_rewinds_is_limited(
    model: str, error: type[Exception], tmp_path: Path, trainer: MakeTrainer, poisoned: type[Dataset]
) -> None:
    keys = [
        f"model={model}",
        "model.hidden=[8]",
        "trainer.steps=9",
        "trainer.on_nonfinite=rewind",
        "trainer.max_rewinds=2",
    ]
    run = trainer(tmp_path, *keys, "trainer.lr=0.004", data=poisoned(5))
    with pytest.raises(error, match=r"step 6: .*trainer.lr=0.0005"):
        run.fit()
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["trouble"]["rewinds"] == 2


def test_failure_message_names_the_cause(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(tmp_path, "model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=9")

    def broken(name: str, change: Callable[[Tensor], None]) -> str:
        parameter = dict(run.flow.named_parameters())[name]
        kept = parameter.detach().clone()
        with torch.no_grad():
            change(parameter)
        with pytest.raises(NonFiniteError) as caught:
            run.recovery.guarded(run.train_step, "step 1")
        with torch.no_grad():
            parameter.copy_(kept)
        return str(caught.value)

    name = next(iter(dict(run.flow.named_parameters())))
    assert f"The weights {name} are not finite" in broken(name, lambda p: p.view(-1)[0].fill_(torch.nan))


def test_growth_of_a_small_nfe_is_no_spike(caplog: pytest.LogCaptureFixture) -> None:
    watch = NfeWatch()
    for step in range(60):
        # the first steps of `flowtrain` with its defaults
        watch.check(step, {"nfe_forward": 7 if step < 40 else 31, "nfe_backward": 0})
    assert not caplog.records


def test_nfe_spike_is_logged_with_its_step(caplog: pytest.LogCaptureFixture) -> None:
    watch = NfeWatch()
    for step in range(30):
        # a spike of several steps is logged once
        watch.check(step, {"nfe_forward": 200 if step in (21, 25, 26, 27) else 40, "nfe_backward": 0})
    found = [r.getMessage() for r in caplog.records]
    assert found == [
        f"step {step}: the NFE rose to 200, from a median of 40 over the steps before" for step in (21, 25)
    ]
