"""Tests of a sampler against data: ranks of the columns (SBC), and expected coverage by distance (TARP) and by density.

A row x with context c is compared with L samples of the flow p(. | c). A real-valued function orders the row and the
samples, and the rank of x is the number of samples with a smaller value. If the rows are draws from p(. | c), the rank
is uniform on 0 .. L for every function. Three kinds of functions are used here:

- each column (simulation-based calibration, Talts et al. 2018, Validating Bayesian inference algorithms with
  simulation-based calibration);
- the distance to a random reference point (TARP, Lemos et al. 2023, Sampling-based accuracy testing of posterior
  estimators, algorithm 2);
- -log p(x | c) (highest-density regions, Hermans et al. 2022, A crisis in simulation-based inference, equation 4).
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flowtrain.evaluation.log_likelihood import score_rows
from flowtrain.evaluation.result import Coverage, Ranks, RankTest, SimulationCalibration
from flowtrain.flow import Density
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.status import status
from flowtrain.utils.weighting import resample

# the largest number of rows, and the number of samples for each row
ROWS, SAMPLES = 1000, 200
# the largest number of elements of the samples that are drawn at once
AT_ONCE = 4_000_000
# the levels at which expected coverage is listed
LEVELS = (0.5, 0.8, 0.9, 0.95)
# the number of cells of [0, 1] whose edges are the points at which distribution functions are compared
CELLS = 100
# the number of simulated sets from which p-values and simultaneous bands are computed
SIMULATED = 10_000
# the distance of reference points from predictions of their rows, in standard deviations of each column
OFFSET = 2.0
# the rows are divided into this number of blocks, see `reference_points`
BLOCKS = 8


@torch.no_grad()
def simulation_calibration(
    flow: Density,
    x: Tensor,
    context: Tensor | None,
    log_p: Tensor,
    names: Sequence[str],
    samples: int = SAMPLES,
    options: Mapping[str, Any] = MappingProxyType({}),
    weights: Tensor | None = None,
) -> tuple[SimulationCalibration, Ranks]:
    """Compares evenly spaced rows of x (n, d), at most ROWS, with samples of the flow; see the docstring of this file.

    Args:
        context: the context of the rows, for a conditional flow; see `Flow.context_of`.
        log_p: log p of all rows, (n,), in nats. Rows with NaN are left out.
        names: the names of the columns of x. () means x1, x2, ...
        samples: L, the number of samples for each row.
        options: batch size, draws and seed: arguments of `score_rows`.
        weights: weights of the rows, (n,). Rows are then drawn by weight. Their number is so small that no row occurs
            twice, because the ranks of a repeated row are not independent.

    Returns:
        (result of the tests, ranks).

    Raises:
        ConfigError: negative weights.
    """
    kept = (~log_p.isnan()).nonzero().flatten()
    if weights is None:
        kept = kept[:: max(1, math.ceil(len(kept) / ROWS))]
    elif bool((weights < 0).any()):
        raise ConfigError("sbc: rows are drawn by weight, but some weights are negative; leave out sbc")
    else:
        w = weights[kept]
        kept = kept[resample(w, min(ROWS, int(w.sum() / w.max())))]
    device = flow.like.device
    x, log_p = x[kept].to(device), log_p[kept].to(device)
    context = None if context is None else context[kept].to(device)
    generator = torch.Generator(device).manual_seed(options.get("seed", 0))
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    references = reference_points((x - mean) / std, standardised(flow.features(context)), generator)
    parts: list[Ranks] = []
    size = max(1, AT_ONCE // (samples * x.shape[1]))
    with status("SBC", total=len(x), unit="row") as progress:
        for start in range(0, len(x), size):
            now = slice(start, start + size)
            rows, c = x[now], None if context is None else context[now].repeat_interleave(samples, 0)
            drawn = flow.quantized(flow.sample(samples * len(rows), context=c, generator=generator))
            scores = score_rows(flow, drawn, c, latents=0, unsolved=len(drawn), **options).log_p.to(device)
            drawn = drawn.view(len(rows), samples, -1)
            found = Ranks(
                jittered_ranks(rows.to(drawn.dtype), drawn, generator),
                tarp_ranks((rows - mean) / std, (drawn - mean) / std, references[now], generator),
                jittered_ranks(-log_p[now], -scores.view(len(rows), samples), generator),
            )
            parts.append(Ranks(*(u.cpu() for u in found)))
            progress.advance(len(rows))
    ranks = Ranks(*map(torch.cat, zip(*parts, strict=True)))
    names = names or [f"x{j + 1}" for j in range(x.shape[1])]
    tests = {name: rank_test(u) for name, u in zip(names, ranks.columns.T, strict=True)}
    return SimulationCalibration(len(x), samples, tests, coverage(ranks.tarp), coverage(ranks.density)), ranks


def coverage(u: Tensor) -> Coverage:
    """Computes the expected coverage of credible regions, and tests it.

    Args:
        u: for each row, the probability of the smallest region that contains the row, (n,).
    """
    test = rank_test(u)
    return Coverage(
        test.statistic, test.p_value, LEVELS, tuple(float((u <= level).double().mean()) for level in LEVELS)
    )


def standardised(features: Tensor | None) -> Tensor | None:
    """Returns features (n, k) with zero mean and unit variance. Labels (n,) become one-hot vectors."""
    if features is None:
        return None
    if not features.is_floating_point():
        features = torch.nn.functional.one_hot(features)
    features = features.double()
    std = features.std(0, correction=0)
    return (features - features.mean(0)) / torch.where(std > 0, std, 1.0)


def jittered_ranks(x: Tensor, samples: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns u = (r + v) / (L + 1), (n, ...), with the rank r of x (n, ...) among samples (n, L, ...) and v ~ U[0, 1).

    r is the number of samples below x. Ties are broken at random. If x and its samples are draws from the same
    distribution, r is uniform on 0 .. L, and u is exactly uniform on [0, 1].

    Args:
        generator: a random generator on the device of x. None: the global generator.

    Example:
        >>> u = jittered_ranks(torch.tensor([0.5]), torch.tensor([[0.1, 0.2, 0.9]]))
        >>> bool(2 / 4 <= u < 3 / 4)
        True
    """
    x = x.unsqueeze(1)
    below, ties = (samples < x).sum(1).double(), (samples == x).sum(1).double()
    v = torch.rand(below.shape, dtype=torch.float64, device=x.device, generator=generator)
    return (below + v * (ties + 1)) / (samples.shape[1] + 1)


