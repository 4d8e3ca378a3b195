"""The optimizer Muon, compared with singular value decompositions and with torch.optim."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import MakeTrainer
from torch import Tensor, nn

from flowtrain.bijections import InvertibleLinear
from flowtrain.models import glow, maf
from flowtrain.runs.compose import compose
from flowtrain.training.muon import MOMENTUM, Muon, hidden_matrices, orthogonalized

SHAPES = [(5, 4), (4, 9), (5, 4), (6, 2), (7,), (3, 3, 3, 3)]
MATRICES = [0, 1, 2]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], without: int | None = None) -> None:
    for i, p in enumerate(parameters):
        p.grad = None if i == without else torch.randn_like(p)


@pytest.mark.parametrize("shape", [(8, 8), (30, 5), (5, 30)])
def test_orthogonal_factor_equals_that_of_the_svd(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalized(x)
    # in the basis of the singular vectors, the result is diagonal with values near 1
    inside = u.mT @ found @ vh.mT
    values = torch.diagonal(inside, dim1=1, dim2=2)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert torch.equal(orthogonalized(torch.zeros(1, *shape)), torch.zeros(1, *shape))


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e30])
def test_orthogonal_factor_of_a_tiny_or_huge_matrix(scale: float) -> None:
    x = torch.randn(1, 5, 4, dtype=torch.float32)
    found = orthogonalized(x * scale)
    torch.testing.assert_close(found, orthogonalized(x), rtol=0, atol=1e-4)


def test_all_parameters_may_be_matrices() -> None:
    p = nn.Parameter(torch.zeros(5, 4))
    optimizer = Muon([p], [p], lr=0.1)
    p.grad = torch.randn(5, 4)
    optimizer.update()
    torch.testing.assert_close(p.detach(), -0.1 * 5**0.5 * orthogonalized(p.grad.unsqueeze(0))[0])


def test_matrices_move_by_orthogonal_updates() -> None:
    torch.manual_seed(0)
    mine, averages = parameters(), [torch.zeros(shape) for shape in SHAPES]
    optimizer = Muon(mine, [mine[i] for i in MATRICES], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        give_gradients(mine)
        before = [p.detach().clone() for p in mine]
        gradients: list[Tensor] = [p.grad for p in mine if p.grad is not None]
        optimizer.update()
        for i in MATRICES:
            averages[i] = MOMENTUM * averages[i] + (1 - MOMENTUM) * gradients[i]
            direction = (1 - MOMENTUM) * gradients[i] + MOMENTUM * averages[i]
            expected = orthogonalized(direction[None])[0] * max(SHAPES[i]) ** 0.5
            torch.testing.assert_close(mine[i].data, 0.95 * before[i] - 0.1 * expected)
            assert mine[i].grad is gradients[i]


def test_other_parameters_are_updated_by_adamw() -> None:
    torch.manual_seed(0)
    mine = parameters()
    its = copy.deepcopy([p for i, p in enumerate(mine) if i not in MATRICES])
    optimizer = Muon(mine, [mine[i] for i in MATRICES], lr=0.1, weight_decay=0.01)
    other = torch.optim.AdamW(its, 0.1, weight_decay=0.01, fused=True)
    for _ in range(4):
        give_gradients(mine)
        for p, q in zip([p for i, p in enumerate(mine) if i not in MATRICES], its, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.update()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(mine[3:], its, strict=True))


def test_continues_exactly_after_loading() -> None:
    """One matrix has no gradient in the first step."""
    torch.manual_seed(0)
    mine = parameters()
    optimizer = Muon(mine, [mine[i] for i in MATRICES], lr=0.1)
    give_gradients(mine, without=1)
    before = mine[1].detach().clone()
    optimizer.update()
    assert torch.equal(mine[1], before)
    others = copy.deepcopy(mine)
    again = Muon(others, [others[i] for i in MATRICES], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        give_gradients(mine)
        for p, q in zip(mine, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.update()
        again.update()
        assert all(torch.equal(p, q) for p, q in zip(mine, others, strict=True))
    assert [float(optimizer.state[p]["step"]) for p in mine] == [4, 3, 4, 4, 4, 4]


def test_an_update_after_clearing_the_state_starts_anew() -> None:
    torch.manual_seed(0)
    mine = parameters()
    optimizer = Muon(mine, [mine[i] for i in MATRICES], lr=0.1)
    for cleared in (False, False, True):
        if cleared:
            optimizer.state.clear()
        give_gradients(mine)
        optimizer.update()
    assert all(float(optimizer.state[p]["step"]) == 1 for p in mine)
    for i in MATRICES:
        torch.testing.assert_close(optimizer.state[mine[i]]["exp_avg"], (1 - MOMENTUM) * mine[i].grad)


def test_matrices_between_hidden_layers_are_updated_by_muon() -> None:
    flow = maf(5, layers=2, hidden=[16], mixing="linear", transform="spline")
    names = {id(p): name for name, p in flow.named_parameters()}
    found = {names[id(p)] for p in hidden_matrices(flow)}
    assert found == {n for n in names.values() if "blocks" in n and n.endswith("weight")}
    # linear layers of a width below 3, factors of matrices, other kernels of convolutions, and groups of channels
    convolutions = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1, groups=4))
    assert not hidden_matrices(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 8), convolutions, InvertibleLinear(4)))
    flow = glow((1, 8, 8), steps=2, hidden=[4, 4, 4])
    names = {id(p): name for name, p in flow.named_parameters()}
    found = {names[id(p)] for p in hidden_matrices(flow)}
    assert found == {n for n in names.values() if ".middle." in n and n.endswith("weight")}
    shared = nn.Linear(3, 3)
    assert hidden_matrices(nn.Sequential(shared, shared)) == [shared.weight]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "moons"}, "muon"),
        ({"data": "rings"}, "muon"),
        ({"data": "moons", "objective": "flow_matching"}, "muon"),
        ({"data": "moons", "objective": "rectified"}, "adam"),
        ({"data": "moons", "objective": "hybrid"}, "muon"),
        ({"data": "moons", "model": "realnvp"}, "adam"),
        ({"data": "array", "model": "ffjord", "data.path": "x.csv"}, "muon"),
        ({"data": "array", "model": "ffjord", "data.path": "x.csv", "objective": "hybrid"}, "muon"),
        ({"data": "array", "model": "nsf", "data.path": "x.csv"}, "auto"),
        ({"data": "mnist", "model": "ffjord"}, "adam"),
        ({"data": "target", "target": "funnel", "model": "ffjord"}, "adam"),
    ],
)
def test_default_optimizer(settings: dict[str, object], expected: str) -> None:
    assert compose(settings).config["trainer"]["optimizer"] == expected


def test_setting_chooses_the_optimizer(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(tmp_path, "model=affine", "trainer.optimizer=muon")
    assert isinstance(run.train_state.optimizer, Muon)


def test_resumes_a_state_in_which_factors_of_matrices_were_updated_by_muon(
    tmp_path: Path, trainer: MakeTrainer
) -> None:
    run = trainer(
        tmp_path, "model=nsf", "model.mixing=linear", "model.layers=2", "trainer.optimizer=muon", "trainer.steps=3"
    )
    run.fit()
    state = run.train_state.state()
    names = [name for name, _ in run.flow.named_parameters()]
    old = [i for i, name in enumerate(names) if name.endswith(("lower", "upper", "last.weight"))]
    assert old
    for i in old:
        del state["optimizer"]["state"][i]["exp_avg_sq"]
    run.train_state.load_moments(state)
    give_gradients(list(run.flow.parameters()))
    run.train_state.optimizer.update()
    steps = [int(run.train_state.optimizer.state[p]["step"]) for p in run.flow.parameters()]
    assert {i for i, step in enumerate(steps) if step == 1} == set(old)


def test_1x1_convolutions_are_updated_like_matrices() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(5, 5, bias=False), nn.Conv2d(5, 5, 1, bias=False)
    layers[1].weight.data = layers[0].weight.data.clone().view(5, 5, 1, 1)
    optimizers = [Muon([layer.weight], hidden_matrices(layer), lr=0.1) for layer in layers]
    before = layers[0].weight.detach().clone()
    for _ in range(3):
        gradient = torch.randn(5, 5)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.weight.grad = gradient.view_as(layer.weight)
            optimizer.update()
    assert not torch.equal(layers[0].weight, before)
    torch.testing.assert_close(layers[1].weight.view(5, 5), layers[0].weight)


def test_resumes_a_state_in_which_1x1_convolutions_were_updated_by_adam() -> None:
    conv = nn.Conv2d(3, 3, 1)
    mine = list(conv.parameters())
    old, new = Muon(mine, [], lr=0.1), Muon(mine, hidden_matrices(conv), lr=0.1)
    give_gradients(mine)
    old.update()
    new.load_state_dict(new.upgraded(old.state_dict()))
    give_gradients(mine)
    new.update()
    assert [float(new.state[p]["step"]) for p in mine] == [1, 2]
    assert set(new.state[conv.weight]) == {"step", "exp_avg"}
