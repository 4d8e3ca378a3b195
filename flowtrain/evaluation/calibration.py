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
from flowtrain.evaluation.error_budget import stderr
from flowtrain.evaluation.ood_detection import share_below
from flowtrain.evaluation.result import Calibration, ContextBin, p_words
from flowtrain.utils.formatting import counted

log = logging.getLogger("flowtrain")

# Number of dimensions in the figure: those that deviate most
SHOWN = 8
RADIUS, DENSITY = "radius", "density"
# Calibration by context: number of bins of a real column, largest number of categories, and smallest number of rows
BINS, MOST_CATEGORIES, FEWEST = 4, 6, 20
# A bin is clearly miscalibrated if its p-value is below, and its distance above these values
CLEAR_P, CLEAR_KS = 1e-3, 0.1


@torch.no_grad()
def calibration(z: Tensor, base: Base, context: Tensor | None = None) -> tuple[Calibration, dict[str, Tensor]]:
    """Tests whether latents z (n, *event) of the data are draws from the base.

    Each of the `transforms` is tested separately. Latents with NaN are left out. If all rows have NaN, the statistic is
    NaN.

    Args:
        z: the latents.
        base: the base of the flow.
        context: the labels or features of the rows, see `Base.given`.

    Returns:
        (result of the test, transforms for the figure by name, (n,) each).
    """
    kept = ~z.isnan().flatten(1).any(1)
    z = z[kept]
    n = len(z)
    if n == 0:
        return Calibration(0, math.nan, RADIUS, math.nan, math.nan), {RADIUS: z.double().new_empty(0)}
    u = transforms(z, base, None if context is None else context[kept.to(context.device)])
    distances, names = ks_distance(u), names_of_transforms(u)
    worst = int(distances.argmax())
    largest = float(distances[worst])
    found = Calibration(
        n=n,
        statistic=largest,
        worst=names[worst],
        p_value=min(1.0, u.shape[1] * ks_p_value(largest, n)),
        radius=float(distances[-1]),
    )
    shown = sorted(distances[:-1].argsort(descending=True)[:SHOWN].tolist())
    return found, {names[j]: u[:, j] for j in (*shown, u.shape[1] - 1)}


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


def density_calibration(log_p: Tensor, of_samples: Tensor) -> tuple[Calibration, dict[str, Tensor]]:
    """Tests whether data are draws from an ensemble, by `density_ranks`. An ensemble has no latents.

    The test does not detect how rows are distributed within a level set of the density. The p-value comes from a
    two-sample test.

    Args:
        log_p: log p of the data, (n,). Rows with NaN are left out.
        of_samples: log p of samples of the ensemble with the context of the data, (m,), m >= n.

    Returns:
        (result of the test, transforms for the figure by name).
    """
    u, size = density_ranks(log_p, of_samples)
    if not size:
        return Calibration(0, math.nan, DENSITY, math.nan, None), {DENSITY: log_p.new_empty(0)}
    distance = float(ks_distance(u.unsqueeze(1)))
    return Calibration(len(u), distance, DENSITY, ks_p_value(distance, size), None), {DENSITY: u}


def density_ranks(log_p: Tensor, of_samples: Tensor) -> tuple[Tensor, int]:
    """Returns the ranks u (n,) of log p (n,) among log p of samples (m,), and the size of a one-sample test of u.

    u_i is the fraction of samples whose log p is below log p of row i. Ties count half. u_i is 1 minus the probability
    of the smallest highest-density region that contains the row (Hyndman 1996, Computing and graphing highest density
    regions). u_i is uniform if the data are draws from the model. Rows and samples with NaN are left out. With the
    size n m / (n + m), the one-sample test has the p-value of a two-sample test. The size is 0 without rows or samples.
    """
    log_p, of_samples = log_p[~log_p.isnan()], of_samples[~of_samples.isnan()]
    n, m = len(log_p), len(of_samples)
    if not n or not m:
        return log_p[:0], 0
    return share_below(of_samples, log_p), max(1, round(n * m / (n + m)))


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


