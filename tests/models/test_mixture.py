"""model=mixture: EM on the initial data, and the choice of settings by validation NLL."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
from helpers import Run
from sklearn.mixture import GaussianMixture as Reference
from torch import Tensor

from flowtrain.models.mixture import mixture
from flowtrain.runs.components import COMPONENT_COUNTS, Choice, choose_mixture
from flowtrain.runs.fit import fit
from flowtrain.utils.errors import ConfigError


def clustered(n: int, k: int, d: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = 8 * rng.normal(size=(k, d))
    spread = rng.normal(size=(k, d, d))
    which = rng.integers(0, k, n)
    return centres[which] + np.einsum("nij,nj->ni", spread[which], rng.normal(size=(n, d)))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_fit_reaches_the_scikit_learn_likelihood(covariance: str) -> None:
    x = clustered(2000, 3)
    overrides = {"model.components": 3, "model.covariance": covariance, "data.gaussian_start": False}
    flow = fit(x, model="mixture", progress=False, overrides=overrides)
    assert flow.record is not None
    train = np.delete(x, np.concatenate([*flow.record.held_out.values()]), axis=0)
    kind = {"full": "full", "diagonal": "diag"}[covariance]
    reference = Reference(3, covariance_type=kind, n_init=5, random_state=0).fit(train)
    assert flow.log_prob(train).mean() > reference.score(train) - 0.02


def test_number_of_components_is_chosen_by_validation() -> None:
    x = torch.from_numpy(clustered(3000, 4))
    best, tried = choose_mixture(x[:2000], x[2000:], covariances=["full"], priors=[0.0])
    assert 4 <= best.components <= 8
    assert tried[best] == min(tried.values())
    assert {each.components for each in tried} <= set(COMPONENT_COUNTS)
    few, _ = choose_mixture(x[:12], x[2000:])
    assert few.components == 1


def test_covariance_is_chosen_by_validation() -> None:
    correlated = torch.from_numpy(clustered(1500, 3))
    # independent columns with so few rows that off-diagonal covariances only add noise
    independent = torch.from_numpy(np.random.default_rng(0).normal(size=(60 + 1000, 12)))
    assert choose_mixture(correlated[:1000], correlated[1000:])[0].covariance == "full"
    best, tried = choose_mixture(independent[:60], independent[60:])
    assert best.covariance == "diagonal"
    assert {each.covariance for each in tried} == {"full", "diagonal"}


def test_selection_without_time_or_rows_returns_a_tried_candidate() -> None:
    x = torch.from_numpy(clustered(600, 3))
    best, tried = choose_mixture(x[:400], x[400:], seconds=0.0)
    assert list(tried) == [best]
    # with fewer rows per component than a search would use, the given number of components is fitted
    best, tried = choose_mixture(x[:50], x[400:], components=[20])
    assert {each.covariance for each in tried} == {"full", "diagonal"}
    assert best.components == 20


def test_training_starts_at_the_selected_mixture(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "flowtrain"):
        flow = fit(clustered(1000, 3), model="mixture", progress=False, overrides={"trainer.steps": 1})
    assert flow.record is not None
    line = next(each for each in caplog.messages if each.startswith("mixture:"))
    validated = float(line.split("validation NLL ")[1].split()[0])
    first = next(row for row in flow.record.metrics if row["split"] == "val")
    assert (first["step"], first["nll"]) == (0, pytest.approx(validated, abs=2e-3))


def test_positive_prior_is_selected_for_few_rows_per_component() -> None:
    """Four clusters share one covariance, and each has fewer rows than the covariance has entries."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(20 * rng.normal(size=(4, 12))[rng.integers(0, 4, 1160)] + rng.normal(size=(1160, 12)))
    x = x @ torch.from_numpy(rng.normal(size=(12, 12)))
    best, tried = choose_mixture(x[:160], x[160:], components=[4], covariances=["full"])
    assert best.prior > 0
    assert tried[best] < tried[Choice(4, "full", 0.0)] - 0.5


def test_only_auto_settings_are_selected() -> None:
    x = clustered(600, 3)
    overrides = {"model.components": 2, "model.prior": 1.5, "trainer.steps": 1}
    flow = fit(x, model="mixture", progress=False, overrides=overrides)
    assert flow.record is not None
    model = flow.record.config["model"]
    assert (model["components"], model["prior"]) == (2, 1.5)
    assert model["covariance"] in ("full", "diagonal")


def test_diagonal_mixture_is_fitted_without_whitening() -> None:
    """The data are two clusters along the diagonal, each with independent columns. Whitening would mix the columns."""
    rng = np.random.default_rng(0)
    x = np.array([[0.0, 0.0], [10.0, 10.0]])[rng.integers(0, 2, 2000)] + rng.normal(size=(2000, 2)) * [0.1, 2.0]
    overrides = {"model.components": 2, "model.covariance": "diagonal", "model.prior": 0.0, "trainer.steps": 1}
    flow = fit(x, model="mixture", progress=False, overrides=overrides)
    reference = Reference(2, covariance_type="diag", random_state=0).fit(x)
    assert flow.log_prob(x).mean() > reference.score(x) - 0.02


