"""The key `df`: flows with a base of Student t distributions, and its automatic value for tables."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run
from scipy import stats
from torch import nn

import flowtrain
from flowtrain.bases import StandardNormal, StudentT
from flowtrain.cli.config_files import compose_defaults
from flowtrain.flow import Flow
from flowtrain.models.glow import glow
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.models.realnvp import realnvp
from flowtrain.runs.build import build_data
from flowtrain.runs.tails import DF, resolve_df
from flowtrain.training import checkpoint
from flowtrain.utils.errors import ConfigError

MODELS: dict[str, Callable[..., Flow]] = {
    "nsf": lambda shape=3, **keys: nsf(shape, layers=2, hidden=[8], bins=4, **keys),
    "maf": lambda shape=3, **keys: maf(shape, layers=2, hidden=[8], **keys),
    "realnvp": lambda shape=3, **keys: realnvp(shape, hidden=[8], **keys),
    "glow": lambda shape=3, **keys: glow(shape, steps=2, hidden=[8], **keys),
}


@pytest.mark.parametrize("name", MODELS)
def test_untrained_density_is_the_t_distribution(name: str) -> None:
    flow, x = MODELS[name](df=3.0).eval(), torch.tensor([[0.0, 1.0, -2.0], [40.0, -0.1, 7.0]])
    # the layers are the identity, or a permutation or rotation with log-determinant 0
    z = flow.inverse(x)
    expected = stats.t.logpdf(z.detach().numpy(), 3.0).sum(1)
    np.testing.assert_allclose(flow.log_prob(x).detach().numpy(), expected, rtol=1e-6)
    assert isinstance(MODELS[name]().base, StandardNormal)


@pytest.mark.parametrize("name", MODELS)
def test_degrees_of_freedom_are_trained(name: str) -> None:
    flow, x = MODELS[name](df=20.0), 0.5 * torch.randn(50, 3)
    flow.log_prob(x).mean().backward()
    base = flow.base
    assert isinstance(base, StudentT)
    assert isinstance(base.log_df, nn.Parameter)
    assert base.log_df.grad is not None
    assert base.log_df.grad.all()


@pytest.mark.parametrize("df", [0, -1.0, math.inf, "heavy"])
@pytest.mark.parametrize("name", MODELS)
def test_invalid_degrees_of_freedom_are_refused(name: str, df: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.df"):
        MODELS[name](df=df)


@pytest.mark.parametrize("make", [realnvp, glow])
def test_images_can_have_heavy_tails(make: Callable[..., Flow]) -> None:
    flow = make((1, 8, 8), hidden=[4], df=10.0)
    assert flow.log_prob(torch.randn(2, 1, 8, 8)).isfinite().all()
    assert flow.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("make", [nsf, maf])
def test_degrees_of_freedom_are_refused_with_circular_columns(make: Callable[..., Flow]) -> None:
    with pytest.raises(ConfigError, match=r"model\.df=5.0.*circular"):
        make(3, circular=[1], df=5.0)


def test_fit_finds_the_degrees_of_freedom() -> None:
    torch.manual_seed(0)
    flow = nsf(1, layers=1, hidden=[4], bins=2, df=20.0)
    base = flow.base
    assert isinstance(base, StudentT)
    x = torch.distributions.StudentT(torch.tensor(3.0)).sample((4000, 1))
    flow.log_prob(x)
    optimizer = torch.optim.Adam([base.log_df], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-base.log_prob(x).mean()).backward()
        optimizer.step()
    found, _, _ = stats.t.fit(x[:, 0].numpy(), floc=0, fscale=1)
    assert float(base.df.detach()) == pytest.approx(found, rel=0.02)


def chosen(x: np.ndarray[Any, Any], folder: Path, *more: str) -> float | None:
    np.save(folder / "t.npy", x)
    config = compose_defaults(["model=nsf", "data=array", f"data.path={folder}/t.npy", *more])
    found: float | None = resolve_df(config, build_data(config))["model"]["df"]
    return found


def test_automatic_value_depends_on_the_tails(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    normal, heavy = rng.normal(size=(3000, 3)), rng.standard_t(3, size=(3000, 3))
    assert chosen(normal, tmp_path) is None
    assert chosen(rng.uniform(size=(3000, 3)), tmp_path) is None
    assert chosen(heavy, tmp_path) == DF
    assert chosen(1e6 * heavy - 5, tmp_path) == DF
    assert chosen(heavy, tmp_path, "model.df=null") is None
    assert chosen(normal, tmp_path, "model.df=7") == 7
    # exp(z) has heavy tails, but is normal on the real line
    positive = np.exp(normal)
    assert chosen(positive, tmp_path) == DF
    assert chosen(positive, tmp_path, "data.types={c0: positive, c1: positive, c2: positive}") is None
    heavy[:, 0] = rng.uniform(0, 360, size=3000)
    assert chosen(heavy, tmp_path, "data.types={c0: 'circular(360)'}") is None


def test_weights_of_zero_do_not_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(3000, 2)), 100 + rng.normal(size=(20, 2))])
    table = np.column_stack([x, (np.arange(len(x)) < 3000).astype(float)])
    assert chosen(x, tmp_path) == DF
    assert chosen(table, tmp_path, "data.weights=2") is None


@pytest.mark.usefixtures("without_figures")
def test_run_with_heavy_tails(run: Run) -> None:
    np.save("t.npy", np.random.default_rng(0).standard_t(3, size=(600, 2)))
    settings = ["model=nsf", "model.layers=2", "model.hidden=[8]", "trainer.steps=20", "trainer.ema=0.1"]
    code, _, err = run("flowtrain", *settings, "data=array", "data.path=t.npy", "hydra.run.dir=r")
    assert code == 0, err
    assert checkpoint.load(Path("r/checkpoints/best.pt"))["config"]["model"]["df"] == DF
    flow = flowtrain.load("r")
    assert isinstance(flow, Flow)
    assert isinstance(flow.base, StudentT)
    assert (flow.base.df != DF).all()
    code, _, err = run("floweval", "ckpt=r")
    assert code == 0, err
    code, _, err = run("flowtrain", "resume=r", "trainer.steps=30")
    assert code == 0, err
    code, _, err = run("flowtrain", "from=r", "trainer.steps=3", "hydra.run.dir=s")
    assert code == 0, err
    further = flowtrain.load("s")
    assert isinstance(further, Flow)
    assert isinstance(further.base, StudentT)
