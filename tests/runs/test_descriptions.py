"""The description of a flow in a file can build parts of flows and nothing else."""

import builtins
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flowtrain
from flowtrain import Flow, bijections
from flowtrain import nn as parts
from flowtrain.bijections import ActNorm, Chain, Continuous, HalfCoupling
from flowtrain.runs.descriptions import TORCH_MODULES, describe
from flowtrain.training import checkpoint
from flowtrain.utils.errors import CheckpointError

Node = dict[str, Any]
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 1024, "out_features": 1024}
HIDDEN = [LINEAR] * 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.set_default_dtype(torch.float32)
    network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
    mask = torch.tensor([True, False])
    coupling = bijections.IndexCoupling(mask, network)
    standardize = bijections.Standardize(2, offset=True)
    chain = Chain([ActNorm(2), Continuous(parts.MLPField(2, [4])), coupling, standardize])
    Flow((2,), chain, centered=True).save(tmp_path / "flow.pt")
    return tmp_path / "flow.pt"


def actnorm_node(flow: Node) -> Node:
    """Returns the ActNorm."""
    found: Node = flow["bijection"]["bijections"][0]
    return found


def coupling(flow: Node) -> Node:
    found: Node = flow["bijection"]["bijections"][2]
    return found


def put(place: Callable[[Node], Node], **values: Any) -> Callable[[Node], object]:
    return lambda flow: place(flow).update(values)


def flow_node(flow: Node) -> Node:
    return flow


SYSTEM = {"_target_": "os.system", "_args_": ["touch boom"]}
TARGETS = {
    "function": put(actnorm_node, _target_="os.system"),
    "builtin": put(actnorm_node, _target_="builtins.eval"),
    "flowtrain function": put(actnorm_node, _target_="flowtrain.runs.load.load", path="x"),
    "flowtrain module": put(actnorm_node, _target_="flowtrain.bijections"),
    "name imported by flowtrain": put(actnorm_node, _target_="flowtrain.bijections.base.partial"),
    "flowtrain class outside the public parts": put(actnorm_node, _target_="flowtrain.runs.run_directory.RunDirectory"),
    "data": put(actnorm_node, _target_="flowtrain.data.ArrayData", path="/etc/passwd"),
    "model": put(actnorm_node, _target_="flowtrain.models.realnvp.realnvp"),
    "private path of a part": put(actnorm_node, _target_="flowtrain.bijections.scale.ActNorm"),
    "torch function": put(actnorm_node, _target_="torch.load"),
    "torch class": put(actnorm_node, _target_="torch.nn.Bilinear"),
    "private torch path": put(actnorm_node, _target_="torch.nn.modules.linear.Linear"),
    "torch hub": put(actnorm_node, _target_="torch.hub.load"),
    "nested": put(actnorm_node, shape=SYSTEM),
    "nested in a list": put(actnorm_node, shape=[[SYSTEM]]),
    "nested in a tuple": put(actnorm_node, shape=(SYSTEM,)),
    "nested in a mapping": put(actnorm_node, shape={"a": SYSTEM}),
    "positional object": put(actnorm_node, _args_=[SYSTEM]),
    "positional argument": put(actnorm_node, _args_=[2]),
    "partial": put(actnorm_node, _partial_=True),
    "partial mapping": put(actnorm_node, _partial_={"a": 1}),
    "list as target": put(actnorm_node, _target_=["os.system"]),
    "mapping as target": put(actnorm_node, _target_={"a": "os.system"}),
    "missing target": lambda flow: actnorm_node(flow).pop("_target_"),
    "object as flow argument": lambda flow: flow.update(classes=SYSTEM),
    "part in place of the flow": put(flow_node, _target_="flowtrain.bijections.ActNorm"),
    "interpolation": put(actnorm_node, shape="${oc.env:HOME}"),
    "network in place of a bijection": put(flow_node, bijection=LINEAR),
    "object as flag": put(coupling, swap=HIDDEN),
    "object as number": put(coupling, cap=LINEAR),
    "object as torch flag": lambda flow: coupling(flow)["conditioner"]["_args_"][0].update(bias=LINEAR),
    # a flow would accept the list as a true flag and would not keep its objects, so it would still match the weights in
    # the file
    "list of objects as flag": lambda flow: flow["bijection"]["bijections"][3].update(offset=HIDDEN),
    "positional list of objects as flag": lambda flow: flow["bijection"]["bijections"].__setitem__(
        3, {"_target_": "flowtrain.bijections.Standardize", "_args_": [2, HIDDEN]}
    ),
    "device": lambda flow: coupling(flow)["conditioner"]["_args_"][0].update(device="cpu"),
    "dtype": lambda flow: coupling(flow)["conditioner"]["_args_"][0].update(dtype="torch.float64"),
    "positional torch arguments": lambda flow: coupling(flow)["conditioner"]["_args_"][0].update(_args_=[1, 4]),
    "unknown argument": put(actnorm_node, anything=1),
    "engine function as solver": lambda flow: flow["bijection"]["bijections"][1].update(
        solver={"_target_": "flowtrain.ode.torchdiffeq_engine.odeint"}
    ),
}
SIZES = {
    "width": put(actnorm_node, shape=10**9),
    "integer-valued float": put(actnorm_node, shape=1e9),
    "small width": put(actnorm_node, shape=1000),
    "shape": put(actnorm_node, shape=(10**5, 10**5)),
    "hidden": lambda flow: flow["bijection"]["bijections"][1]["field"].update(hidden=[1000, 1000]),
    "base": put(flow_node, base=(10**9,)),
    "wrong base shape": put(flow_node, base=(3,)),
    "tensor as a number": put(actnorm_node, shape=torch.tensor(10**9)),
    "tensor as numbers": put(actnorm_node, shape=torch.tensor([10**6, 10**6])),
    "wrong mask length": put(coupling, mask=torch.ones(4, dtype=torch.bool)),
    "integer as mask": put(coupling, mask=3),
    "extra part": lambda flow: flow["bijection"]["bijections"].append(
        {"_target_": "flowtrain.bijections.ActNorm", "shape": 2}
    ),
    "missing part": lambda flow: flow["bijection"]["bijections"].pop(),
    "deep": lambda flow: flow.update(bijection=nested_chain(150)),
    "very deep": lambda flow: flow.update(bijection=nested_chain(210)),
}


