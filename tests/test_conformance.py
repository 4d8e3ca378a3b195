"""The commands print the right numbers for flows whose density is known.

`pytest -m conformance` runs these tests alone, including the slow ones.
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic.models import MixtureMap, composed, folded, linear, mixture, scaled
from helpers import Run
from torch import Tensor
from torch.distributions import MultivariateNormal

from flowtrain.bijections.linear import Affine
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Dataset
from flowtrain.evaluation import evaluate
from flowtrain.flow import Flow
from flowtrain.models.affine import affine
from flowtrain.ode import ode_solver
from flowtrain.training import checkpoint

pytestmark = pytest.mark.conformance

DTYPES = ["float32", "float64"]
N = 2000


def randomized(flow: Flow, scale: float = 0.4) -> Flow:
    """Returns the flow with random parameters."""
    generator = torch.Generator().manual_seed(7)
    for p in flow.parameters():
        p.data = (scale * torch.randn(p.shape, generator=generator)).float()
    return flow.eval()


@cache
def composed_config() -> dict[str, Any]:
    return compose_defaults(["model=affine", "data=array", "data.path=x", "data.standardize=false"])


def saved(flow: Flow, recipe: str, path: Path, data: str, **solver: Any) -> Path:
    """Saves the flow as a run's checkpoint. `recipe` is the full name of the function that builds the model."""
    config = copy.deepcopy(composed_config())
    config["data"]["path"] = data
    config["model"] = {"name": recipe.rpartition(".")[2], "_target_": recipe}
    config["solver"] |= solver
    content = {"config": config, "event_shape": list(flow.event_shape), "step": 5, "weights": flow.state_dict()}
    checkpoint.save(path, content)
    return path


def points(tmp_path: Path, x: Tensor) -> str:
    """Saves the points to a file, which floweval reads as float32."""
    path = tmp_path / "points.npy"
    np.save(path, x.float().numpy())
    return str(path)


def gaussian_of(maps: list[Affine]) -> MultivariateNormal:
    """Returns the image of a standard normal under the affine maps, applied in the given order."""
    d = len(maps[0].mean)
    mean, factor = torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    for each in maps:
        step = each.double().factor().detach()
        mean, factor = step @ mean + each.mean.detach(), step @ factor
    return MultivariateNormal(mean, factor @ factor.T)


def gaussian_of_field(flow: Flow) -> MultivariateNormal:
    """Returns the image of a standard normal under the flow of v = A x + b.

    The mean is int_0^1 e^(sA) b ds, computed with the matrix exponential of [[A, b], [0, 0]].
    """
    (part,) = flow.ode_blocks
    a, b = (p.detach().double() for p in (part.field.a, part.field.b))
    d = len(b)
    block = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    block[:d, :d], block[:d, d] = a, b
    whole = torch.linalg.matrix_exp(block)
    return MultivariateNormal(whole[:d, d], whole[:d, :d] @ whole[:d, :d].T)


Case = tuple[Flow, str, Callable[[Tensor], Tensor]]


def case(name: str, d: int) -> Case:
    """Returns a flow, the full name of its recipe, and its log density in float64."""
    torch.set_default_dtype(torch.float32)
    if name == "affine":
        flow = randomized(affine((d,)))
        return flow, "flowtrain.models.affine.affine", gaussian_of(maps_of(flow)).log_prob
    if name == "composed":
        flow = randomized(composed((d,)))
        return flow, "analytic.models.composed", gaussian_of(maps_of(flow)).log_prob
    if name == "linear":
        flow = randomized(linear((d,), solver=ode_solver("dopri5")))
        return flow, "analytic.models.linear", gaussian_of_field(flow).log_prob
    flow = randomized(mixture((d,)))
    (part,) = (m for m in flow.modules() if isinstance(m, MixtureMap))
    return flow, "analytic.models.mixture", lambda x: mixture_log_prob(part, x)


def maps_of(flow: Flow) -> list[Affine]:
    return [m for m in copy.deepcopy(flow).modules() if isinstance(m, Affine)]


def mixture_log_prob(part: MixtureMap, x: Tensor) -> Tensor:
    """Returns log p of the product of mixtures, computed by torch.distributions."""
    weight, mean, std = (p.detach().double() for p in (part.log_weight, part.mean, part.log_std))
    total = torch.zeros(len(x), dtype=torch.float64)
    for j in range(x.shape[1]):
        components = torch.distributions.Normal(mean[j], std[j].exp())
        categories = torch.distributions.Categorical(logits=weight[j])
        total += torch.distributions.MixtureSameFamily(categories, components).log_prob(x[:, j])
    return total


class Points(Dataset):
    """A dataset of the given points."""

    def __init__(self, x: Tensor) -> None:
        self.event_shape, self.val, self.test = tuple(x.shape[1:]), x, x

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        raise NotImplementedError


