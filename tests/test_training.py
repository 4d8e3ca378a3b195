"""The trainer: learning rates, averages, resume to the bit, failures before the update, early stops."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import stop_at
from torch import Tensor, nn
from trainers import trainer_of

from flowtrain.build import build_data, load
from flowtrain.cli.messages import compose_defaults
from flowtrain.data.base import STEP_STREAM, Dataset, step_generator
from flowtrain.errors import CheckpointError, ConfigError, NonFiniteError, SolverError
from flowtrain.flow import Flow
from flowtrain.training import checkpoint
from flowtrain.training.ema import Ema
from flowtrain.training.loop import Trainer
from flowtrain.training.schedule import LearningRate
from flowtrain.training.settings import Settings

SMALL = ["trainer.batch_size=16", "trainer.val_every=4", "trainer.log_every=1", "data.n_val=20", "data.n_test=20"]


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


def trainer(
    run_dir: Path, *overrides: str, saved: dict[str, Any] | None = None, data: Dataset | None = None
) -> Trainer:
    return trainer_of(run_dir, [*SMALL, *overrides], saved, data)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in lines]


# lr=1 makes each validation worse than the one before, so that the plateau has something to remember
PLATEAU = ["trainer.lr_decay=plateau", "trainer.lr_plateau_patience=1", "trainer.lr=1.0", "trainer.val_every=2"]
RUNS = [
    ["model=realnvp", "model.mixing=permutation", "trainer.ema=0.9"],
    ["model=ffjord", "model.hidden=[8]", "model.trace=hutchinson", "solver.warmup=6", "solver.rtol=1e-3"],
    ["model=affine", "trainer.optimizer=adamw", "trainer.ema=null", *PLATEAU],
    ["model=glow", "trainer.lr_decay=constant", "trainer.lr_warmup=3"],
    ["model=ffjord", "model.hidden=[8]", "objective=flow_matching"],
    ["model=ffjord", "model.hidden=[8]", "objective=hybrid", "objective.matching=5", "solver.rtol=1e-3"],
    ["model=ffjord", "model.hidden=[8]", "regularizer=rnode", "regularizer.end_time=0.1", "solver.rtol=1e-3"],
]


@pytest.fixture(scope="module", params=RUNS, ids=["realnvp", "ffjord", "affine", "glow", "matching", "hybrid", "rnode"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Trainer]:
    """A run that was never stopped, and its overrides."""
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    run = trainer(tmp_path_factory.mktemp("whole"), *request.param, "trainer.steps=10")
    run.fit()
    return request.param, run


@pytest.mark.parametrize("stop", [4, 7])
def test_resume_is_exact_to_the_bit(whole: tuple[list[str], Trainer], stop: int, tmp_path: Path) -> None:
    overrides, run = whole
    first = trainer(tmp_path / "parts", *overrides, "trainer.steps=10")
    stop_at(first, stop)
    first.fit()
    assert first.step == stop
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    # rows that a crashed process wrote after its last checkpoint must not stay
    with (tmp_path / "parts/metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": stop + 1, "split": "train", "nll": 0, "seconds": 0}) + '\n{"step": 9, "sp')
    second = trainer(tmp_path / "parts", *overrides, "trainer.steps=10", saved=saved)
    second.fit()
    ends = [row for row in rows(tmp_path / "parts") if not (row["split"] == "val" and row["step"] == stop != 4)]
    assert ends == rows(run.run_dir)
    for key, value in run.flow.state_dict().items():
        assert torch.equal(value, second.flow.state_dict()[key]), key
    if run.ema is not None and second.ema is not None:
        assert all(torch.equal(v, second.ema.shadow[k]) for k, v in run.ema.shadow.items())


def test_resume_takes_new_settings_and_refuses_another_model(tmp_path: Path) -> None:
    trainer(tmp_path, "model=realnvp", "trainer.steps=4", "trainer.ema=null").fit()
    saved = checkpoint.load(tmp_path / "checkpoints/last.pt")
    changed = trainer(tmp_path, "model=realnvp", "trainer.weight_decay=0.5", "trainer.ema=0.9", saved=saved)
    assert changed.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert changed.ema is not None
    assert all(torch.equal(changed.ema.shadow[k], v) for k, v in changed.flow.named_parameters())
    with pytest.raises(CheckpointError, match=r"leave model\."):
        trainer(tmp_path, "model=realnvp", "model.hidden=[32]", saved=saved)


def test_a_run_killed_before_its_first_validation_can_go_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.steps=9")

    def killed() -> dict[str, Any]:
        raise KeyboardInterrupt

    run.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 0


def test_nan_in_the_first_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="training data"):
        trainer(tmp_path, "model=affine", data=Poisoned(0))


def test_trace_noise_and_toy_data_are_independent() -> None:
    """Keyed by the same numbers they would be the same draws, and Hutchinson's estimate biased."""
    toy = build_data(compose_defaults(["data=8gaussians"]))
    noise = torch.randn(512, 2, generator=step_generator(0, STEP_STREAM, 7))
    batch = toy.train_batch(7, 512, 0)
    same = torch.randn(512, 2, generator=step_generator(0, 1, 7))
    assert not torch.equal(noise, same)
    assert torch.corrcoef(torch.stack([noise[:, 0], batch[:, 0]]))[0, 1].abs() < 0.15


