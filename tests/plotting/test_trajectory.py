"""The transport from base to data: it ends at the samples of the flow. Densities and velocities match the states."""

import math

import pytest
import torch
from helpers.flows import IMAGES, VECTORS, images, vectors
from torch import Tensor

from flowtrain import models
from flowtrain.bijections.base import Chain
from flowtrain.bijections.decomposition import between, innermost, stages
from flowtrain.bijections.scale import Standardize
from flowtrain.bijections.support import ToSupport
from flowtrain.flow import Flow
from flowtrain.plotting.trajectory import Moment, Trajectory, smoothstep
from flowtrain.utils.errors import FlowtrainError


@pytest.mark.parametrize("name", VECTORS)
def test_trajectory_starts_at_the_base_and_ends_at_the_data(name: str) -> None:
    flow = vectors(name)
    way, z = Trajectory(flow, 5), torch.randn(7, 2)
    with torch.no_grad():
        x = way.states(z)
        assert len(x) == len(way.moments) >= 5
        torch.testing.assert_close(x[0], way.frame.map_forward(z))
        torch.testing.assert_close(x[-1], flow(z), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(way.log_density(x[-1], way.moments[-1]), flow.log_prob(x[-1]))


@pytest.mark.parametrize("name", IMAGES)
def test_images_form_from_noise_to_samples(name: str) -> None:
    flow = images(name)
    way, z = Trajectory(flow, 4), torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        x = way.states(z)
        torch.testing.assert_close(x[-1], flow(z), rtol=1e-5, atol=1e-5)
        assert float((x[0] - x[-1]).abs().max()) > 0.1
        # the logit with its alpha limits pixels to this range
        assert float((x - 8).abs().max()) < 8.001


@pytest.mark.parametrize("name", VECTORS)
def test_log_density_matches_the_jacobian(name: str) -> None:
    """log p_t(x_t) equals log p0(z) - log |det dx_t/dz|, with the Jacobian by autograd."""
    flow = vectors(name)
    way, z = Trajectory(flow, 7), torch.randn(4, 2)
    exact = way.exact(7)
    assert len(exact) >= 2
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: way.states(row[None])[:, 0]))
    if flow.ode_blocks:
        jacobian = _by_rows(way)
    found = jacobian(z)
    with torch.no_grad():
        states = way.states(z)
    for moment in exact:
        k = way.moments.index(moment)
        expected = flow.base_log_prob(z) - torch.linalg.slogdet(found[:, k])[1]
        torch.testing.assert_close(way.log_density(states[k], moment), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VECTORS)
