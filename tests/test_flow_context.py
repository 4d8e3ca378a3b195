"""Flows p(x | context) with context columns: scoring, sampling, data frames, files and models."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowtrain
from flowtrain.bijections.base import Bijection
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.data.context import ContextColumn
from flowtrain.flow import Flow, Record
from flowtrain.models.ensemble import Ensemble
from flowtrain.runs.build import build_flow
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

MASS = ContextColumn("mass", mean=2.0, std=0.5)
COLOUR = ContextColumn("colour", "categorical", categories=("blue", "red"))


class Shift(Bijection):
    """x = z + W h for features h."""

    def __init__(self, d: int, size: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(size * d, dtype=torch.float64).view(size, d))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return z + context.to(z) @ self.w.to(z), z.new_zeros(len(z))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return x - context.to(x) @ self.w.to(x), x.new_zeros(len(x))


def shifted() -> Flow:
    return Flow((2,), Shift(2, 3), context=(MASS, COLOUR)).eval()


def expected(x: Tensor, mass: Tensor, code: Tensor) -> Tensor:
    w = torch.arange(6, dtype=torch.float64).view(3, 2)
    z = x.double() - ((mass - 2) / 0.5).unsqueeze(1) * w[0] - w[1 + code.long()]
    return -0.5 * z.square().sum(1) - math.log(2 * math.pi)


def test_density_uses_standardised_and_one_hot_features() -> None:
    flow, x = shifted(), torch.randn(5, 2)
    c = torch.stack([2 + torch.randn(5), torch.tensor([0.0, 1, 1, 0, 1])], 1)
    torch.testing.assert_close(flow.log_prob(x, c).double(), expected(x, c[:, 0], c[:, 1]))
    torch.testing.assert_close(flow.log_prob(x, context=c), flow.log_prob(x, c))
    one = flow.log_prob(x, {"mass": 2.5, "colour": "red"})
    torch.testing.assert_close(one.double(), expected(x, torch.full((5,), 2.5), torch.ones(5)))
    found = flow.log_prob(x.numpy(), {"mass": 2.5, "colour": "red"})
    np.testing.assert_allclose(found, one.detach())


def test_map_and_samples_use_the_context() -> None:
    flow, z = shifted(), torch.randn(4, 2)
    c = {"mass": [2, 2.5, 3, 1], "colour": ["red", "blue", "red", "red"]}
    torch.testing.assert_close(flow.inverse(flow(z, c), c), z)
    x = flow.sample(4000, context={"mass": 3.0, "colour": "red"})
    torch.testing.assert_close(x.mean(0), torch.tensor([4.0, 5.0]) + 2 * torch.tensor([0.0, 1.0]), atol=0.1, rtol=0)
    assert flow.rsample(3, {k: v[:3] for k, v in c.items()}).shape == (3, 2)
    p = flow.distribution({"mass": 3.0, "colour": "red"})
    torch.testing.assert_close(p.log_prob(x[:3]), flow.log_prob(x[:3], {"mass": 3.0, "colour": "red"}))
    torch.manual_seed(0)
    whole = flow.sample(10, context={"mass": 3.0, "colour": "red"})
    torch.manual_seed(0)
    torch.testing.assert_close(flow.sample(10, chunk=3, context={"mass": 3.0, "colour": "red"}), whole)


class Frame:
    def __init__(self, **columns: list[Any]) -> None:
        self.data, self.columns = columns, list(columns)

    def __getitem__(self, names: Any) -> Any:
        if isinstance(names, str):
            return np.array(self.data[names])
        return Frame(**{name: self.data[name] for name in names})

    def to_numpy(self) -> np.ndarray:
        return np.column_stack([np.array(v, dtype=object) for v in self.data.values()])


def test_vmap_over_contexts_checks_every_lane() -> None:
    flow, x = shifted(), torch.randn(4, 2)
    context = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 1.0], [2.5, 0.0]], dtype=torch.float64)

    def one(row: Tensor, c: Tensor) -> Tensor:
        return flow.log_prob(row.unsqueeze(0), c.unsqueeze(0))[0]

    torch.testing.assert_close(torch.func.vmap(one)(x, context), flow.log_prob(x, context))
    for row, column, value, name in ((2, 0, math.nan, "mass"), (1, 1, 2.0, "colour")):
        bad = context.clone()
        bad[row, column] = value
        for given in (bad, bad.clone().requires_grad_()):
            with pytest.raises(DataError, match=name):
                torch.func.vmap(one)(x, given)
            with pytest.raises(DataError, match=name):
                flow.log_prob(x, given)


def test_gradients_flow_to_a_context_given_by_names() -> None:
    flow, x = shifted(), torch.randn(4, 2)
    mass, colour = torch.rand(4, dtype=torch.float64, requires_grad=True), torch.zeros(4)
    (found,) = torch.autograd.grad(flow.log_prob(x, {"mass": mass, "colour": colour}).sum(), mass)
    (wanted,) = torch.autograd.grad(flow.log_prob(x, torch.stack([mass, colour], 1)).sum(), mass)
    torch.testing.assert_close(found, wanted)
    assert found.abs().sum() > 0
    with pytest.raises(DataError, match="complex"):
        flow.log_prob(x, torch.zeros(4, 2, dtype=torch.complex64))


@pytest.mark.parametrize("recorded", [True, False])
def test_context_is_read_from_a_data_frame(recorded: bool) -> None:
    flow = shifted()
    if recorded:
        flow.record = Record({}, Samples((2,), columns=("a", "b"), context=(MASS, COLOUR)))
    frame = Frame(mass=[2.0, 3.0], a=[0.5, 1], colour=["red", "blue"], b=[1.5, 2])
    x = torch.tensor([[0.5, 1.5], [1, 2]])
    wanted = expected(x, torch.tensor([2.0, 3.0]), torch.tensor([1, 0]))
    np.testing.assert_allclose(flow.log_prob(frame), wanted, rtol=1e-6)
    np.testing.assert_allclose(flow.log_prob(x.numpy(), frame), wanted, rtol=1e-6)


def test_missing_and_unexpected_contexts_are_refused() -> None:
    flow, x = shifted(), torch.zeros(3, 2)
    for call in (flow.log_prob, flow.inverse, flow.forward):
        with pytest.raises(FlowtrainError, match="mass, colour"):
            call(x)
    with pytest.raises(FlowtrainError, match="mass, colour"):
        flow.sample(3)
    with pytest.raises(FlowtrainError, match="context"):
        flow.log_prob(x, torch.zeros(3, 2), label=1)
    with pytest.raises(DataError, match="colour"):
        flow.sample(2, context={"mass": 1.0})
    unconditional = flowtrain.models.affine(2)
    with pytest.raises(FlowtrainError, match="context"):
        unconditional.log_prob(x, torch.zeros(3, 1))
    with pytest.raises(FlowtrainError, match="classes"):
        Flow((2,), Shift(2, 3), classes=2, context=1)


def test_flow_with_context_is_saved_and_loaded(tmp_path: Path) -> None:
    flow = conditional("nsf", "model.layers=2", "model.hidden=[8]", "recipe=none").eval()
    x, c = torch.randn(6, 3), torch.rand(6, 2).round()
    flow.save(tmp_path / "f.pt")
    again = flowtrain.load(tmp_path / "f.pt")
    assert isinstance(again, Flow)
    assert (again.context, again.classes) == (flow.context, None)
    torch.testing.assert_close(again.log_prob(x, c), flow.log_prob(x, c))
    ensemble = Ensemble([flow, again])
    torch.testing.assert_close(ensemble.log_prob(x, c), flow.log_prob(x, c))
    assert ensemble.sample(6, context=c).shape == (6, 3)
    ensemble.save(tmp_path / "e.pt")
    torch.testing.assert_close(flowtrain.load(tmp_path / "e.pt").log_prob(x, c), flow.log_prob(x, c))


def conditional(name: str, *overrides: str, d: int = 3) -> Flow:
    """Builds the model of a config for data with a real and a categorical context, with random weights."""
    config = compose_defaults([f"model={name}", "data=array", "solver.rtol=1e-9", *overrides])
    samples = Samples((d,), context=(MASS, COLOUR), standardized=True, gaussian_start=True)
    flow = build_flow(config, samples)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


MODELS = {
    "realnvp": ("model.layers=3", "model.hidden=[8]"),
    "glow": ("model.steps=2", "model.hidden=[8]"),
    "nsf": ("model.layers=2", "model.hidden=[8]"),
    "maf": ("model.layers=2", "model.hidden=[8]"),
    "ffjord": ("model.hidden=[8]",),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_context_are_densities(name: str) -> None:
    """The Jacobian of the inverse gives the log-determinant, and the density depends on every context column."""
    flow = conditional(name, *MODELS[name], "recipe=none").double().eval()
    x, c = torch.randn(3, 3), torch.tensor([[2.0, 0.0], [2.5, 1.0], [3.0, 0.0]])
    torch.testing.assert_close(flow(flow.inverse(x, c), c), x, rtol=1e-6, atol=1e-6)
    log_p = flow.log_prob(x, c)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda y, i=i: flow.inverse(y, c[i : i + 1])[0], x[i : i + 1])
        z = flow.inverse(x[i : i + 1], c[i : i + 1])
        wanted = flow.base_log_prob(z) + torch.linalg.slogdet(jacobian.squeeze(1)).logabsdet
        torch.testing.assert_close(log_p[i : i + 1], wanted, rtol=1e-5, atol=1e-5)
    for changed in (c + torch.tensor([0.3, 0.0]), torch.stack([c[:, 0], 1 - c[:, 1]], 1)):
        assert bool(((flow.log_prob(x, changed) - log_p).abs() > 1e-4).all())


def unconditional_model(event_shape: int | tuple[int, ...]) -> Flow:
    """A user's model without the arguments for a context."""
    return flowtrain.models.affine(event_shape)


def test_model_that_cannot_be_conditional_is_refused() -> None:
    config = compose_defaults(["model=affine", "data=array"])
    config["model"] = {"name": "mine", "_target_": f"{__name__}.unconditional_model"}
    with pytest.raises(ConfigError, match="context"):
        build_flow(config, Samples((2,), context=(MASS,)))
