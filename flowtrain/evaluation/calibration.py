"""Calibration: a Kolmogorov-Smirnov test of probability integral transforms of the data, also by context."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bases import Base
from flowtrain.data.context import CATEGORICAL, ContextColumn
from flowtrain.evaluation.ood_detection import share_below
from flowtrain.evaluation.result import Calibration, ContextBin, p_words
from flowtrain.utils.formatting import counted
from flowtrain.utils.weighting import average, effective_rows, equal_rows, stderr

log = logging.getLogger("flowtrain")

# Number of dimensions in the figure: those that deviate most
SHOWN = 8
RADIUS, DENSITY = "radius", "density"
# Calibration by context: number of bins of a real column, largest number of categories, and smallest number of rows
BINS, MOST_CATEGORIES, FEWEST = 4, 6, 20
# A warning names bins with a p-value below CLEAR_P and a distance above CLEAR_KS
CLEAR_P, CLEAR_KS = 1e-3, 0.1


@torch.no_grad()
def calibration(
    z: Tensor, base: Base, context: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Calibration, dict[str, Tensor]]:
    """Tests whether latents z (n, *event) of the data are draws from the base.

    Each of the `transforms` is tested separately. Latents with NaN are left out. If all rows have NaN, the statistic is
    NaN.

    With weights, the distribution function of the transforms is weighted, and the p-value is computed for the effective
    number of rows. It is approximate if the weights depend on the values.

    Args:
        z: the latents.
        base: the base of the flow.
        context: the labels or features of the rows, see `Base.given`.
        weights: the weights of the rows, (n,), or None.

    Returns:
        (result of the test, transforms for the figure by name, (n,) each).
    """
    kept = ~z.isnan().flatten(1).any(1)
    if weights is not None:
        kept &= weights != 0
        weights = weights[kept]
    z = z[kept]
    n = len(z)
    if n == 0:
        return Calibration(0, math.nan, RADIUS, math.nan, math.nan), {RADIUS: z.double().new_empty(0)}
    u = transforms(z, base, None if context is None else context[kept.to(context.device)])
    distances, names = ks_distance(u, weights), names_of_transforms(u)
    worst = int(distances.argmax())
    largest = float(distances[worst])
    found = Calibration(
        n=n,
        statistic=largest,
        worst=names[worst],
        p_value=min(1.0, u.shape[1] * ks_p_value(largest, n if weights is None else effective_rows(weights))),
        radius=float(distances[-1]),
    )
    shown = sorted(distances[:-1].argsort(descending=True)[:SHOWN].tolist())
    return found, {names[j]: _for_figure(u[:, j], weights) for j in (*shown, u.shape[1] - 1)}


@torch.no_grad()
def transforms(z: Tensor, base: Base, context: Tensor | None = None) -> Tensor:
    """Returns probability integral transforms of latents z (n, *event), (n, d + 1), float64.

    If the data are draws from the model, d + 1 transforms are uniform on [0, 1] (Rosenblatt 1952, Diebold et al. 1998):

    - u_j of each dimension j of the base, which is Phi(z_j) for a standard normal base;
    - F(|y|^2), where y_j = Phi^-1(u_j) and F is the chi-square distribution function with d degrees of freedom. The
      radius |y| also shows dependence between dimensions.

    Args:
        context: the labels or features of the rows, see `Base.given`.
    """
    z = z.double()
    d = z.flatten(1).shape[1]
    if context is not None:
        context = context.to(z) if context.is_floating_point() else context.to(z.device)
    base = copy.deepcopy(base).to(z).given(context)
    square = base.to_normal(z).square().sum(1, keepdim=True)
    return torch.cat([base.to_uniform(z), torch.special.gammainc(z.new_tensor(d / 2), square / 2)], 1)


def names_of_transforms(u: Tensor) -> list[str]:
    """Returns the names of the columns of `transforms`: z1, ..., zd and "radius"."""
    return [*(f"z{j + 1}" for j in range(u.shape[1] - 1)), RADIUS]


def density_calibration(
    log_p: Tensor, of_samples: Tensor, weights: Tensor | None = None
) -> tuple[Calibration, dict[str, Tensor]]:
    """Tests whether data are draws from an ensemble, by `density_ranks`. An ensemble has no latents.

    The test does not depend on the distribution of the rows within a level set of the density. The p-value comes from
    a two-sample test.

    Args:
        log_p: log p of the data, (n,). Rows with NaN are left out.
        of_samples: log p of samples of the ensemble with the context of the data, (m,), m >= n.
        weights: the weights of the data, (n,), or None.

    Returns:
        (result of the test, transforms for the figure by name).
    """
    u, weights, size = density_ranks(log_p, of_samples, weights)
    if not size:
        return Calibration(0, math.nan, DENSITY, math.nan, None), {DENSITY: log_p.new_empty(0)}
    distance = float(ks_distance(u.unsqueeze(1), weights))
    pit = {DENSITY: _for_figure(u, weights)}
    return Calibration(len(u), distance, DENSITY, ks_p_value(distance, size), None), pit


class Transformed(NamedTuple):
    """Transforms of some rows, with the weights and the effective number of rows for a test.

    Attributes:
        u: the transforms, (m,) or (m, t).
        weights: the weights of the rows, (m,), or None.
        size: the effective number of rows. 0 without rows.
    """

    u: Tensor
    weights: Tensor | None
    size: float


def density_ranks(log_p: Tensor, of_samples: Tensor, weights: Tensor | None = None) -> Transformed:
    """Returns the ranks u (n,) of log p (n,) among log p of samples (m,).

    u_i is the fraction of samples whose log p is below log p of row i. Ties count half. u_i is 1 minus the probability
    of the smallest highest-density region that contains the row (Hyndman 1996, Computing and graphing highest density
    regions). u_i is uniform if the data are draws from the model. Rows and samples with NaN are left out. With the
    size n m / (n + m), the one-sample test has the p-value of a two-sample test. The size is 0 without rows or samples.
    """
    kept = ~log_p.isnan()
    if weights is not None:
        kept &= weights != 0
        weights = weights[kept]
    log_p, of_samples = log_p[kept], of_samples[~of_samples.isnan()]
    n, m = len(log_p) if weights is None else effective_rows(weights), len(of_samples)
    if not n or not m:
        return Transformed(log_p[:0], None, 0)
    return Transformed(share_below(of_samples, log_p), weights, max(1, round(n * m / (n + m))))


class Group(NamedTuple):
    """Rows with similar contexts.

    Attributes:
        column, low, high, category: see `ContextBin`.
        rows: whether each row belongs to the group, (n,) bool.
    """

    column: str
    low: float | None
    high: float | None
    category: str | None
    rows: Tensor


def context_groups(columns: Sequence[ContextColumn], values: Tensor, weights: Tensor | None = None) -> list[Group]:
    """Divides rows by the values (n, k) of each context column.

    With weights (n,), quartiles and frequencies are weighted by their absolute values.

    A real column is divided at its quartiles, or by its values if there are at most BINS. A categorical column gives a
    group for each of its MOST_CATEGORIES most frequent categories. Groups of fewer than FEWEST rows are left
    out.
    """
    found = []
    w = torch.ones(len(values), dtype=torch.float64) if weights is None else weights.double().abs()
    for column, c in zip(columns, values.T.contiguous(), strict=True):
        if column.kind == CATEGORICAL:
            codes, number = torch.unique(c, return_inverse=True)
            counts = w.new_zeros(len(codes)).index_add(0, number, w)
            frequent = codes[counts.argsort(descending=True, stable=True)][:MOST_CATEGORIES]
            found += [Group(column.name, None, None, column.text(y), c == y) for y in frequent.sort().values.tolist()]
            continue
        different = torch.unique(c)
        bins = min(BINS, max(1, len(c) // FEWEST))
        # the lower ends of the bins
        starts = different
        if len(different) > BINS:
            ordered, order = c.sort()
            below = w[order].cumsum(0)
            starts = torch.unique(ordered[[int((below <= below[-1] * i / bins).sum()) for i in range(bins)]])
        number = torch.searchsorted(starts, c, right=True) - 1
        for i in range(len(starts)):
            rows = number == i
            if rows.any():
                found.append(Group(column.name, float(c[rows].min()), float(c[rows].max()), None, rows))
    return [group for group in found if int(group.rows.sum()) >= FEWEST]


def calibration_by_context(
    groups: Sequence[Group],
    log_p: Tensor,
    transforms_of: Callable[[Tensor], Transformed],
    weights: Tensor | None = None,
) -> tuple[tuple[ContextBin, ...], tuple[tuple[str, Tensor], ...]]:
    """Computes the NLL and the test of the calibration for each group of rows.

    Args:
        log_p: log p of all rows, (n,).
        transforms_of: returns the transforms (m, t) of the rows of a mask (n,).
        weights: the weights of all rows, (n,), or None.

    Returns:
        (bins, for each bin the name of a transform and its values (m,)). The bins of a column have the same transform.
        It has the largest deviation in one of these bins, relative to the deviation of uniform draws.
    """
    made = [(group, transforms_of(group.rows)) for group in groups]
    made = [(group, tested) for group, tested in made if tested.size]
    distances = [ks_distance(tested.u, tested.weights) for _, tested in made]
    chosen: dict[str, int] = {}
    for column in {group.column for group, _ in made}:
        deviations = [
            d * math.sqrt(tested.size)
            for (group, tested), d in zip(made, distances, strict=True)
            if group.column == column
        ]
        chosen[column] = int(torch.stack(deviations).amax(0).argmax())
    bins, shown = [], []
    for (group, (u, of_rows, size)), distance in zip(made, distances, strict=True):
        names = names_of_transforms(u) if u.shape[1] > 1 else [DENSITY]
        worst = int(distance.argmax())
        p_value = min(1.0, len(made) * u.shape[1] * ks_p_value(float(distance[worst]), size))
        here, of_here = log_p[group.rows], None if weights is None else weights[group.rows]
        nll, error = -float(average(here, of_here)), stderr(here, of_here)
        found = ContextBin(*group[:4], len(here), nll, error, float(distance[worst]), names[worst], p_value)
        bins.append(found)
        shown.append((names[chosen[group.column]], _for_figure(u[:, chosen[group.column]], of_rows)))
    return tuple(bins), tuple(shown)


def warn_if_miscalibrated(bins: Sequence[ContextBin]) -> None:
    """Warns of the bin with the largest distance among the bins that pass both limits, CLEAR_P and CLEAR_KS."""
    bad = [one for one in bins if one.p_value < CLEAR_P and one.ks > CLEAR_KS]
    if not bad:
        return
    worst = max(bad, key=lambda one: one.ks)
    what = f"{worst.column} = {worst.category}" if worst.low is None else f"{worst.column} from {worst.words}"
    more = f", and {counted(len(bad) - 1, 'other range')} of the context" if len(bad) > 1 else ""
    log.warning(
        "calibration by context: the %s with %s%s are not draws from p(x | context): KS %.2g (%s), p %s. The flow does "
        "not fit the data at these contexts",
        counted(worst.n, "row"),
        what,
        more,
        worst.ks,
        worst.worst,
        p_words(worst.p_value),
    )


def _for_figure(u: Tensor, weights: Tensor | None) -> Tensor:
    """Returns transforms for a figure: u (n,), or values of equal weight, as many as effective rows.

    The bands of a figure depend on this number.
    """
    return u if weights is None else equal_rows(u, weights, max(1, round(effective_rows(weights))))


def ks_distance(u: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the Kolmogorov-Smirnov distance sup |F_n(u) - u| of each column of u (n, k) from U[0, 1], (k,).

    Args:
        weights: weights (n,) with which F_n is weighted, or None.
    """
    n = len(u)
    if weights is not None:
        ordered, order = u.sort(0)
        w = weights.to(u)[order]
        after = w.cumsum(0) / w.sum(0)
        return torch.maximum((after - ordered).abs(), (ordered - after + w / w.sum(0)).abs()).amax(0)
    ordered = u.sort(0).values
    rank = torch.arange(n, dtype=u.dtype, device=u.device).unsqueeze(1)
    return torch.maximum((rank + 1) / n - ordered, ordered - rank / n).amax(0)


def ks_p_value(distance: float, n: float) -> float:
    """Returns P(D >= distance) for n (effective) uniform draws.

    This is Kolmogorov's limit with the correction of Stephens (1970).
    """
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.2:
        return 1.0
    total = 2 * sum((1 if k % 2 else -1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, total))