def test_paths_have_the_states_and_log_densities_of_their_moments(name: str) -> None:
    flow = vectors(name)
    way, z = Trajectory(flow, 7), torch.randn(5, 2)
    with torch.no_grad():
        shown = way.exact(7)
        states, log_p = way.paths(z, shown)
        every = way.states(z)
        for i, moment in enumerate(shown):
            torch.testing.assert_close(states[i], every[way.moments.index(moment)], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(log_p[i], way.log_density(states[i], moment), rtol=1e-5, atol=1e-5)


def _by_rows(way: Trajectory):  # type: ignore[no-untyped-def]
    # row by row, because functional transforms do not allow the solver to read values
    def rows(z: Tensor) -> Tensor:
        return torch.stack([torch.autograd.functional.jacobian(lambda r: way.states(r[None])[:, 0], row) for row in z])

    return rows


@pytest.mark.parametrize("name", ["realnvp", "glow", "nsf", "maf"])
def test_densities_between_steps_are_mixtures(name: str) -> None:
    flow = vectors(name, standardized=False)
    way = Trajectory(flow, 12)
    moment = next(m for m in way.moments if m.part)
    line = torch.linspace(-12, 12, 600)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        p, before, after = (
            way.log_density(grid, m).exp() for m in (moment, Moment(moment.step, 0), Moment(moment.step + 1, 0))
        )
    weight = smoothstep(moment.part)
    torch.testing.assert_close(p, (1 - weight) * before + weight * after)
    assert float(p.sum() * (line[1] - line[0]) ** 2) == pytest.approx(1, abs=1e-3)
    assert moment not in way.exact(12)


@pytest.mark.parametrize("name", ["ffjord", "two ffjords"])
def test_velocities_are_the_slopes_of_the_states(name: str) -> None:
    flow = vectors(name)
    z = torch.randn(5, 2)
    with torch.no_grad():
        way = Trajectory(flow, 101)
        n = len(way.steps)
        x = way.states(z)[28:33]
        # finite difference of fourth order
        slope = (x[0] - 8 * x[1] + 8 * x[3] - x[4]) / 12 * 100 / n
        v = way.velocity(x[2], way.moments[30])
    assert v is not None
    torch.testing.assert_close(v, slope, rtol=1e-5, atol=1e-5)


def test_couplings_have_no_velocity() -> None:
    way = Trajectory(vectors("realnvp"), 4)
    assert way.velocity(torch.randn(3, 2), way.moments[1]) is None
    assert not way.is_continuous
    with pytest.raises(TypeError, match="has no time"):
        between(innermost(stages(vectors("affine").bijection)[0]), 0.0, 0.5)


def test_trajectory_of_a_conditional_flow_depends_on_the_label() -> None:
    flow = vectors("ffjord", classes=3)
    way, z, label = Trajectory(flow, 3), torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        x = way.states(z, label)
        torch.testing.assert_close(x[-1], flow(z, label), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(way.log_density(x[-1], way.moments[-1], label), flow.log_prob(x[-1], label))


def test_moments_are_evenly_spaced_and_named() -> None:
    way = Trajectory(vectors("ffjord"), 5)
    assert [way.name(m) for m in way.moments] == ["t = 0.00", "t = 0.25", "t = 0.50", "t = 0.75", "t = 1.00"]
    two = Trajectory(vectors("two ffjords"), 5)
    assert [two.name(m) for m in two.moments][1::3] == ["flow 1 of 2, t = 0.50", "flow 2 of 2, t = 1.00"]
    couplings = Trajectory(vectors("realnvp"), 5)
    # a moment after each of three couplings, and a moment in the middle of each coupling
    assert [sum(m) for m in couplings.moments] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3])
    after = [f"after {i} of 3 couplings" for i in (1, 2, 3)]
    assert [couplings.name(m) for m in couplings.exact(9)] == ["base", *after]
    assert couplings.name(couplings.moments[3]) == "coupling 2 of 3"
    assert couplings.axis == "couplings applied"
    layers = Trajectory(vectors("maf"), 3)
    assert [layers.name(m) for m in layers.exact(9)] == ["base", "after 1 of 2 layers", "after 2 of 2 layers"]
    assert Trajectory(vectors("affine"), 2).name(Moment(1, 0)) == "after the layer"
    assert len(couplings.exact(2)) == 2
    with pytest.raises(FlowtrainError, match="moments=1"):
        Trajectory(vectors("affine"), 1)


def test_frames_give_the_units_of_the_data() -> None:
    flow = vectors("ffjord")
    way = Trajectory(flow, 2)
    z = torch.randn(20_000, 2)
    with torch.no_grad():
        x = way.states(z)[0]
    assert x.std(0).tolist() == pytest.approx([2.0, 0.5], rel=0.03)
    with torch.no_grad():
        at_mean = way.log_density(torch.tensor([[1.0, -3.0]]), way.moments[0])
    assert float(at_mean) == pytest.approx(-math.log(2 * math.pi) - math.log(2.0 * 0.5))


@pytest.mark.parametrize("steps", [2, 3])
def test_fixed_steps_end_at_the_samples_of_the_flow(steps: int) -> None:
    """The end does not depend on the moments: each moment is solved from the start of its part of the flow."""
    flow = vectors("ffjord", solver=["solver=euler", f"solver.steps={steps}"])
    z = torch.randn(6, 2)
    with torch.no_grad():
        for moments in (4, 21):
            torch.testing.assert_close(Trajectory(flow, moments).states(z)[-1], flow(z))


@pytest.mark.parametrize("name", ["nsf", "ffjord"])
def test_states_stay_in_the_supports_of_the_columns(name: str) -> None:
    torch.manual_seed(0)
    model = models.ffjord(2, hidden=[6]) if name == "ffjord" else models.nsf(2, layers=2, hidden=[6])
    scale = Standardize((2,))
    scale.fit(torch.tensor([0.5, -0.2]), torch.tensor([2.0, 3.0]))
    support = ToSupport([0.0, -1.0], [math.inf, 1.0])
    flow = Flow(model.base, Chain([model.bijection, scale, support])).eval()
    way = Trajectory(flow, 5)
    assert way.is_continuous == (name == "ffjord")
    with torch.no_grad():
        x = way.states(torch.randn(200, 2))
        assert bool((x[..., 0] > 0).all())
        assert bool((x[..., 1].abs() <= 1).all())
        outside = torch.tensor([[-0.5, 0.0], [1.0, 1.5]])
        for moment in way.exact(5):
            assert bool((way.log_density(outside, moment) == -math.inf).all())
