"""The adaptive solvers on the 25 problems of DETEST: their error at the final time against a reference, and their NFE.

Hull, Enright, Fellen and Sedgwick 1972 (Comparing numerical methods for ordinary differential equations) define the
problems, each on t from 0 to 20: single equations (A), small systems (B), moderate systems (C), Kepler orbits (D) and
equations of second order (E).

References: 21 problems have a closed form. The other four (B1, C5, E2, E3) have stored end points. These were computed
with 34 digits in mpmath by the extrapolated midpoint rule (Gragg, Bulirsch and Stoer): order 20 on 20 to 160 steps and
order 22 on 30 to 240 steps agree to 1e-20. SciPy's DOP853 at rtol=1e-13 agrees to 2e-12. The end points published by
Enright and Pryce 1987 (Two FORTRAN packages for assessing initial value methods) agree to 1e-13 for 24 problems. A1 was
not compared, and of the 51 components of C4 only six were. The first test solves all 25 problems again with DOP853.

Bounds: `ERRORS`, `NFE` and `BACKWARD` are measured values. A solver may exceed them by the factors in the tests,
because other CPUs round differently. After a deliberate change to the solvers, `python tests/ode/test_detest.py` prints
new tables.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from scipy import special
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor

from flowtrain.ode import Problem, ode_solver

END = 20.0
METHODS = ("bosh3", "dopri5", "tsit5", "dopri8")
# bosh3 has order 3: a tolerance of 1e-9 would need ten times as many evaluations as 1e-6, about 280,000 in total
SOLVES = [(method, tol) for method in METHODS for tol in (1e-3, 1e-6, 1e-9) if (method, tol) != ("bosh3", 1e-9)]
IDS = [f"{method}-{tol:.0e}" for method, tol in SOLVES]


Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Detest:
    """dx/dt = field(t, x) for x (B, d), from x(0) = start (d,) to t = 20.

    Attributes:
            solution: x(t), or x(20) if there is no closed form, (d,).
    """

    field: Callable[[Tensor, Tensor], Tensor]
    start: Sequence[float]
    solution: Callable[[float], Values] | Values

    @property
    def end(self) -> np.ndarray:
        """x(20), (d,)."""
        return np.array(self.solution(END) if callable(self.solution) else self.solution)


def system(slopes: Callable[..., list[Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the field whose components are slopes(t, x_1, ..., x_d)."""
    return lambda t, x: torch.stack(slopes(t, *x.unbind(1)), 1)


def linear(matrix: ArrayLike) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the field x -> matrix x."""
    transposed = torch.tensor(matrix, dtype=torch.float64).T
    return lambda t, x: x @ transposed


def a5(t: float) -> list[float]:
    """Returns a logarithmic spiral: (t, x) = r (cos s, sin s) with r = 4 exp(pi/2 - s)."""

    def r(s: float) -> float:
        return 4 * math.exp(math.pi / 2 - s)

    s = brentq(lambda s: r(s) * math.cos(s) - t, -math.pi / 4, 2.0, xtol=1e-15)
    return [r(s) * math.sin(s)]


def b2(t: float) -> Values:
    """Returns the solution from the eigenvectors, whose eigenvalues are 0, -1 and -3."""
    modes = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]])
    return modes.T @ [1, math.exp(-t) / 2, math.exp(-3 * t) / 2]


def b3(t: float) -> list[float]:
    """Solves a Riccati equation by x_2 = u'/u, where u'' = exp(-t) u is a Bessel equation in s = 2 exp(-t/2)."""
    s = 2 * math.exp(-t / 2)
    a, b = special.k1(2), special.i1(2)
    second = s / 2 * (b * special.k1(s) - a * special.i1(s)) / (a * special.i0(s) + b * special.k0(s))
    return [math.exp(-t), second, 1 - math.exp(-t) - second]


