"""Path integrals: values and gradients against quadrature in float64, and what they may change in training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Run
from torch import Tensor, nn

from flowtrain.bijections.base import Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.regularizers import PATHS, Regularizer, acceleration, integrands, spectral
from flowtrain.cli.config_files import compose_defaults
from flowtrain.flow import Flow
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import Probes, TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.objectives.likelihood import Likelihood
from flowtrain.ode import SolveOptions, Solver, ode_solver
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.training import checkpoint
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError

ALL = Regularizer(kinetic=1.0, jacobian=1.0, acceleration=1.0)
NORM = {"jacobian": PATHS["jacobian"]}


class Rotating(nn.Module):
    """v = (A + t B) x, whose integrands have closed forms and whose acceleration has a dv/dt term."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.3, -0.9], [0.8, 0.1]]))
        self.b = nn.Parameter(torch.tensor([[-0.4, 0.2], [0.5, 0.6]]))

    def matrix(self, t: Tensor) -> Tensor:
        return self.a + t.reshape(-1, 1, 1) * self.b

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (self.matrix(t) @ x.unsqueeze(-1)).squeeze(-1)


def by_quadrature(field: Rotating, x1: Tensor) -> Tensor:
    """Returns the mean over rows of each path integral (3,), from 200 midpoints of fine RK4 steps from t = 1 to 0."""
    n, x, totals = 200, x1, torch.zeros(3)
    h = torch.tensor(1 / n)

    def rk4(t: Tensor, x: Tensor, h: Tensor) -> Tensor:
        k1 = field(t, x)
        k2 = field(t + h / 2, x + h / 2 * k1)
        k3 = field(t + h / 2, x + h / 2 * k2)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(t + h, x + h * k3))

    for i in range(n):
        t = 1 - i * h
        middle, at = rk4(t, x, -h / 2), t - h / 2
        m = field.matrix(at)[0]
        v = middle @ m.T
        a = middle @ field.b.T + v @ m.T
        terms = [v.square().sum(1).mean(), m.square().sum(), a.square().sum(1).mean()]
        totals = totals + h * torch.stack(terms)
        x = rk4(t, x, -h)
    return totals


def flow_of(field: nn.Module, solver: Solver, rule: TraceRule | None = None, **weights: float) -> Likelihood:
    continuous = Continuous(field, solver, rule or TraceRule("exact", "exact"))
    return Likelihood(Flow((2,), continuous), Regularizer(**weights)).train()


