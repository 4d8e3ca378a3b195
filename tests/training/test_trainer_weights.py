"""Training with weights: integer weights act as repeated rows, and signed weights subtract a background."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import npy
from helpers.processes import trainer_of

from flowtrain.data.tables.array import ArrayData
from flowtrain.training.batches import Batches
from flowtrain.training.trainer import Trainer
from flowtrain.training.validation import clearly_worse
from flowtrain.utils.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("propagate_logs")

KEYS = ["data=array", "recipe=none", "trainer.steps=1", "trainer.plot_every=null", "trainer.val_early=false"]
KEYS += ["trainer.lr_warmup=0", "trainer.weight_decay=0", "trainer.ema=null", "trainer.val_size=null"]
REALNVP = ["model=realnvp", "model.layers=2", "model.hidden=[8]"]
MODELS = {
    "affine": ["model=affine"],
    "realnvp": REALNVP,
    "ffjord": ["model=ffjord", "model.hidden=[8]", "solver=rk4", "solver.steps=4"],
}


def values_of(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)) @ np.array([[1.0, 0.4], [0.0, 0.3]]) + 4
    return np.column_stack([x, rng.integers(0, 4, n)])


def built(folder: Path, name: str, train: np.ndarray, held: np.ndarray, *keys: str) -> Trainer:
    """Builds a trainer whose batch is the whole training set."""
    paths = [f"data.{key}={npy(folder / f'{name}-{key}.npy', rows)}" for key, rows in (("path", train),)]
    paths += [f"data.{key}={npy(folder / f'{name}-{key}.npy', held)}" for key in ("val_path", "test_path")]
    return trainer_of(folder / name, [*KEYS, *paths, f"trainer.batch_size={len(train)}", *keys])


def weighted_and_repeated(folder: Path, *keys: str) -> tuple[Trainer, Trainer]:
    train, held = values_of(60, 0), values_of(40, 1)
    repeated = [np.repeat(rows[:, :2], rows[:, 2].astype(int), axis=0) for rows in (train, held)]
    weighted = built(folder, "weighted", train, held, *keys, "data.weights=2")
    return weighted, built(folder, "repeated", repeated[0], repeated[1], *keys)


@pytest.mark.parametrize("model", MODELS)
def test_integer_weights_give_the_loss_and_gradient_of_repeated_rows(model: str, tmp_path: Path) -> None:
    # the Gaussian start is left out, because its shrinkage depends on the number of rows
    keys = [*MODELS[model], "data.gaussian_start=false", "regularizer=none"]
    weighted, repeated = weighted_and_repeated(tmp_path, *keys)
    for (name, a), b in zip(weighted.flow.state_dict().items(), repeated.flow.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    losses = []
    for run in (weighted, repeated):
        # an affine flow starts at the maximum of the likelihood, where the gradient is 0
        with torch.no_grad():
            for p in run.flow.parameters():
                p.add_(0.1)
        batch = run.update.batches.of(0)
        losses.append(run.update.backward(batch, run.train_state.options(0))["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    gradients = [[p.grad for p in run.flow.parameters()] for run in (weighted, repeated)]
    assert any(g is not None and bool(g.abs().max() > 1e-4) for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


def test_gaussian_start_has_the_mean_and_variances_of_repeated_rows(tmp_path: Path) -> None:
    weighted, repeated = weighted_and_repeated(tmp_path, *REALNVP)
    found = [run.flow.sample(20_000) for run in (weighted, repeated)]
    train = values_of(60, 0)
    mean, std = (np.average(train[:, :2], axis=0, weights=train[:, 2]) for _ in range(2))
    std = np.sqrt(np.average((train[:, :2] - mean) ** 2, axis=0, weights=train[:, 2]))
    for x in found:
        np.testing.assert_allclose(x.mean(0).numpy(), mean, atol=0.03)
        np.testing.assert_allclose(x.std(0).numpy(), std, rtol=0.03)


def test_validation_has_the_nll_of_repeated_rows(tmp_path: Path) -> None:
    weighted, repeated = weighted_and_repeated(tmp_path, *REALNVP)
    repeated.flow.load_state_dict(weighted.flow.state_dict())
    (nll, stderr), (expected, smaller) = weighted.validation.nll(), repeated.validation.nll()
    assert nll == pytest.approx(expected, rel=1e-12)
    # repeated rows are not independent, so their standard error is too small
    held = values_of(40, 1)
    log_p = weighted.flow.log_prob(torch.from_numpy(held[:, :2]).float().double()).detach().numpy()
    w = held[:, 2]
    m = w.sum() ** 2 / (w**2).sum()
    error = math.sqrt(m / (m - 1) * (w**2 * (log_p + nll) ** 2).sum()) / w.sum()
    assert stderr == pytest.approx(error, rel=1e-9)
    assert stderr > smaller
    assert weighted.validation.n == int((w > 0).sum())


@pytest.mark.usefixtures("float32")
def test_rows_of_weight_0_change_nothing(tmp_path: Path) -> None:
    """The loss of rows far from the data is infinite, and 0 times infinity is NaN."""
    train, held = values_of(60, 0), values_of(40, 1)
    train[::7, 2] = held[::7, 2] = 0
    train[::7, :2] = held[::7, :2] = 1e38
    # all columns must look like ordinary columns
    train[0, :2] = 0.0
    run = built(tmp_path, "zeros", train, held, *REALNVP, "data.weights=2", "trainer.on_nonfinite=stop")
    run.fit()
    assert run.best is not None
    assert math.isfinite(run.best["nll"])
    assert all(bool(value.isfinite().all()) for value in run.flow.state_dict().values())
    kept = (train[:, 2] > 0).nonzero()[0]
    moments = run.data.statistics()
    assert moments is not None
    expected = np.average(train[kept, :2], axis=0, weights=train[kept, 2])
    np.testing.assert_allclose(moments[0].numpy(), expected, rtol=1e-12)


def test_clearly_worse_weights_the_rows() -> None:
    best, now = torch.zeros(100), torch.zeros(100)
    now[:90] -= 1.0
    weights = torch.cat([torch.zeros(90), torch.ones(10)])
    assert clearly_worse(best, now, 0.5)
    assert not clearly_worse(best, now, 0.5, weights)
    assert clearly_worse(best, now, 0.5, 1 - weights)


def test_validation_rows_need_a_positive_sum_of_weights(tmp_path: Path) -> None:
    train, held = values_of(60, 0), values_of(40, 1)
    held[:20, 2] = -1.0
    held[20:, 2] = 3.0
    keys = ["data.weights=2", "data.signed_weights=true", "trainer.val_size=10"]
    run = built(tmp_path, "short", train, held, *REALNVP, *keys)
    with pytest.raises(DataError, match="val_size"):
        run.validation.nll()
    with pytest.raises(DataError, match="val"):
        built(tmp_path, "negative", train, np.where(np.arange(3) == 2, -1.0, held), *REALNVP, *keys)


@pytest.mark.parametrize("objective", ["flow_matching", "hybrid"])
def test_optimal_coupling_is_refused_with_weights(objective: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    train, held = values_of(60, 0), values_of(40, 1)
    keys = [*MODELS["ffjord"], f"objective={objective}", "data.weights=2", "trainer.steps=10"]
    built(tmp_path, "independent", train, held, *keys)
    with pytest.raises(ConfigError, match=r"objective\.coupling.*data\.weights"):
        built(tmp_path, "optimal", train, held, *keys, "objective.coupling=optimal")


def test_streamed_weights_equal_weights_in_memory(tmp_path: Path) -> None:
    path = npy(tmp_path / "rows.npy", values_of(500, 0))
    streamed, memory = (ArrayData(path, weights=2, memory_map=memory_map) for memory_map in (True, False))
    assert streamed.n_train is not None
    for data in (streamed, memory):
        weights = data.row_weights(streamed.n_train)
        assert weights is not None
        assert float(weights.mean()) == pytest.approx(1.0)
        rows, order = data.train_rows(streamed.n_train), np.lexsort(values_of(500, 0)[:, :2].T)
        place = {tuple(row): i for i, row in enumerate(values_of(500, 0)[order, :2].astype(np.float32).tolist())}
        expected = torch.from_numpy(values_of(500, 0)[order, 2])[[place[tuple(r)] for r in rows.float().tolist()]]
        torch.testing.assert_close(weights, expected / expected.mean())
    for a, b in zip(streamed.statistics() or (), memory.statistics() or (), strict=True):
        assert a.shape == b.shape == (2,)


def signal_and_background(n: int, seed: int) -> np.ndarray:
    """Returns rows of a signal N(0, 0.5^2) on a background N(1, 1), and simulated background with negative weights."""
    rng = np.random.default_rng(seed)
    signal, background = rng.normal(0, 0.5, (n, 1)), rng.normal(1, 1, (n // 2, 1))
    subtracted = rng.normal(1, 1, (2 * n, 1))
    x = np.concatenate([signal, background, subtracted])
    w = np.concatenate([np.ones(len(signal) + len(background)), np.full(len(subtracted), -0.25)])
    return np.column_stack([x, w])[rng.permutation(len(x))]


@pytest.mark.parametrize("model", ["affine", pytest.param("nsf", marks=pytest.mark.slow)])
def test_signed_weights_leave_the_density_of_the_signal(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [f"model={model}", "data.weights=1", "data.signed_weights=true", "trainer.val_every=50"]
    keys += ["trainer.lr=0.003"] + (["model.layers=2", "model.hidden=[16]", "model.bins=6"] if model == "nsf" else [])
    train, held = signal_and_background(6000, 0), signal_and_background(2000, 1)
    run = built(tmp_path, model, train, held, *keys, "trainer.batch_size=2000", "trainer.steps=300")
    assert sum("negative" in record.message for record in caplog.records) == 1
    run.fit()
    assert run.best is not None
    x = torch.from_numpy(np.random.default_rng(2).normal(0, 0.5, (5000, 1)))
    true = torch.distributions.Normal(0.0, 0.5).log_prob(x[:, 0])
    with torch.no_grad():
        kl = float((true - run.flow.eval().log_prob(x)).mean())
    assert -0.01 < kl < 0.02


def test_a_bijection_without_weights_is_refused(tmp_path: Path) -> None:
    from flowtrain.bijections import ActNorm, Chain
    from flowtrain.flow import Flow
    from flowtrain.training.initialization import initialize

    class Own(ActNorm):
        def initialize(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
            return super().initialize(x, context)

    flow = Flow((2,), Chain([Own(2)]))
    data = ArrayData(npy(tmp_path / "rows.npy", values_of(100, 0)), weights=2)
    with pytest.raises(ConfigError, match=r"data\.weights.*Own"):
        initialize(flow, Batches(flow, data, 10, 0))
    unweighted = ArrayData(npy(tmp_path / "plain.npy", values_of(100, 0)[:, :2]))
    initialize(flow, Batches(flow, unweighted, 10, 0))
