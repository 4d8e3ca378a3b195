"""Chooses a Gaussian mixture by validation NLL: the settings of model=mixture that are `auto`."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

# the numbers of components that are tried, in this order, until so many in a row do not improve on the best
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PATIENCE = 2
# strengths of the prior that are tried besides none, in rows; of full covariances in rows for each column
PRIORS = {"full": (0.25, 1.0), "diagonal": (0.5, 2.0)}
# the same with a prior. It is given up at once if its first NLL is higher by HOPELESS nats, and is not tried for a
# covariance whose NLL is higher by FAR nats than that of the other
PRIOR_PATIENCE, HOPELESS, FAR = 3, 0.3, 3.0
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

    Each covariance is tried without a prior and with increasing numbers of components, and then with the priors, from
    the best number of components so far: a prior allows for more of them.

    Args:
        train, val: rows (n, d) and (m, d), float64.
        components: in increasing order.
        priors: in increasing order; None: those in `PRIORS`.
        seconds: the time after which no further mixture is tried.
    """
    end, tried = time.perf_counter() + seconds, dict[Choice, float]()

    def scan(covariance: str, prior: float) -> None:
        own = {each: nll for each, nll in tried.items() if each.covariance == covariance}
        least = min(own, key=lambda each: own[each]).components if own else 0
        numbers = [k for k in components if k >= least]
        best, waited, took = min(own.values(), default=math.inf), 0, 0.0
        for before, k in zip([0, *numbers], numbers, strict=False):
            expected = took * k / before if before else 0.0
            too_few = k > components[0] and len(train) < LEAST_ROWS * k
            if too_few or (tried and time.perf_counter() + expected > end):
                return
            begun = time.perf_counter()
            base = GaussianMixture(train.shape[1], k, covariance, prior).double()
            base.initialize(train)
            with torch.no_grad():
                nll = -float(base.log_prob(val).mean())
            nll = nll if math.isfinite(nll) else math.inf
            took = time.perf_counter() - begun
            tried[Choice(k, covariance, prior)] = nll
            if nll > best + HOPELESS and own and not before:
                return
            best, waited = (nll, 0) if nll < best else (best, waited + 1)
            if waited == (PRIOR_PATIENCE if own else PATIENCE):
                return

    first = [0.0] if priors is None else priors[:1]
    for covariance in covariances:
        scan(covariance, first[0])
    lowest = {c: min((n for each, n in tried.items() if each.covariance == c), default=math.inf) for c in covariances}
    for covariance in covariances:
        if lowest[covariance] > min(lowest.values()) + FAR:
            continue
        shares = PRIORS[covariance]
        d = train.shape[1] if covariance == "full" else 1
        for prior in [share * d for share in shares] if priors is None else priors[1:]:
            scan(covariance, prior)
    return min(tried, key=lambda each: tried[each]), tried
