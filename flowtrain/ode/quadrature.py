"""Where the path integrals are evaluated, with which weights, and how large their error is.

Two rules. The stage points with the weights of the method: the augmented solve, on the same steps. Or Gauss-Legendre
nodes on the dense output: a few steps make a panel, smooth enough for one high-order rule. They are fewer and more
exact, because the stages of a Runge-Kutta step lie off the solution by far more than its end does
(tests/ode/test_discrete_adjoint.py compares the two on the same steps).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import combined, on_device

# steps that may share one Gauss rule, and how much a step may differ from the next of them: a rule over a long step
# and a short one would leave the short one, where the field is rough, without nodes
PANEL = 5
CONTRAST = 3.0


@dataclass(frozen=True)
class Nodes:
    """x(t_i) = x + h sum_j rows_ij k_j on the step the node lies in; an integral of q is sum_i w_i q_i.

    Attributes:
        times, weights: one for each node, in the order of the steps.
        rows: for each step (nodes in it, stages).
        tails: for each panel (functionals, nodes in it), the linear functionals of q that measure its error.
        spectral: whether the tails are Legendre coefficients, whose square the error follows.
    """

    times: list[float]
    weights: list[float]
    rows: list[np.ndarray]
    tails: list[np.ndarray]
    spectral: bool

    def integrate(self, q: Tensor) -> Tensor:
        """(B, Q) from q (nodes, B, Q)."""
        return combined(on_device(self.weights, q), q)

    def error(self, q: Tensor) -> Tensor:
        """An estimate of the quadrature's error, (B, Q), not negative; that of the points it stands on is not in it.

        The stage rule takes sum_steps |h sum_i e_i q_i|. A Gauss rule of n nodes errs by about the Legendre coefficient
        of degree 2n, which coefficients that decay geometrically put at (a_(n-2)^2 + a_(n-1)^2) / |q|, |q| the RMS
        over the panel. An estimate and not a bound: coefficients may decay otherwise.
        """
        total = torch.zeros_like(q[0])
        first = 0
        for tail in self.tails:
            part = q[first : first + tail.shape[1]]
            first += tail.shape[1]
            size = combined(on_device(tail, q), part).square().sum(0)
            if self.spectral:
                total += size / part.square().mean(0).sqrt().clamp_min(torch.finfo(q.dtype).tiny)
            else:
                total += size.sqrt()
        return total


def has_dense_output(tableau: Tableau) -> bool:
    """Whether x(t) inside a step follows from its stages, to the order that its error estimate has.

    Example:
        >>> from flowtrain.ode.tableaus import TABLEAUS
        >>> has_dense_output(TABLEAUS["dopri5"]), has_dense_output(TABLEAUS["rk4"])
        (True, False)
    """
    return tableau.first_same_as_last and (tableau.mid is not None or tableau.order <= 3)


def stage_nodes(tableau: Tableau, steps: Sequence[tuple[float, float]]) -> Nodes:
    """The stage points of steps (t, h), with the weights b."""
    b, e = tableau.b, tableau.e
    used = tableau.used
    rows = np.zeros((len(used), len(b)))
    for k, i in enumerate(used):
        if i:
            rows[k, :i] = tableau.a[i - 1]
    return Nodes(
        times=[t + tableau.c[i] * h for t, h in steps for i in used],
        weights=[h * b[i] for _, h in steps for i in used],
        rows=[rows] * len(steps),
        tails=[np.array([[h * (0.0 if e is None else e[i]) for i in used]]) for _, h in steps],
        spectral=False,
    )


def gauss_nodes(tableau: Tableau, steps: Sequence[tuple[float, float]], noisy: bool = False) -> Nodes:
    """Gauss-Legendre nodes on the dense output of steps (t, h): for k steps of order p, k ceil((p + 2) / 2) of them.

    Args:
        noisy: whether the integrand is itself a random estimate, whose noise is far above the error of k ceil(p / 2).
    """
    per_step = math.ceil((tableau.order + (0 if noisy else 2)) / 2)
    times: list[float] = []
    weights: list[float] = []
    tails = []
    rows: list[np.ndarray] = []
    for group in panels([h for _, h in steps]):
        begin = steps[group[0]][0]
        length = sum(steps[k][1] for k in group)
        x, w, tail = legendre(len(group) * per_step)
        here = begin + length * x
        times += here.tolist()
        weights += (length * w).tolist()
        tails.append(math.sqrt(abs(length)) * tail)
        # a node belongs to the last step that begins before it
        starts = np.array([(steps[k][0] - begin) / length for k in group])
        owner = np.searchsorted(starts, x, side="right") - 1
        for j, k in enumerate(group):
            t, h = steps[k]
            mine = here[owner == j]
            rows.append(dense_rows(tableau, (mine - t) / h))
    return Nodes(times, weights, rows, tails, spectral=True)


def panels(lengths: Sequence[float]) -> list[np.ndarray]:
    """The steps, by index, in runs of similar neighbours, each run cut evenly into panels."""
    h = np.abs(lengths)
    contrast = np.maximum(h[1:], h[:-1]) / np.minimum(h[1:], h[:-1])
    runs = np.split(np.arange(len(h)), np.flatnonzero(contrast > CONTRAST) + 1)
    return [panel for run in runs for panel in np.array_split(run, math.ceil(len(run) / PANEL))]


@cache
def legendre(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss-Legendre on [0, 1]: n nodes, weights, and the functionals (2, n) of the two highest coefficients."""
    x, w = np.polynomial.legendre.leggauss(n)
    degrees = np.arange(max(0, n - 2), n)
    values = np.polynomial.legendre.legvander(x, n - 1)[:, degrees]
    return (x + 1) / 2, w / 2, ((2 * degrees + 1) / 2 * values * w[:, None]).T


def dense_rows(tableau: Tableau, theta: np.ndarray) -> np.ndarray:
    """Weights (len(theta), stages) of x(t + theta h) = x + h sum_j rows_j k_j.

    The polynomial that has the value and the slope at both ends: a cubic, or with `mid` a quartic (Shampine 1986).
    """
    coefficients = dense_coefficients(tableau)
    rows: np.ndarray = np.vander(theta, len(coefficients), increasing=True) @ coefficients
    return rows


@cache
def dense_coefficients(tableau: Tableau) -> np.ndarray:
    """The polynomial of `dense_rows` in powers of theta, (degree + 1, stages)."""
    # rows: conditions on the coefficients of 1, theta, ..: value and slope at 0 and 1, value at 1/2
    conditions = np.array(
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 2, 3, 4], [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]]
    )
    unit = np.eye(len(tableau.b))
    targets = [np.zeros(len(tableau.b)), unit[0], np.array(tableau.b), unit[-1]]
    if tableau.mid is None:
        conditions = conditions[:4, :4]
    else:
        targets.append(np.array(tableau.mid))
    coefficients: np.ndarray = np.linalg.solve(conditions, np.stack(targets))
    return coefficients