def test_seed_decides_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer(tmp_path / name, "model=realnvp", "trainer.steps=3", f"seed={seed}").fit()
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_metrics_have_the_keys_of_the_contract(tmp_path: Path) -> None:
    trainer(tmp_path / "c", "model.hidden=[8]", "trainer.steps=4", "solver.rtol=1e-3").fit()
    trainer(tmp_path / "d", "model=realnvp", "trainer.steps=4").fit()
    train = {"step", "split", "nll", "nfe_forward", "nfe_backward", "grad_norm", "lr", "rtol", "atol"}
    for name, continuous in (("c", True), ("d", False)):
        by_split = {s: [r for r in rows(tmp_path / name) if r["split"] == s] for s in ("train", "val")}
        assert [r["step"] for r in by_split["train"]] == [1, 2, 3, 4]
        assert [r["step"] for r in by_split["val"]] == [4]
        assert set(by_split["train"][0]) == train
        assert set(by_split["val"][0]) == {"step", "split", "nll"}
        assert (by_split["train"][0]["nfe_forward"] is not None) is continuous
        assert (by_split["train"][0]["rtol"] is not None) is continuous


def test_adjoint_counts_its_backward_solve(tmp_path: Path) -> None:
    trainer(tmp_path, "model.hidden=[8]", "trainer.steps=2", "solver.rtol=1e-3", "solver.gradient=adjoint").fit()
    assert all(row["nfe_backward"] > 0 for row in rows(tmp_path) if row["split"] == "train")


class Poisoned(Dataset):
    """Good batches, then one with a NaN."""

    def __init__(self, bad_step: int) -> None:
        self.event_shape, self.bad_step = (2,), bad_step
        self.val = self.test = torch.randn(20, 2)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        x = torch.randn(batch_size, 2)
        if step == self.bad_step:
            x[0, 0] = torch.nan
        return x


@pytest.mark.parametrize(("model", "error"), [("realnvp", NonFiniteError), ("ffjord", SolverError)])
def test_nan_stops_before_the_update(model: str, error: type[Exception], tmp_path: Path) -> None:
    run = trainer(tmp_path, f"model={model}", "trainer.steps=9", data=Poisoned(5))
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


def test_early_stopping(tmp_path: Path) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.lr=1.0", "trainer.steps=400", "trainer.patience=3")
    run.fit()
    assert run.step < 400
    assert "early stopping" in str(run.stopped_by)
    assert run.best is not None
    assert run.best["step"] == run.step - 3 * 4
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.best["step"]


def test_time_limit_validates_and_saves(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, "model=realnvp", "trainer.steps=100000", "trainer.time_limit=0.2", "trainer.val_every=99999"
    )
    run.fit()
    assert run.stopped_by == "time limit"
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == run.step < 100_000


def test_tolerance_warms_up_in_training_and_is_final_in_validation(tmp_path: Path) -> None:
    overrides = [
        "model.hidden=[8]",
        "trainer.steps=4",
        "solver.rtol=1e-4",
        "solver.warmup=3",
        "solver.warmup_rtol=1e-1",
    ]
    run = trainer(tmp_path, *overrides)
    assert run.flow.solver is not None
    run.fit()
    assert [r["rtol"] for r in rows(tmp_path) if r["split"] == "train"] == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4])
    assert run.flow.solver.rtol == 1e-4


