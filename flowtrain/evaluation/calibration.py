"""Are the data draws from the model? Probability integral transforms and Kolmogorov-Smirnov's test."""

import copy
import math

import torch
from torch import Tensor

from flowtrain.bases import Base
from flowtrain.evaluation.ood_detection import share_below
from flowtrain.evaluation.result import Calibration

# dimensions whose transforms are kept for the figure, those that deviate most
SHOWN = 8
RADIUS, DENSITY = "radius", "density"


@torch.no_grad()
def calibration(z: Tensor, base: Base) -> tuple[Calibration, dict[str, Tensor]]:
    """The test of latents z (n, *event), and the transforms that a figure shows, name -> (n,).

    The transforms u_j of the base (Phi(z_j) of a standard normal one) and u = F(|y|^2), with y = Phi^-1(u) (y = z of a
    standard normal base) and F the chi-square distribution of d degrees, are uniform where the model is the truth
    (Rosenblatt 1952, Diebold et al. 1998). Tested one by one: dependence between dimensions shows in the radius.
    Latents that are NaN are left out. If all are NaN, the statistic is NaN.
    """
    z = z.double()
    z = z[~z.isnan().flatten(1).any(1)]
    n, d = z.flatten(1).shape
    if n == 0:
        return Calibration(0, math.nan, RADIUS, math.nan, math.nan), {RADIUS: z.new_empty(0)}
    base = copy.deepcopy(base).to(z)
    u = base.to_uniform(z)
    radius = torch.special.gammainc(torch.tensor(d / 2, dtype=z.dtype), base.to_normal(z).square().sum(1) / 2)
    distances = torch.cat([ks_distance(u), ks_distance(radius.unsqueeze(1))])
    worst = int(distances.argmax())
    largest = float(distances[worst])
    found = Calibration(
        n=n,
        statistic=largest,
        worst=RADIUS if worst == d else f"z{worst + 1}",
        p_value=min(1.0, (d + 1) * ks_p_value(largest, n)),
        radius=float(distances[-1]),
    )
    shown = sorted(distances[:-1].argsort(descending=True)[:SHOWN].tolist())
    return found, {**{f"z{j + 1}": u[:, j] for j in shown}, RADIUS: radius}


def density_calibration(log_p: Tensor, of_samples: Tensor) -> tuple[Calibration, dict[str, Tensor]]:
    """The test of an ensemble, which has no latents: the rank of log p of the data among log p of its own samples.

    u_i is the share of samples with a log p below that of row i, ties counted half: 1 minus the probability of the
    smallest highest-density region that holds the row (Hyndman 1996, Computing and graphing highest density regions).
    It is uniform if the model is the truth. Like "radius", it does not see where the rows lie inside of a level set.
    The p-value is that of two samples.

    Args:
        log_p: of data, (n,). Rows with NaN are left out.
        of_samples: of as many samples or more, with the labels of the data, (m,).
    """
    log_p, of_samples = log_p[~log_p.isnan()], of_samples[~of_samples.isnan()]
    n, m = len(log_p), len(of_samples)
    if not n or not m:
        return Calibration(0, math.nan, DENSITY, math.nan, None), {DENSITY: log_p.new_empty(0)}
    u = share_below(of_samples, log_p)
    distance = float(ks_distance(u.unsqueeze(1)))
    p_value = ks_p_value(distance, max(1, round(n * m / (n + m))))
    return Calibration(n, distance, DENSITY, p_value, None), {DENSITY: u}


def ks_distance(u: Tensor) -> Tensor:
    """sup |F_n(u) - u| of each column of u (n, k), (k,)."""
    n = len(u)
    ordered = u.sort(0).values
    rank = torch.arange(n, dtype=u.dtype, device=u.device).unsqueeze(1)
    return torch.maximum((rank + 1) / n - ordered, ordered - rank / n).amax(0)


def ks_p_value(distance: float, n: int) -> float:
    """P(D >= distance) of n uniform draws: Kolmogorov's limit, with Stephens' (1970) correction for finite n."""
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.2:
        return 1.0
    total = 2 * sum((1 if k % 2 else -1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, total))
