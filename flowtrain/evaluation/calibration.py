"""Calibration: a Kolmogorov-Smirnov test of probability integral transforms of the data."""

import copy
import math

import torch
from torch import Tensor

from flowtrain.bases import Base
from flowtrain.evaluation.ood_detection import share_below
from flowtrain.evaluation.result import Calibration
from flowtrain.utils.weighting import effective_rows, equal_rows

# Number of dimensions in the figure: those that deviate most
SHOWN = 8
RADIUS, DENSITY = "radius", "density"


@torch.no_grad()
def calibration(
    z: Tensor, base: Base, context: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Calibration, dict[str, Tensor]]:
    """Tests whether latents z (n, *event) of the data are draws from the base.

    If the data are draws from the model, d + 1 probability integral transforms are uniform on [0, 1] (Rosenblatt 1952,
    Diebold et al. 1998):

    - u_j of each dimension j of the base, which is Phi(z_j) for a standard normal base;
    - F(|y|^2), where y_j = Phi^-1(u_j) and F is the chi-square distribution function with d degrees of freedom.

    Each transform is tested separately. The radius |y| also shows dependence between dimensions. Latents with NaN are
    left out. If all rows have NaN, the statistic is NaN.

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
    z = z.double()
    kept = ~z.isnan().flatten(1).any(1)
    if weights is not None:
        kept &= weights != 0
        weights = weights[kept]
    z = z[kept]
    n, d = z.flatten(1).shape
    if n == 0:
        return Calibration(0, math.nan, RADIUS, math.nan, math.nan), {RADIUS: z.new_empty(0)}
    base = copy.deepcopy(base).to(z).given(None if context is None else context.to(z.device)[kept])
    u = base.to_uniform(z)
    radius = torch.special.gammainc(torch.tensor(d / 2, dtype=z.dtype), base.to_normal(z).square().sum(1) / 2)
    distances = torch.cat([ks_distance(u, weights), ks_distance(radius.unsqueeze(1), weights)])
    worst = int(distances.argmax())
    largest = float(distances[worst])
    found = Calibration(
        n=n,
        statistic=largest,
        worst=RADIUS if worst == d else f"z{worst + 1}",
        p_value=min(1.0, (d + 1) * ks_p_value(largest, n if weights is None else effective_rows(weights))),
        radius=float(distances[-1]),
    )
    shown = sorted(distances[:-1].argsort(descending=True)[:SHOWN].tolist())
    transforms = {**{f"z{j + 1}": u[:, j] for j in shown}, RADIUS: radius}
    return found, {name: _for_figure(one, weights) for name, one in transforms.items()}


def density_calibration(
    log_p: Tensor, of_samples: Tensor, weights: Tensor | None = None
) -> tuple[Calibration, dict[str, Tensor]]:
    """Tests whether data are draws from an ensemble, by the ranks of log p among samples. An ensemble has no latents.

    u_i is the fraction of samples whose log p is below log p of row i. Ties count half. u_i is 1 minus the probability
    of the smallest highest-density region that contains the row (Hyndman 1996, Computing and graphing highest density
    regions). u_i is uniform if the data are draws from the model. The test does not detect how rows are distributed
    within a level set of the density. The p-value comes from a two-sample test.

    Args:
        log_p: log p of the data, (n,). Rows with NaN are left out.
        of_samples: log p of samples of the ensemble with the labels of the data, (m,), m >= n.
        weights: the weights of the data, (n,), or None.

    Returns:
        (result of the test, transforms for the figure by name).
    """
    kept = ~log_p.isnan()
    if weights is not None:
        kept &= weights != 0
        weights = weights[kept]
    log_p, of_samples = log_p[kept], of_samples[~of_samples.isnan()]
    n, m = len(log_p), len(of_samples)
    if not n or not m:
        return Calibration(0, math.nan, DENSITY, math.nan, None), {DENSITY: log_p.new_empty(0)}
    u = share_below(of_samples, log_p)
    distance = float(ks_distance(u.unsqueeze(1), weights))
    rows = n if weights is None else effective_rows(weights)
    p_value = ks_p_value(distance, max(1, round(rows * m / (rows + m))))
    return Calibration(n, distance, DENSITY, p_value, None), {DENSITY: _for_figure(u, weights)}


def _for_figure(u: Tensor, weights: Tensor | None) -> Tensor:
    """Returns transforms u (n,) with equal weights, as many as effective rows, so that the bands of a figure apply."""
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
