"""Properties of every target of the library: gradients, tails, precision, samples, log Z and configs."""

import inspect
import math
from collections.abc import Callable
from pkgutil import resolve_name

import pytest
import torch
from torch import Tensor

from flowtrain.data.targets.base import Target, TargetData
from flowtrain.runs.build import build_data, build_flow
from flowtrain.runs.compose import compose, options
from flowtrain.utils.files import config_dir

Named = Callable[..., Target]
Samples = Callable[..., Tensor]
ALL = [name for name in options("target", [config_dir()]) if name != "custom"]


def test_the_gradient_agrees_with_finite_differences(target: Target, samples: Samples) -> None:
    x = samples(target, 8).requires_grad_()
    assert torch.autograd.gradcheck(target, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_in_the_far_tails_are_not_nan(target: Target, dtype: torch.dtype) -> None:
    far = torch.cartesian_prod(*[torch.tensor([-1e6, 0.0, 1e6], dtype=dtype)] * 2)
    for rest in (0.0, 1e6):
        x = torch.full((9, target.dim), rest, dtype=dtype)
        x[:, :2] = far
        x.requires_grad_()
        log_p = target(x)
        (slope,) = torch.autograd.grad(log_p.sum(), x)
        assert not log_p.isnan().any()
        assert (log_p < math.inf).all()
        assert slope.isfinite().all()
        assert (log_p[(far != 0).all(1)] < -1e3).all()


def test_float32_is_close_to_float64(target: Target, samples: Samples) -> None:
    x = samples(target, 2000).float()
    exact, found = target(x.double()), target(x)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 1e-4 * exact.abs().max().clamp(min=1)


def test_rows_do_not_depend_on_each_other(target: Target, samples: Samples) -> None:
    x = samples(target, 10)
    assert torch.equal(target(x)[3:5], target(x[3:5]))
    assert target(x[:0]).shape == (0,)


def test_samples_depend_only_on_the_generator(target: Target, samples: Samples) -> None:
    x = samples(target, 100)
    assert (x.shape, x.dtype) == ((100, target.dim), torch.float64)
    assert torch.equal(x, samples(target, 100))
    assert not torch.equal(x, samples(target, 100, seed=4))


@pytest.mark.parametrize("name", [f"energy{i}" for i in range(1, 5)] + ["gaussian_mixture", "double_well"])
def test_samples_and_log_z_agree_with_the_density(name: str, named: Named, samples: Samples) -> None:
    """E_p[g(x) / p~(x)] = 1 / Z for a density g, here a mixture of Gaussians at samples of p."""
    h, target = 0.3, named(name)
    x, centers = samples(target, 20_000), samples(target, 50, seed=9)
    log_g = (-0.5 * torch.cdist(x, centers).square() / h**2).logsumexp(1) - math.log(50 * 2 * math.pi * h**2)
    # the part of g inside of the support
    noise = torch.randn(50, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inside = (target((centers + h * noise).flatten(0, 1)) > -math.inf).double().mean()
    assert target.log_z is not None
    ratio = (log_g - target(x) + target.log_z).exp()
    assert abs(ratio.mean() - inside) < 4 * ratio.std() / math.sqrt(len(x)) + 0.01


def test_gradient_satisfies_steins_identity_over_samples(target: Target, samples: Samples) -> None:
    """E_p[phi'(x_i) + phi(x_i) d/dx_i log p] = 0 for phi = tanh and a column without bounds (Stein's identity)."""
    x = samples(target).requires_grad_()
    (slope,) = torch.autograd.grad(target(x).sum(), x)
    for i in range(target.dim):
        if target.types and target.types[i].is_bounded:
            continue
        phi = x[:, i].tanh().detach()
        terms = 1 - phi.square() + phi * slope[:, i]
        assert terms.mean().abs() < 4.5 * terms.std() / math.sqrt(len(x))


@pytest.mark.parametrize("name", ALL)
def test_a_config_lists_the_arguments_with_their_defaults(name: str) -> None:
    config = compose({"data": "target", "target": name}).config["target"]
    known = inspect.signature(resolve_name(config["_target_"])).parameters
    assert {key: value for key, value in config.items() if key not in ("name", "_target_")} == {
        key: list(p.default) if isinstance(p.default, tuple) else p.default for key, p in known.items()
    }
    assert config["name"] == name


def test_initial_points_have_a_finite_density(target: Target) -> None:
    data = TargetData(target, 100, 100)
    assert data.val.shape == (100, target.dim)
    assert target(data.val).isfinite().all()
    assert target(data.train_batch(0, 50, 1)).isfinite().all()


@pytest.mark.parametrize("name", ["energy3", "gaussian_mixture", "many_well"])
def test_a_flow_that_is_built_for_a_target_has_samples_in_its_support(name: str) -> None:
    config = compose({"data": "target", "target": name, "model": "nsf", "objective": "reverse_kl"}).config
    data = build_data(config)
    assert isinstance(data, TargetData)
    flow = build_flow(config, data.samples)
    assert data.samples.columns == data.target.columns
    assert data.target(flow.sample(200)).isfinite().all()