def context_groups(columns: Sequence[ContextColumn], values: Tensor) -> list[Group]:
    """Divides rows by the values (n, k) of each context column.

    A real column is divided at its quartiles, or by its values if there are at most BINS. A categorical column gives a
    group for each of its MOST_CATEGORIES most frequent categories. Groups of less than FEWEST rows are left out.
    """
    found = []
    for column, c in zip(columns, values.T.contiguous(), strict=True):
        if column.kind == CATEGORICAL:
            codes, counts = torch.unique(c, return_counts=True)
            frequent = codes[counts.argsort(descending=True, stable=True)][:MOST_CATEGORIES]
            found += [Group(column.name, None, None, column.text(y), c == y) for y in frequent.sort().values.tolist()]
            continue
        different = torch.unique(c)
        bins = min(BINS, max(1, len(c) // FEWEST))
        # the lower ends of the bins
        starts = different
        if len(different) > BINS:
            starts = torch.unique(c.sort().values[[len(c) * i // bins for i in range(bins)]])
        number = torch.searchsorted(starts, c, right=True) - 1
        for i in range(len(starts)):
            rows = number == i
            if rows.any():
                found.append(Group(column.name, float(c[rows].min()), float(c[rows].max()), None, rows))
    return [group for group in found if int(group.rows.sum()) >= FEWEST]


def calibration_by_context(
    groups: Sequence[Group], log_p: Tensor, transforms_of: Callable[[Tensor], tuple[Tensor, int]]
) -> tuple[tuple[ContextBin, ...], tuple[tuple[str, Tensor], ...]]:
    """Computes the NLL and the test of the calibration for each group of rows.

    Args:
        log_p: log p of all rows, (n,).
        transforms_of: returns the transforms (m, t) of the rows of a mask (n,), and the size of a test of them.

    Returns:
        (bins, for each bin the name of a transform and its values (m,)). The transform is that with the largest
        deviation in a bin of the column, relative to the deviation of uniform draws.
    """
    made = [(group, *transforms_of(group.rows)) for group in groups]
    made = [(group, u, size) for group, u, size in made if size]
    distances = [ks_distance(u) for _, u, _ in made]
    chosen: dict[str, int] = {}
    for column in {group.column for group, *_ in made}:
        own = [
            d * math.sqrt(size) for (group, _, size), d in zip(made, distances, strict=True) if group.column == column
        ]
        chosen[column] = int(torch.stack(own).amax(0).argmax())
    bins, shown = [], []
    for (group, u, size), distance in zip(made, distances, strict=True):
        names = names_of_transforms(u) if u.shape[1] > 1 else [DENSITY]
        worst = int(distance.argmax())
        p_value = min(1.0, len(made) * u.shape[1] * ks_p_value(float(distance[worst]), size))
        here = log_p[group.rows]
        nll = -float(here.mean())
        found = ContextBin(*group[:4], len(here), nll, stderr(here), float(distance[worst]), names[worst], p_value)
        bins.append(found)
        shown.append((names[chosen[group.column]], u[:, chosen[group.column]]))
    return tuple(bins), tuple(shown)


def warn_if_miscalibrated(bins: Sequence[ContextBin]) -> None:
    """Warns of the bin with the clearest deviation, if its p-value and its size leave no doubt."""
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


def ks_distance(u: Tensor) -> Tensor:
    """Returns the Kolmogorov-Smirnov distance sup |F_n(u) - u| of each column of u (n, k) from U[0, 1], (k,)."""
    n = len(u)
    ordered = u.sort(0).values
    rank = torch.arange(n, dtype=u.dtype, device=u.device).unsqueeze(1)
    return torch.maximum((rank + 1) / n - ordered, ordered - rank / n).amax(0)


def ks_p_value(distance: float, n: int) -> float:
    """Returns P(D >= distance) for n uniform draws, by Kolmogorov's limit with the correction of Stephens (1970)."""
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.2:
        return 1.0
    total = 2 * sum((1 if k % 2 else -1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, total))