def tarp_ranks(x: Tensor, samples: Tensor, references: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns jittered ranks (n,) of |x - r| among |s_l - r|.

    x and the references r are (n, d), and the samples s are (n, L, d). The credible region with probability a is the
    ball around r that contains the share a of the samples. The share of rows with u <= a is its expected coverage.
    """
    distance = (x - references).square().sum(1)
    return jittered_ranks(distance, (samples - references.unsqueeze(1)).square().sum(2), generator)


def reference_points(x: Tensor, context: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
    """Returns a reference point r (n, d) for TARP for each row of x (n, d), which is standardised.

    r = y + OFFSET s + e / 2, where y is a linear prediction of the row from its context (n, k), s is a random vector of
    -1 and 1 that all rows share, and e is standard normal. References that do not depend on the context cannot detect
    a flow that ignores its context (Lemos et al. 2023, section 4). All rows share s, because the
    effects of wrong correlations cancel between different directions.

    y is a ridge regression on the earlier blocks of rows. Given the context, r does not depend on its row of x, and the
    ranks of all rows are independent. For the first block, and without a context, y is 0.
    """
    d = x.shape[1]
    s = 2.0 * torch.randint(0, 2, (d,), dtype=x.dtype, device=x.device, generator=generator) - 1
    noise = OFFSET * s + torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) / 2
    if context is None:
        return noise
    c = torch.cat([context, torch.ones_like(context[:, :1])], 1)
    predicted = torch.zeros_like(x)
    size = math.ceil(len(x) / BLOCKS)
    ridge = torch.eye(c.shape[1], dtype=x.dtype, device=x.device)
    for start in range(size, len(x), size):
        past, now = c[:start], slice(start, start + size)
        predicted[now] = c[now] @ torch.linalg.solve(past.T @ past + ridge, past.T @ x[:start])
    return predicted + noise


def rank_test(u: Tensor) -> RankTest:
    """Tests whether u (n,) are draws from U[0, 1]. The p-value is simultaneous over all u.

    The test compares n F_n(k / K), k = 1 .. K - 1, with its binomial distribution. gamma is the smallest two-sided tail
    probability over k. The p-value is the share of simulated uniform sets with a gamma at most as large (Saeilynoja et
    al. 2022, Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple
    sample comparison, section 2). It is at least 1 / (SIMULATED + 1). Without u, statistic and
    p-value are NaN.
    """
    n = len(u)
    if n == 0:
        return RankTest(math.nan, math.nan)
    counts = _counts(u.cpu().double().unsqueeze(0))
    gamma = float(_smallest_tail(counts, n)[0])
    null = _null(n)
    ordered = u.cpu().double().sort().values
    rank = torch.arange(n, dtype=torch.float64, device="cpu")
    distance = torch.maximum((rank + 1) / n - ordered, ordered - rank / n).amax()
    return RankTest(float(distance), (1 + int((null <= gamma).sum())) / (1 + len(null)))


def simultaneous_band(n: int, level: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Returns points a (K - 1,), and lower and upper bounds of F_n(a) that hold at all points together.

    The bounds hold with the probability `level`. F_n is the distribution function of n draws from U[0, 1]. Each bound
    is a quantile of the binomial distribution, see `rank_test`.

    Example:
        >>> a, low, high = simultaneous_band(100)
        >>> float(a[49]), 0.3 < float(low[49]) < 0.4, 0.6 < float(high[49]) < 0.7
        (0.5, True, True)
    """
    gamma = _null(n).quantile(1 - level)
    inside = _tails(n) >= gamma
    count = torch.arange(n + 1, dtype=torch.float64, device="cpu").unsqueeze(1)
    low = torch.where(inside, count, torch.inf).amin(0)
    high = torch.where(inside, count, -torch.inf).amax(0)
    return _edges(), low / n, high / n


def _edges() -> Tensor:
    """Returns the inner edges of the cells, (K - 1,)."""
    return torch.arange(1, CELLS, dtype=torch.float64, device="cpu") / CELLS


def _counts(u: Tensor) -> Tensor:
    """Returns the number of u (m, n) below each inner edge of the cells, (m, K - 1)."""
    cell = (u * CELLS).long().clamp(0, CELLS - 1)
    found = torch.zeros(len(u), CELLS, dtype=torch.int64, device="cpu").scatter_add_(1, cell, torch.ones_like(cell))
    return found.cumsum(1)[:, :-1]


def _smallest_tail(counts: Tensor, n: int) -> Tensor:
    """Returns gamma, (m,), for counts (m, K - 1) of n numbers."""
    return _tails(n).gather(0, counts).amin(1)


@lru_cache(maxsize=4)
def _tails(n: int) -> Tensor:
    """Returns min(1, 2 P(B <= j), 2 P(B >= j)) for B ~ B(n, k / K), (n + 1, K - 1), for j = 0 .. n, k = 1 .. K - 1."""
    j = torch.arange(n + 1, dtype=torch.float64, device="cpu").unsqueeze(1)
    p = _edges()
    choices = torch.lgamma(j[-1] + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
    mass = (choices + j * p.log() + (n - j) * torch.log1p(-p)).exp()
    return 2 * torch.minimum(mass.cumsum(0), mass.flip(0).cumsum(0).flip(0)).clamp(max=0.5)


@lru_cache(maxsize=4)
def _null(n: int) -> Tensor:
    """Returns gamma of SIMULATED sets of n draws from U[0, 1], (SIMULATED,). The seed is fixed."""
    generator = torch.Generator("cpu").manual_seed(n)
    size = max(1, 2_000_000 // n)
    parts = []
    for start in range(0, SIMULATED, size):
        sets = torch.rand(min(size, SIMULATED - start), n, dtype=torch.float64, device="cpu", generator=generator)
        parts.append(_smallest_tail(_counts(sets), n))
    return torch.cat(parts)
