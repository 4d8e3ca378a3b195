"""model=mixture: EM on the first data, and the number of components by validation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Run
from sklearn.mixture import GaussianMixture as Reference

from flowtrain.models.mixture import mixture
from flowtrain.runs.components import CANDIDATES, chosen
from flowtrain.runs.fit import fit
from flowtrain.utils.errors import ConfigError


def clustered(n: int, k: int, d: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = 8 * rng.normal(size=(k, d))
    spread = rng.normal(size=(k, d, d))
    which = rng.integers(0, k, n)
    return centres[which] + np.einsum("nij,nj->ni", spread[which], rng.normal(size=(n, d)))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_fit_is_as_good_as_that_of_scikit_learn(covariance: str) -> None:
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
    torch.manual_seed(0)
    k, tried = chosen(x[:2000], x[2000:], "full")
    assert 4 <= k <= 8
    assert tried[k] == min(tried.values())
    assert set(tried) <= set(CANDIDATES)
    few, _ = chosen(x[:12], x[2000:], "full")
    assert few == 1


def test_command_chooses_and_keeps_the_number(run: Run, tmp_path: Path, without_figures: None) -> None:
    np.save(tmp_path / "x.npy", clustered(1000, 3))
    arguments = ["model=mixture", "data=array", f"data.path={tmp_path}/x.npy", f"hydra.run.dir={tmp_path}/r"]
    assert run("flowtrain", *arguments)[0] == 0
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["nll"] < result["baselines"]["gaussian"]["nll"]
    assert run("flowtrain", f"resume={tmp_path}/r", "trainer.steps=210")[0] == 0
    assert run("flowsample", f"ckpt={tmp_path}/r", "n=5", f"out={tmp_path}/s.npy")[0] == 0


def test_mistakes() -> None:
    with pytest.raises(ConfigError):
        mixture(2, components=0)
    with pytest.raises(ConfigError):
        mixture(2, covariance="round")
    with pytest.raises(ConfigError):
        fit("moons", model="mixture", progress=False, overrides={"model.components": "auto"})
