"""Chooses a Gaussian mixture by validation NLL: the settings of model=mixture that are `auto`."""

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
from flowtrain.runs.auto_settings import AUTO, FROM_DATA
from flowtrain.utils.arguments import whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import counted
from flowtrain.utils.process import seeded
from flowtrain.utils.status import phase

log = logging.getLogger("flowtrain")

# the numbers of components that are tried: powers of two first, and then those beside the best
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# the most numbers in a row that do not improve on the best of their family
PATIENCE = 2
# strengths of the prior, in rows; of full covariances in rows for each column: those with which mixtures grow, and
# those that are tried beside the best mixture
GROWING: dict[str, tuple[float, ...]] = {"full": (0.0, 0.25), "diagonal": (0.0,)}
BESIDE: dict[str, tuple[float, ...]] = {"full": (0.1, 1.0), "diagonal": (0.5, 2.0)}
# rows that EM and the validation take
MOST_ROWS, MOST_VAL = 10_000, 5_000
# training rows for each component, at the least
LEAST_ROWS = 10
# seconds after which no further mixture is tried
SECONDS = 60.0


@dataclass(frozen=True)
class Choice:
    """The settings of model=mixture, by the names of their keys."""

    components: int
    covariance: str
    prior: float

    @property
    def words(self) -> str:
        """The settings in words."""
        prior = f", prior of {self.prior:g} rows" if self.prior else ""
        return f"{counted(self.components, 'component')}, {self.covariance}{prior}"


def resolve_components(config: Mapping[str, Any], data: Dataset, seconds: float = SECONDS) -> dict[str, Any]:
    """The config with each `auto` of a mixture's `components`, `covariance` and `prior` replaced by its value.

    The values have the lowest validation NLL among the mixtures that `chosen` tries. Only the training rows are fitted.
    The rows are standardised, which changes every NLL by the same amount.

    Args:
        seconds: the time after which no further mixture is tried.

    Raises:
        ConfigError: `auto` for data without a finite training set.
    """
    model = config["model"]
    asked = [key for key in FROM_DATA if model.get(key) == AUTO]
    if not asked:
        return dict(config)
    train, val = data.train_rows(MOST_ROWS), data.val[:MOST_VAL]
    if train is None:
        raise ConfigError(f"model.{asked[0]}=auto: only for tables, whose rows are a fixed set; give a value")
    with phase("choosing the mixture"), seeded(int(config["seed"]), torch.device("cpu")):
        parts = [(part + torch.rand(part.shape) if data.integer_valued else part).flatten(1) for part in (train, val)]
        rows, held = (part.double().cpu() for part in parts)
        mean, std = rows.mean(0), rows.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        best, tried = chosen(
            (rows - mean) / std,
            (held - mean) / std,
            components=CANDIDATES if "components" in asked else [whole("model.components", model["components"])],
            covariances=COVARIANCES if "covariance" in asked else [model.get("covariance", "full")],
            priors=None if "prior" in asked else [model.get("prior", 0.0)],
            seconds=seconds,
        )
    volume = float(std.log().sum())
    log.info("mixture: %s: validation NLL %.3f nats, the lowest of %d", best.words, tried[best] + volume, len(tried))
    for each, nll in tried.items():
        log.debug("mixture: %s: validation NLL %.3f nats", each.words, nll + volume)
    return {**config, "model": {**model, **{key: asdict(best)[key] for key in asked}}}


def chosen(
    train: Tensor,
    val: Tensor,
    components: Sequence[int] = CANDIDATES,
    covariances: Sequence[str] = COVARIANCES,
    priors: Sequence[float] | None = None,
    seconds: float = SECONDS,
) -> tuple[Choice, dict[Choice, float]]:
    """The mixture with the lowest validation NLL, and the NLL in nats of each one that was tried.

    Families of mixtures, each with a covariance and a prior, grow in turn: all of them with 1 component, then all with
    2, with 4 and so on. A family stops when it has not improved PATIENCE times in a row. Then other priors and the
    numbers of components between are tried beside the best mixture.

    Args:
        train, val: rows (n, d) and (m, d), float64.
        components: in increasing order.
        priors: None: those in `GROWING` and `BESIDE`.
        seconds: the time after which no further mixture is tried.
    """
    trials = _Trials(train, val, components[0], seconds)

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
    """Mixtures that are fitted to training rows and scored on validation rows, within a time.

    Args:
        least: a number of components that may have any number of rows.
    """

    def __init__(self, train: Tensor, val: Tensor, least: int, seconds: float) -> None:
        self.train, self.val, self.least, self.end = train, val, least, time.perf_counter() + seconds
        self.nll: dict[Choice, float] = {}
        # seconds for each component of the last mixture of a family
        self.took: dict[tuple[str, float], float] = {}

    @property
    def best(self) -> Choice:
        return min(self.nll, key=lambda each: self.nll[each])

    def fit(self, choice: Choice) -> float | None:
        """The validation NLL of a mixture; None if there are not enough rows or not enough time for it."""
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
            nll = -float(base.log_prob(self.val).mean())
        self.nll[choice] = nll if math.isfinite(nll) else math.inf
        self.took[family] = (time.perf_counter() - begun) / choice.components
        return self.nll[choice]

    def grow(self, families: Sequence[tuple[str, float]], components: Sequence[int]) -> None:
        """Fits mixtures of the families with increasing numbers of components, as `chosen` says."""
        growing = dict.fromkeys(families, (math.inf, 0))
        for k in components:
            for family, (lowest, waited) in list(growing.items()):
                nll = self.fit(Choice(k, *family))
                if nll is not None:
                    lowest, waited = (nll, 0) if nll < lowest else (lowest, waited + 1)
                growing[family] = lowest, waited
                if nll is None or waited == PATIENCE:
                    del growing[family]