def test_ema_is_the_average_and_gives_the_weights_back() -> None:
    module = nn.Linear(1, 1)
    ema = Ema(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(4.0)
    start = ema.shadow["weight"].item()
    ema.update()
    decay = min(0.5, 2 / 11)
    averaged = decay * start + (1 - decay) * 4
    with ema.applied():
        assert module.weight.item() == pytest.approx(averaged)
    assert module.weight.item() == 4
    assert ema.shadow["weight"].item() == pytest.approx(averaged)


def test_checkpoint_with_ema_loads_the_averaged_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.steps=4", "trainer.ema=0.999", "trainer.lr=0.5")
    run.fit()
    assert run.ema is not None
    loaded = dict(load(tmp_path).named_parameters())
    for name, value in run.ema.shadow.items():
        assert torch.equal(loaded[name], value)
    assert not torch.equal(loaded["bijection.bijections.0.mean"], run.flow.state_dict()["bijection.bijections.0.mean"])


def settings(**changes: Any) -> Settings:
    return Settings(**{**compose_defaults([])["trainer"], **changes})


def test_learning_rate() -> None:
    cosine = LearningRate(settings(lr=1.0, lr_warmup=10, steps=100))
    assert cosine.at(0) == pytest.approx(0.1)
    assert cosine.at(50) == pytest.approx(0.5)
    assert cosine.at(100) == pytest.approx(0)
    plateau = LearningRate(settings(lr=1.0, lr_warmup=0, lr_decay="plateau", lr_plateau_patience=2))
    for improved in (True, False, False, False):
        plateau.validated(improved)
    assert plateau.at(7) == 0.5
    assert LearningRate(settings(lr=1.0, lr_warmup=0, lr_decay="constant")).at(99) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "trainer.steps=0"),
        ({"steps": 1.5}, "whole number"),
        ({"steps": True}, "trainer.steps"),
        ({"lr": "fast"}, "trainer.lr=fast"),
        ({"lr": math.nan}, "trainer.lr"),
        ({"clip_norm": 0}, "greater than 0"),
        ({"ema": 1.0}, "between 0 and 1"),
        ({"optimizer": "sgd"}, "adamw"),
        ({"lr_decay": "linear"}, "cosine"),
        ({"patience": 0}, "at least 1"),
    ],
)
def test_settings_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def saved_flow(tmp_path: Path, *overrides: str) -> Path:
    trainer(tmp_path, "model=affine", "trainer.steps=1", *overrides).fit()
    return tmp_path / "checkpoints/best.pt"


@pytest.mark.parametrize(
    ("where", "target"),
    [
        (("model", "_target_"), "os.system"),
        (("model", "_target_"), "flowtrain.models.affine.Chain.os.system"),
        (("model", "_target_"), "flowtrain.training.checkpoint.save"),
        (("model", "_target_"), "flowtrain.models.realnvp.torch.load"),
        (("solver", "method"), {"_target_": "builtins.eval"}),
        (("model", "note"), "${oc.env:HOME}"),
    ],
)
def test_a_checkpoint_runs_no_code(where: tuple[str, str], target: Any, tmp_path: Path) -> None:
    path = saved_flow(tmp_path)
    content = checkpoint.load(path)
    content["config"][where[0]][where[1]] = target
    checkpoint.save(path, content)
    with pytest.raises(CheckpointError, match=r"would run|interpolation|not to be had"):
        load(path)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = saved_flow(tmp_path)
    whole = path.read_bytes()
    torn, foreign, pickled = (tmp_path / name for name in ("torn.pt", "foreign.pt", "pickled.pt"))
    torn.write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(2)}, foreign)
    torch.save({"model": nn.Linear(1, 1)}, pickled)
    for bad, words in ((torn, "complete"), (foreign, "lacks"), (pickled, "refused"), (tmp_path / "no.pt", "no such")):
        with pytest.raises(CheckpointError, match=words) as caught:
            load(bad)
        assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_flow(tmp_path)
    before = path.read_bytes()
    content = checkpoint.load(path)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, content)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_load_leaves_the_random_state_alone(tmp_path: Path) -> None:
    path = saved_flow(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert isinstance(load(path), Flow)
    assert torch.equal(torch.rand(3), expected)


def test_the_tolerance_warms_up_over_two_thirds_of_a_run(tmp_path: Path) -> None:
    trainer(tmp_path, "model=ffjord", "model.hidden=[8]", "trainer.steps=6", "trainer.log_every=1").fit()
    rtol = [row["rtol"] for row in rows(tmp_path) if row["split"] == "train"]
    assert rtol == pytest.approx([1e-3, 10**-3.5, 1e-4, 10**-4.5, 1e-5, 1e-5])
