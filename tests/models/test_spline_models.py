"""The models nsf and maf: accepted settings, the initial map, distant rows, copies and saved weights."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.flows import vectors

import flowtrain
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.flow import Flow
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.utils.errors import ConfigError

MODELS: dict[str, Callable[..., Flow]] = {
    "nsf": lambda shape, **keys: nsf(shape, layers=3, hidden=[8], bins=4, **keys),
    "maf": lambda shape, **keys: maf(shape, layers=3, hidden=[8], **keys),
    "spline maf": lambda shape, **keys: maf(shape, layers=3, hidden=[8], transform="spline", bins=4, **keys),
}


def perturbed(flow: Flow, std: float = 0.2) -> Flow:
    for p in flow.parameters():
        p.data.add_(std * torch.randn_like(p))
    return flow.eval()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nsf((1, 8, 8)), r"model=nsf needs vectors.*\(1, 8, 8\).*model=glow"),
        (lambda: maf((1, 8, 8)), r"model=maf needs vectors.*\(1, 8, 8\).*model=glow"),
        (lambda: nsf(2, conditional=True), "model.conditional|conditional=true"),
        (lambda: maf(2, conditional=True), "model.conditional|conditional=true"),
        (lambda: nsf(2, bins=1), "model.bins=1"),
        (lambda: nsf(2, bound=0), "model.bound=0"),
        (lambda: nsf(2, hidden=[4, 5]), r"model.hidden=\[4, 5\]"),
        (lambda: nsf(2, mixing="lu"), "model.mixing=lu"),
        (lambda: maf(2, transform="cubic"), "model.transform=cubic"),
        (lambda: maf(2, passes=0), "model.passes=0"),
        (lambda: maf(2, layers=0), "model.layers=0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Flow], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("d", "passes", "groups"),
    [
        (5, None, [0, 1, 2, 3, 4]),
        (5, 2, [0, 0, 0, 1, 1]),
        (5, 9, [0, 1, 2, 3, 4]),
        (5, 1, [0] * 5),
        (6, 4, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_passes_are_between_autoregressive_and_coupling(d: int, passes: int | None, groups: list[int]) -> None:
    layers = [m for m in maf(d, layers=2, passes=passes).modules() if isinstance(m, Autoregressive)]
    # layers in the order from base to data
    assert [layer.groups.tolist() for layer in layers] == [groups[::-1], groups]
    assert layers[0].passes == max(groups) + 1


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("d", [1, 2, 7])
def test_a_model_starts_as_an_affine_map_at_any_distance(name: str, d: int) -> None:
    flow = MODELS[name](d)
    x = torch.cat([torch.randn(30, d), 1e3 * torch.randn(30, d)])
    flow.bijection.initialize(x[:30])
    z = flow.inverse(x)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow.inverse(row[None])[0], x[0])
    assert isinstance(jacobian, torch.Tensor)
    torch.testing.assert_close(z, z[0] + (x - x[0]) @ jacobian.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("d", [1, 2, 7])
def test_far_rows_are_finite_in_float32_and_come_back(name: str, d: int) -> None:
    flow = perturbed(MODELS[name](d, input_bound=3.0).float())
    x = torch.randn(50, d, dtype=torch.float32)
    x[:10] *= 1e6
    x.requires_grad_()
    log_p = flow.log_prob(x)
    assert log_p.isfinite().all()
    weights = list(flow.parameters())
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_p.sum() / 1e12, [x, *weights]))
    with torch.no_grad():
        back = flow(flow.inverse(x))
    torch.testing.assert_close(back[10:], x.detach()[10:], rtol=0, atol=1e-4)
    torch.testing.assert_close(back[:10], x.detach()[:10], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(MODELS))
def test_far_from_the_data_the_nll_grows_as_that_of_a_gaussian(name: str) -> None:
    flow = perturbed(MODELS[name](4, input_bound=3.0), 0.3)
    ray = torch.nn.functional.normalize(torch.randn(20, 4), dim=1)
    with torch.no_grad():
        curvature = [-flow.log_prob(r * ray) / r**2 for r in (1e4, 1e6)]
    torch.testing.assert_close(curvature[0], curvature[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", [*MODELS])
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_batches_and_single_rows(name: str, rows: int) -> None:
    for d in (1, 3):
        flow = perturbed(MODELS[name](d, conditional=True, classes=2)).train()
        x, label = torch.randn(rows, d), torch.ones(rows, dtype=torch.int64)
        log_p = flow.log_prob(x, label)
        assert log_p.shape == (rows,)
        log_p.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
        assert flow.forward(flow.inverse(x, label), label).shape == (rows, d)


@pytest.mark.parametrize("name", [*MODELS])
def test_copies_and_loaded_weights_are_the_same_density(name: str) -> None:
    flow, x = perturbed(MODELS[name](3, mixing="permutation", dropout=0.5)), torch.randn(20, 3)
    other = MODELS[name](3, mixing="permutation", dropout=0.5).eval()
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))
    other.load_state_dict(flow.state_dict())
    for same in (other, copy.deepcopy(flow)):
        assert torch.equal(same.log_prob(x), flow.log_prob(x))
    still = flow.log_prob(x)
    assert torch.equal(flow.log_prob(x), still)
    assert not torch.equal(flow.train().log_prob(x), still)


@pytest.mark.parametrize("name", ["nsf", "maf", "spline maf"])
def test_the_density_has_a_mass_of_one(name: str) -> None:
    flow = vectors(name, standardized=False)
    line = torch.linspace(-12, 12, 800)
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(line, line)).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["nsf", "maf"])
def test_a_fit_of_a_table_with_labels_is_saved_and_loaded(name: str, tmp_path: str) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, size=300)
    x = (rng.normal(size=(300, 3)) + 5 * y[:, None]).astype(np.float32)
    flow = flowtrain.fit(x, model=name, label=y, steps=30, progress=False)
    flow.save(f"{tmp_path}/flow.pt")
    again = flowtrain.load(f"{tmp_path}/flow.pt")
    assert np.array_equal(again.log_prob(x, y), flow.log_prob(x, y))
    assert flow.log_prob(x, y).mean() > flow.log_prob(x, 1 - y).mean()
