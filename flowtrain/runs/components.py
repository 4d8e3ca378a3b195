"""Chooses the settings of model=mixture that are `auto`, by validation NLL."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowtrain.bases import COVARIANCES, GaussianMixture
from flowtrain.data.base import Dataset
from flowtrain.data.types import on_line
from flowtrain.runs.auto_settings import AUTO, FROM_DATA
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import counted
from flowtrain.utils.process import seeded
from flowtrain.utils.status import phase
from flowtrain.utils.weighting import average, resample

log = logging.getLogger("flowtrain")

# the numbers of components that are tried: powers of two first, then the neighbours of the best number
COMPONENT_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# a family of mixtures stops after this many numbers of components in a row without improvement
PATIENCE = 2
# strengths of the prior in rows; for full covariances, in rows per column. GROWING: used while the number of components
# is doubled. BESIDE: tried afterwards for the best mixture
GROWING: dict[str, tuple[float, ...]] = {"full": (0.0, 0.25), "diagonal": (0.0,)}
BESIDE: dict[str, tuple[float, ...]] = {"full": (0.1, 1.0), "diagonal": (0.5, 2.0)}
# largest numbers of training rows for EM and of validation rows
MOST_ROWS, MOST_VAL = 10_000, 5_000
# smallest number of training rows for each component
LEAST_ROWS = 10
# for a conditional mixture, the number of components, and the largest number of columns with full covariances
CONDITIONAL_COMPONENTS, MOST_COLUMNS = 8, 32
# seconds after which no further mixture is tried
SECONDS = 60.0


@dataclass(frozen=True)
class Choice:
    """Settings of model=mixture. The attributes have the names of the keys."""

    components: int
    covariance: str
    prior: float

    @property
    def description(self) -> str:
        """The settings as a phrase for messages."""
        prior = f", prior of {self.prior:g} rows" if self.prior else ""
        return f"{counted(self.components, 'component')}, {self.covariance}{prior}"


def resolve_components(config: Mapping[str, Any], data: Dataset, seconds: float = SECONDS) -> dict[str, Any]:
    """Returns the config with each `auto` of a mixture's `components`, `covariance` and `prior` replaced by its value.

    The mixture with these values has the lowest validation NLL among the mixtures that `choose_mixture` fits. The rows
    are standardised, which changes every NLL by the same amount. These fits ignore a context, so a conditional mixture
    gets fixed values instead.

    Args:
        seconds: the time after which no further mixture is tried.

    Raises:
        ConfigError: `auto` for data without a finite training set.
    """
    model = config["model"]
    asked = [key for key in FROM_DATA if model.get(key) == AUTO]
    if not asked:
        return dict(config)
    if data.context or model.get("conditional"):
        full = math.prod(data.event_shape) <= MOST_COLUMNS
        fixed = Choice(CONDITIONAL_COMPONENTS, "full" if full else "diagonal", 0.0)
        return {**config, "model": {**model, **{key: asdict(fixed)[key] for key in asked}}}
    train, val = training_rows(data), data.val[:MOST_VAL]
    if train is None:
        raise ConfigError(f"model.{asked[0]}=auto is only possible for a finite training set: give a value")
    of_val = data.val_weights
    with phase("choosing the mixture"), seeded(int(config["seed"]), torch.device("cpu")):
        parts = [(part + torch.rand(part.shape) if data.integer_valued else part).flatten(1) for part in (train, val)]
        rows, held = (part.double().cpu() for part in parts)
        if data.types:
            # the mixture is fitted on the real line
            rows, held = (torch.from_numpy(on_line(data.types, part.numpy())) for part in (rows, held))
        mean, std = rows.mean(0), rows.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        best, tried = choose_mixture(
            (rows - mean) / std,
            (held - mean) / std,
            components=COMPONENT_COUNTS if "components" in asked else [whole("model.components", model["components"])],
            covariances=COVARIANCES if "covariance" in asked else [model.get("covariance", "full")],
            priors=None if "prior" in asked else [model.get("prior", 0.0)],
            seconds=seconds,
            weights=None if of_val is None else of_val[:MOST_VAL],
        )
    volume = float(std.log().sum())
    log.info(
        "mixture: %s: validation NLL %.3f nats, the lowest of %d", best.description, tried[best] + volume, len(tried)
    )
    for each, nll in tried.items():
        log.debug("mixture: %s: validation NLL %.3f nats", each.description, nll + volume)
    return {**config, "model": {**model, **{key: asdict(best)[key] for key in asked}}}


def training_rows(data: Dataset) -> Tensor | None:
    """Returns at most MOST_ROWS training rows, resampled by their weights. None for endless data.

    `training.initialization` fits the mixture to the same rows.
    """
    train, weights = data.train_rows(MOST_ROWS), data.row_weights(MOST_ROWS)
    return train if train is None or weights is None else train[resample(weights).to(train.device)]


def choose_mixture(
    train: Tensor,
    val: Tensor,
    components: Sequence[int] = COMPONENT_COUNTS,
    covariances: Sequence[str] = COVARIANCES,
    priors: Sequence[float] | None = None,
    seconds: float = SECONDS,
    weights: Tensor | None = None,
) -> tuple[Choice, dict[Choice, float]]:
    """Returns the mixture with the lowest validation NLL, and the NLLs of all mixtures tried, in nats.

    A family of mixtures has a covariance type and a prior. All families are fitted with 1 component, then with 2, 4 and
    so on. A family stops after PATIENCE numbers of components without improvement. Then the best mixture is varied:
    other priors, and the neighbouring numbers of components.

    Args:
        train, val: rows (n, d) and (m, d), float64.
        components: numbers of components in increasing order.
        covariances: types of covariance.
        priors: strengths of the prior. None: the strengths in `GROWING` and `BESIDE`.
        seconds: the time after which no further mixture is tried.
        weights: the weights of the validation rows, (m,), or None.
    """
    trials = _Trials(train, val, components[0], seconds, weights)

    def strengths(covariance: str, shares: Mapping[str, Sequence[float]]) -> list[float]:
        each = train.shape[1] if covariance == "full" else 1
        return [share * each for share in shares[covariance]] if priors is None else list(priors)

    doubled = [k for k in components if k & (k - 1) == 0]
    trials.grow([(c, prior) for c in covariances for prior in strengths(c, GROWING)], doubled or components)
    for prior in strengths(trials.best.covariance, BESIDE):
        trials.fit(replace(trials.best, prior=prior))
    place = components.index(trials.best.components)
    for k in components[max(0, place - 1) : place + 2]:
        trials.fit(replace(trials.best, components=k))
    return trials.best, trials.nll


class _Trials:
    """Fits mixtures to training rows and scores them on validation rows, within a time limit.

    Args:
        least: the smallest number of components, to which LEAST_ROWS does not apply.
        seconds: the time limit.
        weights: the weights of the validation rows, (m,), or None.
    """

    def __init__(self, train: Tensor, val: Tensor, least: int, seconds: float, weights: Tensor | None = None) -> None:
        self.weights = weights
        self.train, self.val, self.least, self.end = train, val, least, time.perf_counter() + seconds
        self.nll: dict[Choice, float] = {}
        # by family: seconds per component of the last mixture
        self.took: dict[tuple[str, float], float] = {}

    @property
    def best(self) -> Choice:
        return min(self.nll, key=lambda each: self.nll[each])

    def fit(self, choice: Choice) -> float | None:
        """Returns the validation NLL of a mixture; None if there are too few rows or too little time for it."""
        if choice in self.nll:
            return self.nll[choice]
        family = choice.covariance, choice.prior
        expected = choice.components * self.took.get(family, max(self.took.values(), default=0.0))
        too_few = choice.components > self.least and len(self.train) < LEAST_ROWS * choice.components
        if self.nll and (too_few or time.perf_counter() + expected > self.end):
            return None
        begun = time.perf_counter()
        base = GaussianMixture(self.train.shape[1], choice.components, choice.covariance, choice.prior).double()
        base.initialize(self.train)
        with torch.no_grad():
            nll = -float(average(base.log_prob(self.val), self.weights))
        self.nll[choice] = nll if math.isfinite(nll) else math.inf
        self.took[family] = (time.perf_counter() - begun) / choice.components
        return self.nll[choice]

    def grow(self, families: Sequence[tuple[str, float]], components: Sequence[int]) -> None:
        """Fits mixtures of the families with increasing numbers of components, as described in `choose_mixture`."""
        growing = dict.fromkeys(families, (math.inf, 0))
        for k in components:
            for family, (lowest, waited) in list(growing.items()):
                nll = self.fit(Choice(k, *family))
                if nll is not None:
                    lowest, waited = (nll, 0) if nll < lowest else (lowest, waited + 1)
                growing[family] = lowest, waited
                if nll is None or waited == PATIENCE:
                    del growing[family]