def torus(t: Tensor, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    r = torch.hypot(x, y)
    return [-y - x * z / r, x - y * z / r, x / r]


def b4(t: float) -> list[float]:
    """Returns a path on a torus: the polar angle of (x_1, x_2) is t, and their radius is 2 + cos t."""
    r = 2 + math.cos(t)
    return [r * math.cos(t), r * math.sin(t), math.sin(t)]


def b5(t: float) -> Values:
    """Solves Euler's equations of a rigid body with the Jacobi elliptic functions sn, cn and dn."""
    return np.array(special.ellipj(t, 0.51)[:3])


def chain(rates: Sequence[float]) -> np.ndarray:
    """Returns the matrix of a decay chain: each component decays into the next, and the last is stable."""
    return np.diag([*rates], -1) - np.diag([*rates, 0])


def c1(t: float) -> list[float]:
    """Returns C1 with equal rates: Poisson probabilities, and their tail in the last component."""
    p = [math.exp(-t) * t**k / math.factorial(k) for k in range(9)]
    return [*p, special.gammainc(9, t)]


def c2(t: float) -> list[float]:
    """Returns C2 with rates 1 to 9: geometric probabilities, and their tail in the last component."""
    q = -math.expm1(-t)
    return [*(math.exp(-t) * q**k for k in range(9)), q**9]


def second_difference(n: int) -> np.ndarray:
    return np.eye(n, k=-1) - 2 * np.eye(n) + np.eye(n, k=1)


def heat(n: int) -> Callable[[float], Values]:
    """Solves the heat equation on n points from a unit pulse at the first point, as a sum over sine modes."""
    i = np.arange(1, n + 1)
    modes = math.sqrt(2 / (n + 1)) * np.sin(np.outer(i, i) * math.pi / (n + 1))
    rates = 4 * np.sin(i * math.pi / (2 * n + 2)) ** 2
    return lambda t: modes @ (np.exp(-rates * t) * modes[0])


K2, SUN = 2.95912208286, 1.00000597682
PLANETS = [0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778]


def c5(t: Tensor, x: Tensor) -> Tensor:
    """The outer planets and Pluto relative to the sun: five positions, then five velocities."""
    r, v = x.view(-1, 2, 5, 3).unbind(1)
    m = x.new_tensor(PLANETS).unsqueeze(1)
    gaps = r.unsqueeze(1) - r.unsqueeze(2)
    # a planet does not attract itself: its distance of 0 to itself is divided by 1
    between = gaps / (gaps.square().sum(3, keepdim=True) + torch.eye(5).to(x).unsqueeze(2)) ** 1.5
    sun = r / r.square().sum(2, keepdim=True) ** 1.5
    pulls = (m * between).sum(2) - SUN * sun - (m * sun).sum(1, keepdim=True)
    return torch.stack([v, K2 * pulls], 1).flatten(1)


def gravity(t: Tensor, x: Tensor) -> Tensor:
    r, v = x[:, :2], x[:, 2:]
    return torch.cat([v, -r / r.square().sum(1, keepdim=True) ** 1.5], 1)


def orbit(eccentricity: float) -> Detest:
    """Returns the Kepler problem from perihelion with period 2 pi, solved with Kepler's equation u - e sin u = t."""
    e = eccentricity
    b = math.sqrt(1 - e * e)

    def solution(t: float) -> list[float]:
        u = brentq(lambda u: u - e * math.sin(u) - t, t - 1, t + 1, xtol=1e-15)
        rate = 1 / (1 - e * math.cos(u))
        return [math.cos(u) - e, b * math.sin(u), -rate * math.sin(u), rate * b * math.cos(u)]

    return Detest(gravity, [1 - e, 0, 0, math.sqrt((1 + e) / (1 - e))], solution)


def bessel(t: float) -> list[float]:
    """Returns J_1/2(t + 1) and its derivative."""
    s = t + 1
    j = math.sqrt(2 / (math.pi * s)) * math.sin(s)
    return [j, math.sqrt(2 / (math.pi * s)) * math.cos(s) - j / (2 * s)]


def falling(t: float) -> list[float]:
    """Solves x'' = 0.032 - 0.4 x'^2 from rest."""
    w = math.sqrt(0.08)
    return [30 + math.log(math.cosh(0.4 * w * t)) / 0.4, w * math.tanh(0.4 * w * t)]


def pursuit(t: float) -> list[float]:
    left = 1 - t / 25
    return [-25 / 2 * math.log(left) - t / 2 + t * t / 100, (1 / left - left) / 2]


PULSE = [1.0] + [0.0] * 9
C5_START = """
     3.42947415189  3.35386959711  1.35494901715     6.64145542550  5.97156957878  2.18231499728
    11.2630437207  14.6952576794   6.27960525067   -30.1552268759   1.65699966404  1.43785752721
   -21.1238353380  28.4465098142  15.3882659679
    -0.557160570446  0.505696783289  0.230578543901   -0.415570776342  0.365682722812  0.169143213293
    -0.325325669158  0.189706021964  0.0877265322780  -0.0240476254170 -0.287659532608 -0.117219543175
    -0.176860753121 -0.216393453025 -0.0148647893090
"""
C5_END = """
    -4.792730224323635  -2.420550725449022  -0.9212509306015119  -4.217310404035214   7.35620294749897
     3.2237859854212116  4.035559443262271  17.19865528670555     7.478910794233703 -29.987593263248442
    -4.107310937550929  -0.9277008321754409 -24.42125302518483   23.814590457465545  14.920963069513588
     0.3499208963063997 -0.5748487687912803 -0.25516940208791444 -0.5237040978903326 -0.24930004635796618
    -0.08045341642044465 -0.38752892373341097 0.05648603288767892 0.03023606472143343 0.041338565467124465
    -0.2862393029841379 -0.1183032405136207 -0.15119864573592057 -0.24600688943187657 -0.03189687411323877
"""

PROBLEMS = {
    "A1": Detest(lambda t, x: -x, [1.0], lambda t: [math.exp(-t)]),
    "A2": Detest(lambda t, x: -(x**3) / 2, [1.0], lambda t: [1 / math.sqrt(t + 1)]),
    "A3": Detest(lambda t, x: x * torch.cos(t), [1.0], lambda t: [math.exp(math.sin(t))]),
    "A4": Detest(lambda t, x: x / 4 * (1 - x / 20), [1.0], lambda t: [20 / (1 + 19 * math.exp(-t / 4))]),
    "A5": Detest(lambda t, x: (x - t) / (x + t), [4.0], a5),
    "B1": Detest(
        system(lambda t, x, y: [2 * (x - x * y), x * y - y]), [1.0, 3.0], [0.6761876008576606, 0.18608160996400297]
    ),
    "B2": Detest(linear([[-1, 1, 0], [1, -2, 1], [0, 1, -1]]), [2.0, 0.0, 1.0], b2),
    "B3": Detest(system(lambda t, x, y, z: [-x, x - y * y, y * y]), [1.0, 0.0, 0.0], b3),
    "B4": Detest(system(torus), [3.0, 0.0, 0.0], b4),
    "B5": Detest(system(lambda t, x, y, z: [y * z, -x * z, -0.51 * x * y]), [0.0, 1.0, 1.0], b5),
    "C1": Detest(linear(chain([1] * 9)), PULSE, c1),
    "C2": Detest(linear(chain(range(1, 10))), PULSE, c2),
    "C3": Detest(linear(second_difference(10)), PULSE, heat(10)),
    "C4": Detest(linear(second_difference(51)), PULSE + [0.0] * 41, heat(51)),
    "C5": Detest(c5, [float(x) for x in C5_START.split()], [float(x) for x in C5_END.split()]),
    **{f"D{k}": orbit(0.2 * k - 0.1) for k in range(1, 6)},
    "E1": Detest(system(lambda t, x, v: [v, -v / (t + 1) - (1 - 0.25 / (t + 1) ** 2) * x]), bessel(0), bessel),
    "E2": Detest(
        system(lambda t, x, v: [v, (1 - x * x) * v - x]), [2.0, 0.0], [2.0081497621749484, -0.04250887527320215]
    ),
    "E3": Detest(
        system(lambda t, x, v: [v, x**3 / 6 - x + 2 * torch.sin(2.78535 * t)]),
        [0.0, 0.0],
        [-0.10041788586472407, 0.24114001320959555],
    ),
    "E4": Detest(system(lambda t, x, v: [v, 0.032 - 0.4 * v * v]), [30.0, 0.0], falling),
    "E5": Detest(system(lambda t, x, v: [v, torch.sqrt(1 + v * v) / (25 - t)]), [0.0, 0.0], pursuit),
}

# The other problems contract some direction by a factor of exp(20) or more, and backward solves amplify errors as much.
REVERSIBLE = [name for name in PROBLEMS if name not in ("A1", "B2", "B3", "C1", "C2", "C3", "C4", "E2")]


def solve(problem: Detest, method: str, tolerance: float, backward: bool = False) -> tuple[float, int]:
    """Returns the largest error of a component, relative to tolerance * (1 + |x|), and the NFE."""
    begin, end = (problem.end, np.array(problem.start)) if backward else (np.array(problem.start), problem.end)
    t0, t1 = (END, 0.0) if backward else (0.0, END)
    with torch.no_grad():
        solution = ode_solver(method, rtol=tolerance).solve(
            Problem(problem.field, None, torch.tensor(begin).unsqueeze(0), t0, t1)
        )
    error = np.abs(solution.x[0].numpy() - end) / (1 + np.abs(end))
    return float(error.max()) / tolerance, solution.statistics.nfe_forward


def exceeding(found: Sequence[float], bounds: Sequence[float], ids: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Returns the values above their bounds, with the bounds."""
    return {name: (value, bound) for name, value, bound in zip(ids, found, bounds, strict=True) if not value < bound}


@cache
def forward(name: str, column: int) -> tuple[float, int]:
    return solve(PROBLEMS[name], *SOLVES[column])


# The largest error of a component at t = 20, relative to tolerance * (1 + |x|); columns as in SOLVES.
ERRORS = {
    "A1": (0.0196, 0.306, 0.0161, 0.00565, 0.0669, 0.0598, 0.0483, 0.0254, 2.57e-05, 0.000213, 0.00136),
    "A2": (0.402, 0.887, 0.418, 0.544, 0.349, 0.447, 0.629, 1.25, 0.000118, 0.000439, 0.00437),
    "A3": (14.7, 20.8, 6.42, 2.59, 2.18, 15.2, 1.19, 1.31, 0.89, 0.909, 0.376),
    "A4": (0.053, 1.28, 0.316, 0.126, 0.0118, 0.0589, 0.0564, 0.00122, 0.0143, 0.0761, 0.0179),
    "A5": (18.9, 48, 2.64, 7.49, 7.07, 1.68, 7.06, 5.96, 0.00363, 0.0186, 0.116),
    "B1": (144, 189, 69, 15.8, 12.7, 30.1, 23.7, 8.81, 1.85, 2.67, 0.837),
    "B2": (0.0089, 0.0987, 0.152, 0.0173, 0.0217, 0.0283, 0.0192, 0.0187, 0.000122, 0.00144, 0.0979),
    "B3": (0.875, 1.46, 0.016, 0.103, 0.316, 0.0629, 0.0636, 0.457, 0.000207, 0.000741, 0.00307),
    "B4": (36.8, 4.06, 34.4, 7.16, 2.92, 13.7, 10.4, 2.46, 0.429, 23.7, 27.3),
    "B5": (16.4, 22.7, 99.1, 20.1, 14.6, 9.54, 9.92, 1.97, 3.13, 1.08, 0.716),
    "C1": (0.779, 3.55, 0.0288, 0.249, 0.446, 0.0449, 0.171, 0.135, 0.00182, 0.0141, 0.0226),
    "C2": (0.0873, 0.0743, 0.114, 0.366, 0.304, 1.08, 0.115, 1.65, 0.0171, 0.134, 0.00529),
    "C3": (0.677, 2.04, 0.269, 0.13, 0.175, 0.0214, 0.279, 0.0978, 1.09e-07, 0.000916, 0.0479),
    "C4": (0.154, 3.19, 0.097, 0.0745, 0.493, 0.0353, 0.616, 0.223, 0.00212, 0.00184, 0.000908),
    "C5": (35.1, 38.8, 130, 56.3, 21, 29.4, 21.9, 4.74, 0.0459, 1.15, 1.26),
    "D1": (158, 387, 350, 702, 182, 789, 58.6, 118, 38.8, 32.6, 41.1),
    "D2": (263, 516, 891, 585, 229, 629, 13.8, 176, 8.49, 8.85, 6.23),
    "D3": (173, 288, 582, 176, 170, 351, 115, 181, 21.7, 9.92, 9.05),
    "D4": (25.4, 45.3, 33, 50.2, 131, 180, 124, 132, 44.2, 0.96, 0.923),
    "D5": (192, 324, 843, 224, 217, 311, 256, 225, 78, 6.26, 4),
    "E1": (22.6, 20.5, 4.63, 3.59, 2.85, 7.15, 2.11, 1.13, 0.847, 0.928, 0.486),
    "E2": (3.34, 0.275, 24.2, 19.3, 8.59, 27.2, 10.6, 5.25, 0.22, 0.712, 0.132),
    "E3": (6.99, 11.2, 158, 39.6, 13.3, 108, 22, 3.68, 3.21, 0.398, 1.69),
    "E4": (1.45, 2.02, 0.0253, 0.178, 0.203, 1.62, 0.0936, 0.0812, 0.000307, 0.0426, 0.0315),
    "E5": (0.975, 1.09, 0.0133, 0.0782, 0.146, 0.0295, 0.0724, 0.131, 0.0221, 0.0265, 0.0144),
}
# Evaluations of the field; columns as in SOLVES.
NFE = {
    "A1": (56, 272, 68, 164, 530, 62, 146, 476, 104, 157, 287),
    "A2": (38, 248, 44, 98, 302, 44, 86, 230, 66, 118, 209),
    "A3": (206, 1517, 140, 518, 1532, 152, 524, 1592, 181, 484, 975),
    "A4": (38, 251, 32, 92, 308, 32, 92, 308, 53, 79, 194),
    "A5": (38, 248, 32, 80, 266, 32, 74, 248, 66, 105, 183),
    "B1": (353, 2405, 302, 866, 2768, 320, 848, 2618, 458, 805, 1790),
    "B2": (101, 290, 140, 230, 608, 140, 212, 542, 207, 259, 352),
    "B3": (44, 320, 86, 176, 578, 74, 158, 512, 105, 170, 338),
    "B4": (212, 1958, 164, 542, 2102, 188, 506, 2000, 206, 364, 807),
    "B5": (194, 1286, 158, 482, 1484, 158, 410, 1358, 205, 435, 900),
    "C1": (62, 380, 92, 206, 722, 86, 188, 644, 142, 183, 352),
    "C2": (242, 395, 374, 404, 776, 338, 380, 704, 529, 543, 635),
    "C3": (107, 257, 164, 242, 590, 164, 224, 524, 270, 285, 377),
    "C4": (113, 206, 170, 224, 506, 164, 218, 452, 258, 297, 376),
    "C5": (26, 200, 32, 74, 248, 38, 74, 242, 53, 91, 143),
    "D1": (173, 1487, 212, 428, 1700, 224, 494, 1958, 244, 524, 856),
    "D2": (224, 1622, 218, 572, 1808, 242, 650, 2048, 294, 601, 1242),
    "D3": (290, 1931, 266, 722, 2126, 254, 824, 2306, 395, 803, 1646),
    "D4": (374, 2432, 332, 944, 2624, 332, 1040, 2762, 571, 1082, 2192),
    "D5": (545, 3437, 368, 1370, 3602, 518, 1454, 3788, 826, 1642, 3285),
    "E1": (107, 992, 98, 368, 1406, 92, 320, 1238, 105, 222, 495),
    "E2": (386, 2840, 434, 1154, 3290, 434, 1088, 3152, 484, 970, 2221),
    "E3": (416, 3227, 242, 824, 2678, 224, 746, 2534, 246, 531, 1244),
    "E4": (20, 110, 38, 74, 200, 26, 68, 182, 53, 78, 130),
    "E5": (38, 263, 38, 98, 248, 38, 92, 242, 53, 79, 229),
}
# The same errors at t = 0 after a backward solve from the reference at t = 20, at tolerance 1e-6. Columns as in METHODS
BACKWARD = {
    "A2": (59.7, 9.68, 30.1, 1.06),
    "A3": (15, 1.53, 2, 0.792),
    "A4": (2.87, 1.04, 0.376, 0.00904),
    "A5": (3.66, 0.521, 0.645, 0.0128),
    "B1": (494, 107, 88.6, 11.7),
    "B4": (4.01, 10.1, 9.52, 19.9),
    "B5": (35.6, 28.5, 39.3, 5.82),
    "C5": (35, 58.8, 29.2, 1.25),
    "D1": (535, 1.28e03, 114, 65),
    "D2": (932, 2.27e03, 209, 77.2),
    "D3": (1.25e03, 3.34e03, 67.7, 156),
    "D4": (206, 7.86e03, 978, 963),
    "D5": (1.41e05, 7e04, 3.15e04, 3.29e04),
    "E1": (82.8, 15.9, 13, 6.46),
    "E3": (11.2, 42.1, 23.1, 0.462),
    "E4": (57.4, 6.77, 2.54, 0.351),
    "E5": (8.68, 0.213, 1.01, 0.0259),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_solution_matches_scipy_dop853(name: str) -> None:
    """The reference starts at `start` and agrees with another solver, DOP853 of SciPy."""
    problem = PROBLEMS[name]
    if callable(problem.solution):
        np.testing.assert_allclose(problem.solution(0.0), problem.start, rtol=0, atol=1e-14)

    def field(t: float, x: np.ndarray) -> np.ndarray:
        return problem.field(torch.tensor(t), torch.from_numpy(x).unsqueeze(0))[0].numpy()

    found = solve_ivp(field, (0, END), problem.start, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
    np.testing.assert_allclose(found, problem.end, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_stay_near_the_recorded_errors(name: str) -> None:
    found = [forward(name, column)[0] for column in range(len(SOLVES))]
    # errors below the tolerance depend on rounding
    bounds = [2 * max(1.0, error) for error in ERRORS[name]]
    assert exceeding(found, bounds, IDS) == {}


@pytest.mark.parametrize("name", PROBLEMS)
def test_nfe_stays_near_the_recorded_nfe(name: str) -> None:
    found = [forward(name, column)[1] for column in range(len(SOLVES))]
    assert exceeding(found, [1.2 * nfe for nfe in NFE[name]], IDS) == {}


@pytest.mark.parametrize("column", range(len(SOLVES)), ids=IDS)
def test_geometric_means_stay_near_the_recorded_means(column: int) -> None:
    """Geometric means reveal changes that are too small to notice in one problem."""
    errors, nfe = np.array([forward(name, column) for name in PROBLEMS]).T
    measured = np.array([row[column] for row in ERRORS.values()])
    assert np.log(errors.clip(0.3) / measured.clip(0.3)).mean() < math.log(1.2)
    assert np.log(nfe / [row[column] for row in NFE.values()]).mean() < math.log(1.05)


@pytest.mark.parametrize("name", PROBLEMS)
def test_tighter_tolerance_lowers_error_and_raises_nfe(name: str) -> None:
    for column in range(1, len(SOLVES)):
        if SOLVES[column][0] == SOLVES[column - 1][0]:
            (loose, few), (tight, many) = forward(name, column - 1), forward(name, column)
            assert many > few, IDS[column]
            # the tolerance falls to a thousandth and the error to a tenth, unless the looser error is small by chance
            assert tight * 1e-3 < loose / 10 or tight < 0.2, IDS[column]


@pytest.mark.parametrize("name", REVERSIBLE)
def test_backward_solve_returns_to_the_initial_state(name: str) -> None:
    found = [solve(PROBLEMS[name], method, 1e-6, backward=True)[0] for method in METHODS]
    # D5 starts near a close perihelion, where small phase errors become large velocity errors
    assert exceeding(found, [2 * max(1.0, error) for error in BACKWARD[name]], METHODS) == {}


def table(title: str, rows: dict[str, list[str]]) -> str:
    lines = [f'    "{name}": ({", ".join(row)}),' for name, row in rows.items()]
    return "\n".join([f"{title} = {{", *lines, "}"])


def main() -> None:
    """Prints the tables."""
    torch.set_default_dtype(torch.float64)
    results = {name: [forward(name, column) for column in range(len(SOLVES))] for name in PROBLEMS}
    print(table("ERRORS", {name: [f"{error:.3g}" for error, _ in row] for name, row in results.items()}))
    print(table("NFE", {name: [str(nfe) for _, nfe in row] for name, row in results.items()}))
    back = {name: [solve(PROBLEMS[name], method, 1e-6, backward=True)[0] for method in METHODS] for name in REVERSIBLE}
    print(table("BACKWARD", {name: [f"{error:.3g}" for error in row] for name, row in back.items()}))


if __name__ == "__main__":
    main()
