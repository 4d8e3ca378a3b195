"""The nodes of path integrals: their times, what they integrate exactly, and their error."""

import numpy as np
import pytest
import torch
from helpers.equations import random_field
from torch import Tensor

from flowtrain.bijections.continuous import Continuous
from flowtrain.nn.divergence import Probes, TraceRule
from flowtrain.ode import Problem, ode_solver
from flowtrain.ode.quadrature import dense_rows, gauss_nodes, has_dense_output, legendre, panels, stage_nodes
from flowtrain.ode.tableaus import TABLEAUS

DENSE = [name for name, tableau in TABLEAUS.items() if has_dense_output(tableau)]


@pytest.mark.parametrize("method", DENSE)
def test_dense_output_is_exact_for_polynomials_of_its_degree(method: str) -> None:
    tableau, h, t0 = TABLEAUS[method], 0.3, 0.2
    degree = 3 if tableau.mid is None else 4
    times = t0 + h * np.array(tableau.c)
    slopes = degree * times ** (degree - 1)
    theta = np.linspace(0, 1, 7)
    found = t0**degree + h * dense_rows(tableau, theta) @ slopes
    np.testing.assert_allclose(found, (t0 + theta * h) ** degree, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 6, 13])
@pytest.mark.parametrize("sign", [1, -1])
def test_gauss_nodes_cover_every_step(method: str, n_steps: int, sign: int) -> None:
    h = np.random.default_rng(0).uniform(0.05, 0.3, n_steps)
    starts = np.concatenate([[0], np.cumsum(h)])
    steps = [(sign * float(t), sign * float(w)) for t, w in zip(starts, h, strict=False)]
    nodes = gauss_nodes(TABLEAUS[method], steps)
    assert sum(len(r) for r in nodes.rows) == len(nodes.times)
    per_step = iter(nodes.times)
    for (t, width), rows in zip(steps, nodes.rows, strict=True):
        for _ in rows:
            assert 0 <= (next(per_step) - t) / width <= 1
    end = sign * float(starts[-1])
    q = torch.tensor(nodes.times).pow(5).view(-1, 1, 1)
    # a single step of a method with an order below 5 has too few nodes for this degree
    exact = 1e-12 if len(nodes.times) > 3 else 2e-2
    assert nodes.integrate(q).item() == pytest.approx(end**6 / 6, rel=exact)


def test_stage_nodes_integrate_quartics_exactly() -> None:
    tableau = TABLEAUS["dopri5"]
    nodes = stage_nodes(tableau, [(0.0, 0.5), (0.5, 0.25)])
    assert sum(nodes.weights) == pytest.approx(0.75)
    q = torch.tensor(nodes.times).pow(4).view(-1, 1, 1)
    assert nodes.integrate(q).item() == pytest.approx(0.75**5 / 5, rel=1e-12)


def test_legendre_tails_vanish_for_low_degree_polynomials() -> None:
    x, w, tails = legendre(6)
    assert w.sum() == pytest.approx(1)
    low = np.polynomial.legendre.legvander(2 * x - 1, 5)
    np.testing.assert_allclose(tails @ low, np.eye(6)[4:], atol=1e-12)


@pytest.mark.parametrize(("method", "control"), [("dopri5", "state"), ("tsit5", "state"), ("dopri5", "all")])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_log_det_error_estimate_is_close_to_the_true_error(method: str, control: str, rtol: float) -> None:
    field, x = random_field(std=1.2), torch.randn(64, 2)

    def log_det(rtol: float, control: str, method: str) -> tuple[Tensor, Tensor]:
        flow = Continuous(field, ode_solver(method, rtol=rtol, control=control), TraceRule("exact"))
        solution = flow.solve(x, 1.0, 0.0)
        assert solution.integrals is not None
        assert solution.integral_error is not None
        return solution.integrals, solution.integral_error

    exact, _ = log_det(1e-10, "all", "dopri8")
    found, error = log_det(rtol, control, method)
    true = (found - exact).square().mean().sqrt().item()
    estimate = error.square().mean().sqrt().item()
    # the state's error, which enters the integral, is of the order of the tolerance
    assert true < 30 * (estimate + rtol)
    assert estimate < 1e3 * (true + rtol)


def test_noisy_integrands_use_fewer_nodes() -> None:
    steps = [(0.0, 0.5), (0.5, 0.5)]
    for name, exact, noisy in (("dopri5", 8, 6), ("bosh3", 6, 4)):
        assert len(gauss_nodes(TABLEAUS[name], steps).times) == exact
        assert len(gauss_nodes(TABLEAUS[name], steps, noisy=True).times) == noisy
    assert Probes.hutchinson(torch.randn(3, 2), "gaussian", 2).noisy
    assert not Probes.exact(torch.randn(3, 2)).noisy


def test_panels_split_where_the_step_size_jumps() -> None:
    found = [list(p) for p in panels([0.3, 0.3, -0.01, 0.02, 0.02, 0.4])]
    assert found == [[0, 1], [2, 3, 4], [5]]
    assert [len(p) for p in panels([0.1] * 7)] == [4, 3]


def test_narrow_peak_between_long_steps_is_resolved() -> None:
    """v = x g(t) with a narrow bump g has the log-determinant d int g. The short steps at the bump need nodes."""

    def bump(t: Tensor) -> Tensor:
        return torch.exp(-200 * (t - 0.37).square())

    def integrand(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        g = bump(t).unsqueeze(-1)
        return x * g, (2 * g).expand(*x.shape[:-1], 1)

    x = torch.randn(4, 2)
    found = ode_solver("dopri5", rtol=1e-6).solve(Problem(lambda t, y: y * bump(t), integrand, x, 0.0, 1.0)).integrals
    assert found is not None
    torch.testing.assert_close(found, torch.full((4, 1), 2 * (np.pi / 200) ** 0.5), rtol=1e-4, atol=1e-4)