def nested_chain(levels: int) -> Node:
    node: Node = {"_target_": "flowtrain.bijections.ActNorm", "shape": 2}
    for _ in range(levels):
        node = {"_target_": "flowtrain.bijections.Chain", "bijections": [node]}
    return node


def change_description(path: Path, change: Callable[[Node], object]) -> None:
    content = checkpoint.load(path)
    change(content["config"]["model"]["flow"])
    torch.save({**content, "checksum": checkpoint.checksum(content)}, path)


def assert_refused(path: Path) -> None:
    before = set(path.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        flowtrain.load(path)
    assert "\n" not in str(caught.value)
    assert set(path.parent.iterdir()) == before


@pytest.mark.parametrize("name", TARGETS)
def test_loading_a_description_runs_no_code(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)

    def called(*arguments: Any, **keywords: Any) -> None:
        pytest.fail("ran code of the file")

    monkeypatch.setattr(os, "system", called)
    monkeypatch.setattr(builtins, "eval", called)
    monkeypatch.setattr(torch, "load", lambda *a, load=torch.load, **k: load(*a, **k) if a else called())
    change_description(saved, TARGETS[name])
    assert_refused(saved)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_the_weights_are_refused_without_allocation(saved: Path, name: str) -> None:
    change_description(saved, SIZES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(saved)
    # ru_maxrss is in KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_expanded_tensor_in_a_description_is_refused(saved: Path) -> None:
    content = checkpoint.load(saved)
    content["config"]["model"]["flow"]["bijection"]["bijections"][2]["mask"] = torch.zeros(1).bool().expand(10**12)
    torch.save({**content, "format": 1}, saved)
    assert_refused(saved)


def test_unchanged_description_is_accepted(saved: Path) -> None:
    """Also guards against tests that pass because the file cannot be read anyway."""
    change_description(saved, lambda flow: actnorm_node(flow).update(shape=(2,)))
    assert flowtrain.load(saved).event_shape == (2,)


EXAMPLES = [
    nn.AvgPool2d(2, stride=1, ceil_mode=True),
    nn.BatchNorm1d(3, eps=0.1, momentum=None, affine=False),
    nn.BatchNorm2d(3, track_running_stats=False),
    nn.Conv1d(2, 4, 3, stride=2, padding="valid", dilation=2, groups=2, bias=False),
    nn.Conv2d(2, 4, (3, 1), padding=(1, 0), padding_mode="circular"),
    nn.Dropout(0.3),
    nn.Dropout2d(0.3),
    nn.ELU(0.5),
    nn.Flatten(2, 3),
    nn.GELU("tanh"),
    nn.GroupNorm(2, 4, affine=False),
    nn.Hardswish(),
    nn.Identity(),
    nn.LayerNorm((2, 3), eps=0.1, bias=False),
    nn.LeakyReLU(0.3),
    nn.Linear(2, 3, bias=False),
    nn.MaxPool2d(2, dilation=2),
    nn.Mish(),
    nn.ModuleList([nn.Linear(1, 1), nn.Tanh()]),
    nn.PReLU(3),
    nn.ReLU(inplace=True),
    nn.SELU(),
    nn.Sequential(nn.Sequential(nn.Linear(1, 2)), nn.Sigmoid()),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Softplus(2.0, 10.0),
    nn.Tanh(),
    nn.Unflatten(1, (2, 3)),
]


def test_examples_cover_every_supported_torch_module() -> None:
    assert {type(module) for module in EXAMPLES} == {*TORCH_MODULES.values()}


@pytest.mark.parametrize("module", EXAMPLES, ids=lambda m: type(m).__name__)
def test_torch_modules_are_described_by_their_attributes(module: nn.Module) -> None:
    from flowtrain.runs.build import _built
    from flowtrain.runs.descriptions import check_description

    described = describe(module)
    check_description(described, (), "module")
    again = _built(described, "model")
    assert repr(again) == repr(module)
    assert {k: w.shape for k, w in again.state_dict().items()} == {k: w.shape for k, w in module.state_dict().items()}
    plain = (bool, int, float, str, tuple, type(None))
    for one, other in zip(again.modules(), module.modules(), strict=True):
        assert {k: v for k, v in vars(one).items() if isinstance(v, plain)} == {
            k: v for k, v in vars(other).items() if isinstance(v, plain)
        }


def test_torch_conditioners_are_called_without_the_label() -> None:
    network = nn.Sequential(nn.Linear(1, 2))
    x = torch.randn(4, 2)
    flow = Flow(2, HalfCoupling(2, False, network))
    a, b = x.split(1, 1)
    raw, shift = network(a).chunk(2, 1)
    scale = 2 * torch.tanh(raw / 2)
    torch.testing.assert_close(flow.inverse(x), torch.cat([a, (b - shift) * (-scale).exp()], 1))
