"""Densities of models with circular columns: known angles, the seam, the integral, files and export."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import flowtrain
from flowtrain.bases import NormalUniform
from flowtrain.bijections import Chain
from flowtrain.bijections.regularizers import Regularizer
from flowtrain.data.base import Samples
from flowtrain.evaluation import evaluate
from flowtrain.flow import Flow
from flowtrain.models.ffjord import ffjord
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.objectives.flow_matching import FlowMatching
from flowtrain.ode import ode_solver
from flowtrain.runs.build import build_flow
from flowtrain.utils.circle import wrap

Make = Callable[..., Flow]

SMALL: dict[str, Make] = {
    "nsf": lambda d, c, **keys: nsf(d, circular=c, layers=3, hidden=[8], bins=4, **keys),
    "maf": lambda d, c, **keys: maf(d, circular=c, layers=3, hidden=[8], bins=4, **keys),
    "ffjord": lambda d, c, **keys: ffjord(d, circular=c, hidden=[8, 8], solver=ode_solver("dopri5", rtol=1e-6), **keys),
}


def perturbed(flow: Flow, std: float = 0.4) -> Flow:
    for p in flow.parameters():
        p.data.add_(std * torch.randn_like(p))
    return flow.eval()


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize(("d", "circular"), [(1, [0]), (2, [0, 1]), (2, [1]), (3, [0, 2])], ids=str)
def test_untrained_model_is_the_base(name: str, d: int, circular: list[int]) -> None:
    flow, x = SMALL[name](d, circular), torch.randn(5, d)
    torch.testing.assert_close(flow.log_prob(x), NormalUniform(d, circular).log_prob(x))
    assert flow.base.circular == tuple(circular)


@pytest.mark.parametrize("name", list(SMALL))
def test_density_of_two_angles_integrates_to_one(name: str) -> None:
    flow, n = perturbed(SMALL[name](2, [0, 1]), 0.3), 120 if name == "ffjord" else 300
    side = (torch.arange(n) + 0.5) / n * 2 * math.pi - math.pi
    with torch.no_grad():
        p = flow.log_prob(torch.cartesian_prod(side, side)).exp()
    # the midpoint rule converges fast for periodic functions
    assert float(p.sum()) * (2 * math.pi / n) ** 2 == pytest.approx(1, abs=2e-3)
    assert p.std() > 1e-3


@pytest.mark.parametrize("name", list(SMALL))
def test_density_and_its_derivative_are_continuous_at_the_seam(name: str) -> None:
    flow = perturbed(SMALL[name](2, [1]))
    h = 1e-5
    x = torch.tensor([[0.3, s * math.pi + k * h] for s, k in ((-1, 0), (-1, 1), (1, 0), (1, -1))])
    with torch.no_grad():
        at, above, turned, below = flow.log_prob(x)
    assert float(at - turned) == pytest.approx(0, abs=1e-9)
    assert float((above - at) / h) == pytest.approx(float((turned - below) / h), abs=1e-2)
    assert abs(float(above - at)) / h > 1e-2


@pytest.mark.parametrize("name", list(SMALL))
def test_samples_in_float32_lie_in_the_interval_and_gradients_are_finite(name: str) -> None:
    flow = perturbed(SMALL[name](3, [0, 2]).float())
    x = flow.sample(3000)
    assert all(-math.pi <= v < math.pi for v in x[:, [0, 2]].flatten().tolist())
    edge = torch.tensor([[s * math.pi, 0.1, t * math.pi] for s in (-1, 1) for t in (-1, 0, 1)], dtype=torch.float32)
    edge.requires_grad_()
    log_p = flow.log_prob(edge)
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_p.sum(), [edge, *flow.parameters()]))
    with torch.no_grad():
        back = flow(flow.inverse(x))
    off = x - back
    off[:, [0, 2]] = wrap(off[:, [0, 2]])
    assert off.abs().max() < 1e-4


@pytest.mark.parametrize("name", list(SMALL))
def test_flow_with_angles_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    flow = perturbed(SMALL[name](4, [0, 2], conditional=True, classes=2).float())
    flow.save(tmp_path / "flow.pt")
    again = flowtrain.load(tmp_path / "flow.pt")
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
    assert torch.equal(again.log_prob(x, y), flow.log_prob(x, y))
    assert isinstance(again, Flow)
    assert again.base.circular == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_flow_with_angles_is_exported(name: str, tmp_path: Path) -> None:
    model, depth = {"nsf": (nsf, {"layers": 2}), "maf": (maf, {"layers": 1}), "ffjord": (ffjord, {})}[name]
    flow = perturbed(model(2, circular=[1], hidden=[8], **depth).float(), 0.2)  # type: ignore[operator]
    flow.export(tmp_path / "flow.pt2", tolerance=1e-3)
    x = torch.randn(7, 2, dtype=torch.float32)
    program = torch.export.load(tmp_path / "flow.pt2").module()
    torch.testing.assert_close(program(x), flow.log_prob(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["nsf", "ffjord"])
def test_built_flow_standardises_real_columns_only(target: str) -> None:
    model = {"name": target, "_target_": f"flowtrain.models.{target}.{target}", "hidden": [8], "circular": [1]}
    solver = {"_target_": "flowtrain.ode.ode_solver"}
    samples = Samples((3,), standardized=True, gaussian_start=True)
    flow = build_flow({"model": model, "solver": solver}, samples)
    x = torch.randn(500, 3) * torch.tensor([1.0, 0.2, 100.0]) + torch.tensor([5.0, 1.0, -30.0])
    assert isinstance(flow.bijection, Chain)
    *_, standardize = flow.bijection
    standardize.fit(x.mean(0), x.std(0))
    z = flow.bijection.initialize(x)
    torch.testing.assert_close(z[:, 1], wrap(x[:, 1]))
    torch.testing.assert_close(z[:, [0, 2]].T.cov(), torch.eye(2), rtol=0, atol=0.05)


KAPPA = torch.tensor([20.0, 3.0])
CENTRE = torch.tensor([3.0, -0.5])
WEIGHT = torch.tensor([0.3, 0.7])


def angles(n: int) -> Tensor:
    """Draws from a mixture of two von Mises distributions, one of them at the seam."""
    k = torch.multinomial(WEIGHT, n, replacement=True)
    return wrap(D.VonMises(CENTRE[k], KAPPA[k]).sample()).unsqueeze(1)


def log_prob_of_angles(x: Tensor) -> Tensor:
    return (WEIGHT.log() + D.VonMises(CENTRE, KAPPA).log_prob(x)).logsumexp(1)


TURN = D.VonMises(torch.tensor(1.0), torch.tensor(8.0))
WIDTH = 0.5


def pairs(n: int) -> Tensor:
    """Draws angles a and b, where b - a is concentrated at 1."""
    a = angles(n)
    return torch.cat([a, wrap(a + TURN.sample((n, 1)))], 1)


def log_prob_of_pairs(x: Tensor) -> Tensor:
    return log_prob_of_angles(x[:, :1]) + TURN.log_prob(wrap(x[:, 1] - x[:, 0]))


def mixed(n: int) -> Tensor:
    """Draws a real column whose mean depends on an angle."""
    a = angles(n)
    return torch.cat([3 * a.cos() + WIDTH * torch.randn(n, 1), a], 1)


def log_prob_of_mixed(x: Tensor) -> Tensor:
    return log_prob_of_angles(x[:, 1:]) + D.Normal(3 * x[:, 1].cos(), WIDTH).log_prob(x[:, 0])


KNOWN = {
    "angle": (angles, log_prob_of_angles, 1, [0]),
    "pair": (pairs, log_prob_of_pairs, 2, [0, 1]),
    "mixed": (mixed, log_prob_of_mixed, 2, [1]),
}
TRAINED: dict[str, tuple[Make, int, float]] = {
    "nsf": (lambda d, c: nsf(d, circular=c, layers=4, hidden=[32], bins=8), 400, 0.01),
    "maf": (lambda d, c: maf(d, circular=c, layers=3, hidden=[32]), 400, 0.01),
    "ffjord": (lambda d, c: ffjord(d, circular=c, hidden=[64, 64], solver=ode_solver(rtol=1e-3)), 500, 0.03),
}
FAST = [("nsf", "angle"), ("maf", "angle")]


def trained(flow: Flow, draw: Callable[[int], Tensor], steps: int, lr: float, loss: Callable[[Tensor], Tensor]) -> Flow:
    flow = flow.float()
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float32)
        x = draw(20_000).float()
        flow.bijection.initialize(x[:1000])
        optimizer = torch.optim.Adam(flow.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(x[torch.randint(len(x), (256,))]).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        torch.set_default_dtype(torch.float64)
    return flow.eval()


def kl(flow: Flow, draw: Callable[[int], Tensor], log_prob: Callable[[Tensor], Tensor]) -> float:
    """Returns an estimate of KL(p | flow) in nats. Its standard error is far below 0.01."""
    test = draw(10_000)
    with torch.no_grad():
        return float((log_prob(test) - flow.log_prob(test.float()).double()).mean())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=[] if (name, target) in FAST else [pytest.mark.slow])
        for name in TRAINED
        for target in KNOWN
    ],
)
@pytest.mark.slow
def test_known_density_of_angles_is_learned(name: str, target: str) -> None:
    make, steps, lr = TRAINED[name]
    draw, log_prob, d, circular = KNOWN[target]
    flow = make(d, circular)
    trained(flow, draw, steps, lr, lambda x: -flow.log_prob(x).mean())
    assert kl(flow, draw, log_prob) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "steps"), [("independent", 1000), ("optimal", 500)])
def test_flow_matching_learns_angles(coupling: str, steps: int) -> None:
    flow = ffjord(1, circular=[0], hidden=[64, 64], solver=ode_solver(rtol=1e-3)).float()
    objective = FlowMatching(flow, Regularizer(), coupling)
    trained(flow, angles, steps, 0.01, lambda x: objective(x)[0])
    assert kl(flow, angles, log_prob_of_angles) < 0.02


def test_evaluation_of_a_flow_with_angles_has_no_failed_check() -> None:
    flow = perturbed(SMALL["nsf"](2, [1]), 0.2)
    result = evaluate(flow, flow.sample(500))
    assert all(check.passed is not False for check in result.checks)
