"""Flows of columns with types against known densities: the KL is small and samples stay in the support."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from flowtrain.flow import Flow
from flowtrain.runs.fit import fit

Values = NDArray[np.float64]
N = 20_000
MIXTURE = (0.4, 0.6), (3.0, 0.5), (4.0, 1.5)


def von_mises_mixture(n: int, rng: np.random.Generator) -> Values:
    weights, means, kappas = MIXTURE
    which = rng.choice(2, n, p=weights)
    return np.degrees(rng.vonmises(np.array(means)[which], np.array(kappas)[which])) % 360


def log_von_mises_mixture(x: Values) -> Values:
    each = [w * stats.vonmises.pdf(np.radians(x), k, loc=m) for w, m, k in zip(*MIXTURE, strict=True)]
    return np.log(np.sum(each, 0) * math.pi / 180)


PROBABILITIES = np.array([0.5, 0.3, 0.15, 0.05])
# type, samples, and the log density; for whole numbers, the log probability
CASES: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], Callable[[Values], NDArray[np.bool_]]]] = {
    "gamma": (
        "positive",
        lambda n, rng: rng.gamma(2, 3, n),
        stats.gamma(2, scale=3).logpdf,
        lambda x: x > 0,
    ),
    "lognormal": (
        "positive",
        lambda n, rng: np.exp(rng.normal(0, 1.5, n)),
        stats.lognorm(1.5).logpdf,
        lambda x: x > 0,
    ),
    "beta": (
        "interval(0,1)",
        lambda n, rng: rng.beta(0.7, 1.5, n),
        stats.beta(0.7, 1.5).logpdf,
        lambda x: (x >= 0) & (x <= 1),
    ),
    "von Mises": (
        "circular(360)",
        von_mises_mixture,
        log_von_mises_mixture,
        lambda x: (x >= 0) & (x < 360),
    ),
    "Poisson": (
        "integer",
        lambda n, rng: rng.poisson(3, n).astype(float),
        stats.poisson(3).logpmf,
        lambda x: (x >= 0) & (x == np.floor(x)),
    ),
    "geometric": (
        "integer",
        lambda n, rng: rng.geometric(0.4, n) - 1.0,
        stats.geom(0.4, loc=-1).logpmf,
        lambda x: (x >= 0) & (x == np.floor(x)),
    ),
    "categorical": (
        "categorical",
        lambda n, rng: rng.choice(4, n, p=PROBABILITIES).astype(float),
        lambda x: np.log(PROBABILITIES[x.astype(int)]),
        lambda x: np.isin(x, [0, 1, 2, 3]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kl_is_small_and_samples_stay_in_the_support(name: str) -> None:
    kind, draw, log_density, in_support = CASES[name]
    rng = np.random.default_rng(0)
    flow: Flow = fit(
        draw(N, rng)[:, None],
        model="nsf",
        steps=400,
        progress=False,
        overrides={"data.types": {0: kind}, "model.layers": 3, "trainer.val_every": 100},
    )
    x = draw(N, rng)
    # for whole numbers, the mean of log p(x + u) over u is a lower bound of log P(x)
    kl = (log_density(x) - flow.log_prob(x[:, None]).astype(np.float64)).mean()
    assert kl < 0.02
    samples = flow.quantized(flow.sample(10_000)).double().numpy()[:, 0]
    assert in_support(samples).all()


def test_short_training_finds_a_dependence_on_categories() -> None:
    rng = np.random.default_rng(0)
    code = rng.choice(2, 2000)
    x = np.column_stack([rng.normal(6 * code, 1), code])
    flow = fit(
        x,
        model="nsf",
        steps=100,
        progress=False,
        overrides={"data.types": {1: "categorical"}, "model.layers": 2, "model.hidden": [16]},
    )
    samples = flow.quantized(flow.sample(2000)).numpy()
    means = [samples[samples[:, 1] == k, 0].mean() for k in (0, 1)]
    assert means == pytest.approx([0, 6], abs=1.0)