def test_command_selects_components_and_resume_keeps_them(run: Run, tmp_path: Path, without_figures: None) -> None:
    np.save(tmp_path / "x.npy", clustered(1000, 3))
    arguments = ["model=mixture", "data=array", f"data.path={tmp_path}/x.npy", f"hydra.run.dir={tmp_path}/r"]
    assert run("flowtrain", *arguments)[0] == 0
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["nll"] < result["baselines"]["gaussian"]["nll"]
    assert run("flowtrain", f"resume={tmp_path}/r", "trainer.steps=30")[0] == 0
    assert run("flowsample", f"ckpt={tmp_path}/r", "n=5", f"out={tmp_path}/s.npy")[0] == 0


def test_invalid_mixture_settings_are_refused() -> None:
    with pytest.raises(ConfigError):
        mixture(2, components=0)
    with pytest.raises(ConfigError):
        mixture(2, covariance="round")
    with pytest.raises(ConfigError):
        mixture(2, prior=-1.0)
    with pytest.raises(ConfigError):
        fit("moons", model="mixture", progress=False, overrides={"model.components": "auto"})
    with pytest.raises(ConfigError):
        fit("moons", model="mixture", progress=False, overrides={"model.covariance": "auto"})
    with pytest.raises(ConfigError):
        fit(clustered(100, 2), model="mixture", progress=False, overrides={"model.components": "many"})


def two_regressions(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x (n, 1) on one of two lines, chosen with a probability that depends on c (n, 1), and log p(x | c)."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(n, 1, generator=generator)
    share = torch.sigmoid(c)
    parts = D.Normal(torch.cat([1.5 * c + 1, -c - 1], 1), torch.tensor([0.3, 0.5]))
    which = (torch.rand(n, 1, generator=generator) > share).long()
    x = (parts.mean + parts.stddev * torch.randn(n, 2, generator=generator)).gather(1, which)
    weights = D.Categorical(torch.cat([share, 1 - share], 1))
    return x, c, D.MixtureSameFamily(weights, parts).log_prob(x.squeeze(1))


@pytest.mark.slow
def test_conditional_mixture_learns_a_mixture_of_regressions() -> None:
    flow = mixture(1, components=4, conditional=True, classes=1)
    (x, c, _), (x_val, c_val, expected) = two_regressions(5000, 0), two_regressions(10000, 1)
    flow.base.initialize(flow.bijection.initialize(x, c))

    def log_prob(x: Tensor, c: Tensor) -> Tensor:
        z, log_det = flow.bijection.inverse(x, c)
        return flow.base_log_prob(z, c) + log_det

    before = (expected - log_prob(x_val, c_val)).mean().item()
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)
    for _ in range(700):
        rows = torch.randint(len(x), (512,))
        loss = -log_prob(x[rows], c[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert before > 0.3
    assert (expected - log_prob(x_val, c_val)).mean().item() < 0.02


def test_conditional_mixture_by_the_commands(run: Run, tmp_path: Path, without_figures: None) -> None:
    """Each class has two clusters. The density checks pass, and the samples have the means of the classes."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 2000)
    x = 0.5 * rng.normal(size=(2000, 2)) + np.where(rng.random((2000, 1)) < 0.5, 3, -3) + 10 * label[:, None]
    np.savetxt(tmp_path / "x.csv", np.column_stack([x, label]), delimiter=",", header="a,b,y", comments="")
    arguments = ["model=mixture", "data=array", f"data.path={tmp_path}/x.csv", "data.label=y", "trainer.steps=300"]
    code, _, err = run("flowtrain", *arguments, "model.conditional=true", f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    result = json.loads((tmp_path / "r/result.json").read_text())
    # log 2 for the cluster, and two Gaussian columns with the standard deviation 0.5
    assert result["nll"] == pytest.approx(np.log(2) + 2 * (0.5 * np.log(2 * np.pi) + 0.5 + np.log(0.5)), abs=0.12)
    assert all(check["passed"] is not False for check in result["checks"].values())
    assert result["calibration"]["p_value"] > 1e-4
    assert run("floweval", f"ckpt={tmp_path}/r")[0] == 0
    assert run("flowsample", f"ckpt={tmp_path}/r", "n=500", "label=1", f"out={tmp_path}/s.npy")[0] == 0
    assert abs(np.load(tmp_path / "s.npy").mean() - 10) < 1
    assert run("flowtrain", f"resume={tmp_path}/r", "trainer.steps=310")[0] == 0
