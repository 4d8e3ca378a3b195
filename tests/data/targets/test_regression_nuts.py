"""Posteriors of logistic regressions by reverse KL, compared with long runs of NumPyro's NUTS on scikit-learn's data.

The means agree within 0.05 posterior standard deviations, and the standard deviations within 5%.
"""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets

import flowtrain
from flowtrain.data.targets.regression import read_classes

pytestmark = pytest.mark.slow

# rows of the classes 0 and 1 are kept
DATA = {"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer}


def written(name: str, path: Path) -> Path:
    data = DATA[name]()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*data.feature_names, "class"])
        rows.writerows(
            [*map(float, x), data.target_names[y]] for x, y in zip(data.data, data.target, strict=True) if y < 2
        )
    return path


def nuts(path: Path) -> np.ndarray:
    """Returns 20,000 samples (20,000, k + 1) of two chains, with effective sample sizes of at least 5,000."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax = pytest.importorskip("jax")
        numpyro = pytest.importorskip("numpyro")
        from numpyro import distributions as dist
        from numpyro.diagnostics import effective_sample_size
        from numpyro.infer import MCMC, NUTS

        features, signs, _ = read_classes(path, "class")
        with jax.enable_x64(True):

            def model() -> None:
                w = numpyro.sample("w", dist.Normal(0, 1).expand([features.shape[1] + 1]).to_event(1))
                logits = jax.numpy.asarray(features) @ w[:-1] + w[-1]
                numpyro.sample("y", dist.Bernoulli(logits=logits), obs=jax.numpy.asarray((signs + 1) / 2))

            chains = MCMC(
                NUTS(model, dense_mass=True),
                num_warmup=1000,
                num_samples=10_000,
                num_chains=2,
                chain_method="vectorized",
                progress_bar=False,
            )
            chains.run(jax.random.PRNGKey(1))
            w = np.asarray(chains.get_samples(group_by_chain=True)["w"])
    for values in (w, (w - w.mean((0, 1))) ** 2):
        assert effective_sample_size(values).min() > 5000
    return w.reshape(-1, w.shape[-1])


@pytest.mark.parametrize(("name", "steps"), [("wine", 1000), ("breast_cancer", 2000)])
def test_the_posterior_agrees_with_nuts(name: str, steps: int, tmp_path: Path) -> None:
    path = written(name, tmp_path / f"{name}.csv")
    reference = nuts(path)
    # the settings in flowtrain/data/README.md
    overrides = {
        "target.path": str(path),
        "target.label": "class",
        "model.layers": 2,
        "model.bins": 8,
        "model.mixing": "linear",
    }
    flow = flowtrain.fit_target("logistic_regression", steps=steps, progress=False, overrides=overrides)
    torch.manual_seed(0)
    x = flow.sample(200_000).double().numpy()
    std = reference.std(0)
    assert np.abs((x.mean(0) - reference.mean(0)) / std).max() < 0.05
    assert np.abs(x.std(0) / std - 1).max() < 0.05
