"""Quadrature rules for path integrals: nodes, weights and an estimate of the error.

There are two rules:

- `stage_nodes`: the stage points with the weights of the method. An augmented solve with these steps has the same
  result.
- `gauss_nodes`: Gauss-Legendre nodes on the dense output. A panel is a group of a few steps that share one high-order
  rule.

The Gauss rule needs fewer nodes and is more accurate, because the stage points of a Runge-Kutta step are much less
accurate than the end of the step (tests/ode/test_discrete_adjoint.py compares the rules on the same steps).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import on_device, weighted_sum

# the largest number of steps in a panel, and the largest ratio of the lengths of neighbouring steps in a panel. A rule
# over a long and a short step would have no nodes in the short step, where the field is rough
PANEL = 5
CONTRAST = 3.0


@dataclass(frozen=True)
class Nodes:
    """The nodes and weights of a quadrature rule along a solution.

    A node t_i lies in a step from x with slopes k_j, where x(t_i) = x + h sum_j rows_ij k_j. The integral of q is
    sum_i w_i q_i.

    Attributes:
        times, weights: t_i and w_i of each node, in the order of the steps.
        rows: for each step, (nodes of the step, stages).
        tails: for each panel, the linear functionals of q that measure its error, (functionals, nodes of the panel).
        spectral: whether the tails are Legendre coefficients. The error is then proportional to their square.
        last_used: for each step, whether a node depends on the last slope.
    """

    times: list[float]
    weights: list[float]
    rows: list[np.ndarray]
    tails: list[np.ndarray]
    spectral: bool
    last_used: list[bool]

    def integrate(self, q: Tensor) -> Tensor:
        """Returns the integrals (B, Q) of q (nodes, B, Q)."""
        return weighted_sum(on_device(self.weights, q), q)

    def error(self, q: Tensor) -> Tensor:
        """Estimates the error of the quadrature, (B, Q), at least 0. The error of the points x(t_i) is not included.

        For the stage rule the estimate is sum_steps |h sum_i e_i q_i|. The error of a Gauss rule with n nodes is about
        the Legendre coefficient of degree 2n. If the coefficients a_k decay geometrically, this coefficient is
        (a_(n-2)^2 + a_(n-1)^2) / |q|, with |q| the RMS over the panel. Other coefficients may decay differently, so
        the estimate is not a bound.
        """
        total = torch.zeros_like(q[0])
        first = 0
        for tail in self.tails:
            part = q[first : first + tail.shape[1]]
            first += tail.shape[1]
            size = weighted_sum(on_device(tail, q), part).square().sum(0)
            if self.spectral:
                total += size / part.square().mean(0).sqrt().clamp_min(torch.finfo(q.dtype).tiny)
            else:
                total += size.sqrt()
        return total


def has_dense_output(tableau: Tableau) -> bool:
    """Whether the stages of a step give x(t) inside the step, with the order of the error estimate.

    Example:
        >>> from flowtrain.ode.tableaus import TABLEAUS
        >>> has_dense_output(TABLEAUS["dopri5"]), has_dense_output(TABLEAUS["rk4"])
        (True, False)
    """
    return tableau.first_same_as_last and (tableau.mid is not None or tableau.order <= 3)


def stage_nodes(tableau: Tableau, steps: Sequence[tuple[float, float]]) -> Nodes:
    """Returns the stage points of steps (t, h) with the weights b of the method."""
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
        last_used=[bool(rows[:, -1].any())] * len(steps),
    )


def gauss_nodes(tableau: Tableau, steps: Sequence[tuple[float, float]], noisy: bool = False) -> Nodes:
    """Returns Gauss-Legendre nodes on the dense output of steps (t, h): k ceil((p + 2) / 2) for k steps of order p.

    Args:
        tableau: the method.
        steps: (t, h) of each step.
        noisy: whether the integrand is a random estimate. Then k ceil(p / 2) nodes are used, because the noise is far
            larger than the error of the rule.
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
        # a node belongs to the last step that begins before the node
        starts = np.array([(steps[k][0] - begin) / length for k in group])
        owner = np.searchsorted(starts, x, side="right") - 1
        for j, k in enumerate(group):
            t, h = steps[k]
            mine = here[owner == j]
            rows.append(dense_rows(tableau, (mine - t) / h))
    return Nodes(times, weights, rows, tails, spectral=True, last_used=[bool(each[:, -1].any()) for each in rows])


def panels(lengths: Sequence[float]) -> list[range]:
    """Groups the steps into panels of at most PANEL neighbours of similar length. Returns the indices of each panel."""
    # without NumPy, whose operations torch.compile would trace
    h = [abs(length) for length in lengths]
    starts = [0, *(k for k in range(1, len(h)) if max(h[k - 1 : k + 1]) / min(h[k - 1 : k + 1]) > CONTRAST)]
    found = []
    for first, end in zip(starts, [*starts[1:], len(h)], strict=True):
        count = math.ceil((end - first) / PANEL)
        size, larger = divmod(end - first, count)
        for i in range(count):
            begin = first + i * size + min(i, larger)
            found.append(range(begin, begin + size + (i < larger)))
    return found


@cache
def legendre(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the Gauss-Legendre rule on [0, 1]: n nodes, n weights and two functionals (2, n).

    The functionals give the Legendre coefficients of degree n - 2 and n - 1 from values at the nodes.
    """
    x, w = np.polynomial.legendre.leggauss(n)
    degrees = np.arange(max(0, n - 2), n)
    values = np.polynomial.legendre.legvander(x, n - 1)[:, degrees]
    return (x + 1) / 2, w / 2, ((2 * degrees + 1) / 2 * values * w[:, None]).T


def dense_rows(tableau: Tableau, theta: np.ndarray) -> np.ndarray:
    """Returns the weights (len(theta), stages) of x(t + theta h) = x + h sum_j rows_j k_j.

    The interpolant has the value and the slope of the solution at both ends of the step. It is a cubic, or with `mid` a
    quartic (Shampine 1986).
    """
    coefficients = dense_coefficients(tableau)
    rows: np.ndarray = np.vander(theta, len(coefficients), increasing=True) @ coefficients
    return rows


@cache
def dense_coefficients(tableau: Tableau) -> np.ndarray:
    """Returns the coefficients of the interpolant of `dense_rows` in powers of theta, (degree + 1, stages)."""
    # conditions on the coefficients of 1, theta, ..: value and slope at 0, value and slope at 1, value at 1/2
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
