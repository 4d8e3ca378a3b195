"""Chooses the number of components of a Gaussian mixture by validation NLL: `model.components=auto`."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtrain.bases import GaussianMixture
from flowtrain.data.base import Dataset
from flowtrain.runs.auto_settings import AUTO
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import counted
from flowtrain.utils.process import seeded
from flowtrain.utils.status import phase

log = logging.getLogger("flowtrain")

# the numbers of components that are tried, in this order, until so many in a row do not improve on the best
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PATIENCE = 2
# rows that EM and the validation take
MOST_ROWS, MOST_VAL = 10_000, 5_000
# training rows for each component, at the least
LEAST_ROWS = 10
# seconds after which no further number is tried
SECONDS = 60.0


def resolve_components(config: Mapping[str, Any], data: Dataset, seconds: float = SECONDS) -> dict[str, Any]:
    """The config with `model.components=auto` replaced by the number with the lowest validation NLL.

    Only the training rows are fitted. The rows are standardised, which changes every NLL by the same amount.

    Args:
        seconds: the time after which no further number is tried.

    Raises:
        ConfigError: `auto` for data without a finite training set.
    """
    model = config["model"]
    if model.get("components") != AUTO:
        return dict(config)
    train, val = data.train_rows(MOST_ROWS), data.val[:MOST_VAL]
    if train is None:
        raise ConfigError("model.components=auto: only for tables, whose rows are a fixed set; give a number")
    with phase("choosing the number of components"), seeded(int(config["seed"]), torch.device("cpu")):
        parts = [(part + torch.rand(part.shape) if data.integer_valued else part).flatten(1) for part in (train, val)]
        rows, held = (part.double().cpu() for part in parts)
        mean, std = rows.mean(0), rows.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        k, tried = chosen((rows - mean) / std, (held - mean) / std, str(model.get("covariance", "full")), seconds)
    words = ", ".join(f"{n}: {nll + float(std.log().sum()):.3f}" for n, nll in tried.items())
    log.info("mixture: %s by validation NLL (%s nats)", counted(k, "component"), words)
    return {**config, "model": {**model, "components": k}}


def chosen(train: Tensor, val: Tensor, covariance: str, seconds: float = SECONDS) -> tuple[int, dict[int, float]]:
    """The number of components with the lowest validation NLL, and the NLL in nats of each number that was tried.

    Args:
        train, val: rows (n, d) and (m, d), float64.
    """
    begun, found = time.perf_counter(), dict[int, float]()
    best = CANDIDATES[0]
    for k in CANDIDATES:
        if k > 1 and (len(train) < LEAST_ROWS * k or time.perf_counter() - begun > seconds):
            break
        base = GaussianMixture(train.shape[1], k, covariance).double().fit(train)
        with torch.no_grad():
            nll = -float(base.log_prob(val).mean())
        found[k] = nll if math.isfinite(nll) else math.inf
        if found[k] < found[best]:
            best = k
        elif list(found).index(k) - list(found).index(best) >= PATIENCE:
            break
    return best, found