@pytest.mark.parametrize("gradient", ["direct", "replay"])
@pytest.mark.parametrize("control", ["state", "all"])
def test_value_and_gradient_match_quadrature(gradient: str, control: str) -> None:
    x = torch.randn(5, 2)
    weights = {"kinetic": 0.7, "jacobian": 1.3, "acceleration": 0.4}
    field = Rotating()
    objective = flow_of(field, ode_solver("dopri5", gradient, rtol=1e-9, control=control), **weights)
    loss, terms = objective(x)
    expected = by_quadrature(field, x)
    found = torch.stack([terms[name] for name in PATHS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    penalty = sum(w * terms[name] for name, w in weights.items())
    torch.testing.assert_close(loss, terms["nll"] + penalty)
    parameters = [field.a, field.b]
    gradients = torch.autograd.grad(penalty, parameters)
    exact = torch.autograd.grad(sum(w * e for w, e in zip(weights.values(), expected, strict=True)), parameters)
    for a, b in zip(gradients, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_path_integrals_do_not_change_the_likelihood() -> None:
    field, x = Rotating(), torch.randn(5, 2)
    plain, regular = (
        flow_of(field, ode_solver("dopri5", rtol=1e-6), **weights)(x)[1]["nll"] for weights in ({}, {"kinetic": 1.0})
    )
    assert torch.equal(plain, regular)


def mlp() -> tuple[nn.Module, Tensor]:
    return MLPField(3, [6, 5], "concatsquash", "tanh"), torch.randn(4, 3)


def conv() -> tuple[nn.Module, Tensor]:
    return ConvField(1, [3], "concat", "softplus", size=(2, 3)), torch.randn(4, 1, 2, 3)


def plain() -> tuple[nn.Module, Tensor]:
    return Rotating(), torch.randn(4, 2)


@pytest.mark.parametrize("make", [mlp, conv, plain])
def test_integrands_match_autograd(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    field, x = make()
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    event_dims, h = x.dim() - 1, 1e-5
    t = torch.tensor([0.2, 0.7]).view(2, 1)
    nodes = torch.stack([x, 0.5 * x])
    v, q = integrands(field, t, nodes, Probes.exact(x), PATHS)
    for i in range(2):
        for row in range(len(x)):
            one = nodes[i, row]
            velocity = lambda y, i=i: field(t[i], y.unsqueeze(0)).squeeze(0)  # noqa: E731
            jacobian = torch.autograd.functional.jacobian(velocity, one).reshape(one.numel(), -1)
            at = velocity(one)
            ahead, behind = (field(t[i] + s * h, (one + s * h * at).unsqueeze(0)).squeeze(0) for s in (1, -1))
            expected = [
                jacobian.trace(),
                at.square().sum(),
                jacobian.square().sum(),
                ((ahead - behind) / (2 * h)).square().sum(),
            ]
            torch.testing.assert_close(q[i, row], torch.stack(expected), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(v[i, row], at)
    assert acceleration(field, t, nodes, v, event_dims).shape == nodes.shape


def test_the_jacobian_norm_is_estimated_without_bias() -> None:
    field, x = mlp()
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    rows = x[:1].expand(20_000, 3)
    t = torch.tensor(0.4)
    exact = integrands(field, t, rows[:1], Probes.exact(rows[:1]), NORM)[1][0, 1]
    found = integrands(field, t, rows, Probes.hutchinson(rows, "rademacher", 2), NORM)[1][:, 1]
    assert found.std() > 0.05 * exact
    assert abs(found.mean() - exact) < 4 * found.std() / len(rows) ** 0.5


def test_spectral_is_the_sum_of_squared_norms() -> None:
    field, _ = conv()
    found = spectral(field)
    norms = [np.linalg.svd(p.detach().flatten(1).numpy())[1][0] for p in field.parameters() if p.dim() > 1]
    assert found.item() == pytest.approx(sum(n**2 for n in norms))
    found.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in field.parameters() if p.dim() > 1)


def test_end_time_is_random_only_in_training() -> None:
    ends: list[float] = []
    objective = flow_of(Rotating(), ode_solver("dopri5", rtol=1e-5), end_time=0.5)
    continuous = objective.flow.ode_blocks[0]
    solve = continuous.solve
    continuous.solve = lambda x, t0, *rest: (ends.append(t0), solve(x, t0, *rest))[1]  # type: ignore[method-assign]
    x = torch.randn(3, 2)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        objective(x)
    assert ends[0] == ends[1] != ends[2]
    assert all(0.5 <= end <= 1.5 for end in ends)
    objective.eval()(x)
    assert ends[3] == 1


def test_path_integrals_are_evaluated_only_if_the_options_ask_for_them() -> None:
    objective = flow_of(Rotating(), ode_solver("dopri5", rtol=1e-5), kinetic=1.0)
    x = torch.randn(3, 2)
    assert objective.flow.ode_blocks[0].solve(x, 1.0, 0.0).integrals.shape == (3, 1)  # type: ignore[union-attr]
    assert objective.flow.density_pass(x).integrals == ()
    (paths,) = objective.flow.density_pass(x, None, objective.regularizer.options(SolveOptions())).integrals
    assert paths.shape == (3, 1)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"kinetic": -1.0}, "regularizer.kinetic=-1"),
        ({"jacobian": "much"}, "regularizer.jacobian=much"),
        ({"end_time": 1.0}, "regularizer.end_time=1"),
    ],
)
def test_invalid_weights_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Regularizer(**weights)


def test_flow_without_ode_has_no_path_integrals(run: Run) -> None:
    with pytest.raises(ConfigError, match="no paths to regularize"):
        Likelihood(Flow((2,), Chain([Affine(2)])), Regularizer(kinetic=1.0))
    code, _, err = run("flowtrain", "model=realnvp", "regularizer=rnode", "trainer.steps=1")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "no paths to regularize" in err


def test_terms_are_logged_and_resume_is_exact(tmp_path: Path, stop_at: Callable[..., None]) -> None:
    torch.set_default_dtype(torch.float32)
    small = ["trainer.steps=4", "trainer.log_every=1", "trainer.batch_size=16", "data.n_val=20", "model.hidden=[4]"]
    weights = ["regularizer=rnode", "regularizer.acceleration=0.1", "regularizer.spectral=0.1"]
    config = compose_defaults([*small, *weights, "regularizer.end_time=0.2", "trainer.val_every=2"])

    def trained(name: str, stop: int | None = None) -> Trainer:
        torch.manual_seed(0)
        data = build_data(config)
        flow = build_flow(config, data.samples)
        saved = checkpoint.load(tmp_path / name / "checkpoints/last.pt") if (tmp_path / name).exists() else None
        settings, run_dir = build_settings(config), tmp_path / name
        trainer = Trainer(build_objective(config, flow), flow, data, settings, run_dir, config, saved)
        if stop:
            stop_at(trainer, stop)
        trainer.fit()
        return trainer

    whole = trained("whole")
    trained("parts", stop=2)
    for name, value in trained("parts").flow.state_dict().items():
        assert torch.equal(whole.flow.state_dict()[name], value), name
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["split"] == "train"):
        assert all(row[name] >= 0 for name in (*PATHS, "spectral"))


def test_every_regularizer_config_composes() -> None:
    for name in ("none", "rnode", "steer"):
        assert compose_defaults([f"regularizer={name}"])["regularizer"]["name"] == name