def floweval(run: Run, ckpt: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    code, _, err = run("floweval", f"ckpt={ckpt}", "trust=[analytic]", f"out={ckpt.parent}/e.json", *arguments)
    assert code == 0, err
    content: dict[str, Any] = json.loads((ckpt.parent / "e.json").read_text())
    return content, err


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("name", ["affine", "composed", "linear", "mixture"])
def test_floweval_matches_the_closed_form(run: Run, tmp_path: Path, name: str, d: int, dtype: str) -> None:
    flow, recipe, log_prob = case(name, d)
    x = 1.5 * torch.randn(N, d, generator=torch.Generator().manual_seed(d))
    data = points(tmp_path, x)
    expected = log_prob(x.double())
    ckpt = saved(flow, recipe, tmp_path / "flow.pt", data, rtol=1e-7 if dtype == "float32" else 1e-9, atol=1e-9)
    found, err = floweval(run, ckpt, f"data.path={data}", f"scores={tmp_path}/s.npy", f"dtype={dtype}")
    assert found["nll"] == pytest.approx(-expected.mean().item(), abs=1e-5, rel=0)
    assert found["nll_stderr"] == pytest.approx(expected.std().item() / N**0.5, rel=1e-4)
    tolerance = 1e-5 if dtype == "float64" else 5e-5
    np.testing.assert_allclose(np.load(tmp_path / "s.npy"), expected.numpy(), atol=tolerance, rtol=tolerance)
    assert (found["n"], found["split"], found["step"], found["dtype"]) == (N, "all", 5, dtype)
    # a correct flow passes every check, and the report lists each
    assert all(check["passed"] for check in found["checks"].values()), found["checks"]
    assert {"log-det", "round trip", "own samples"} <= found["checks"].keys()
    assert ("mass" in found["checks"]) == (d <= 2)
    assert err == ""


@pytest.mark.slow
def test_confidence_intervals_cover_the_true_nll() -> None:
    """For 200 test sets and draws of trace probes, about 95% of the intervals contain the true NLL of a linear flow."""
    torch.set_default_dtype(torch.float32)
    d, n = 6, 200
    flow = randomized(linear((d,), solver=ode_solver("bosh3", rtol=1e-3), eval_trace="hutchinson"), 0.3)
    model = gaussian_of_field(flow)
    truth = MultivariateNormal(model.mean + 0.1, 1.2 * model.covariance_matrix)
    # E_truth[-log p] = H(truth) + KL(truth | model), both in closed form for Gaussians
    nll = float(truth.entropy() + torch.distributions.kl_divergence(truth, model))
    covered, pulls = 0, []
    for k in range(200):
        torch.manual_seed(k)
        found = evaluate(flow, Points(truth.sample((n,)).float()), seed=k)
        low, high = found.budget.interval
        covered += low <= nll <= high
        pulls.append((found.nll - nll) / found.error)
        assert found.trace == "hutchinson"
        assert found.budget.trace > 0.2 * found.nll_stderr
    print(f"{covered} of 200 intervals contain the true NLL; pulls {np.mean(pulls):.3f} +- {np.std(pulls):.3f}")
    assert 0.90 <= covered / 200 <= 0.99
    assert np.std(pulls) == pytest.approx(1, abs=0.15)
    assert abs(np.mean(pulls)) < 0.25


WRONG = {
    # recipe, d, checks that fail, message
    "scaled": (scaled, 2, {"mass", "log-det"}, "the log-determinant is wrong"),
    "scaled in many columns": (scaled, 20, {"log-det"}, "the log-determinant is wrong"),
    "folded": (folded, 3, {"round trip"}, "the map is not invertible"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flow_fails_the_matching_check(run: Run, tmp_path: Path, name: str) -> None:
    recipe, d, trips, words = WRONG[name]
    flow = randomized(recipe((d,)), 0.6)
    data = points(tmp_path, torch.randn(500, d))
    ckpt = saved(flow, f"analytic.models.{recipe.__name__}", tmp_path / "flow.pt", data)
    found, err = floweval(run, ckpt, f"data.path={data}")
    assert {name for name, check in found["checks"].items() if check["passed"] is False} == trips
    assert words in err


@pytest.mark.parametrize(
    ("scale", "loose"), [(2.0, {"rtol": 0.3, "atol": 0.3}), (1.0, {"method": "euler", "rtol": 1e-5, "step_size": 0.5})]
)
def test_loose_tolerance_is_reported_as_solver_error(
    run: Run, tmp_path: Path, scale: float, loose: dict[str, Any]
) -> None:
    flow = randomized(linear((4,), solver=ode_solver("dopri5")), scale)
    data = points(tmp_path, 2 * torch.randn(500, 4))
    ckpt = saved(flow, "analytic.models.linear", tmp_path / "flow.pt", data, **loose)
    found, err = floweval(run, ckpt, f"data.path={data}")
    assert {name for name, check in found["checks"].items() if check["passed"] is False} == {"solver"}
    assert found["budget"]["total"] > found["nll_stderr"]
    assert "smaller solver.rtol (or solver.step_size)" in err
