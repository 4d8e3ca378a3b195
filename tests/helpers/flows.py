"""Bijections and flows of every model family with random parameters, which parametrized tests need at import time."""

import torch

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.continuous import Continuous
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.flow import Flow
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.ode import Solver, ode_solver
from flowtrain.runs.build import build_flow

VECTORS = {
    "ffjord": ["model=ffjord", "model.hidden=[8,8]"],
    "two ffjords": ["model=ffjord", "model.hidden=[8]", "model.flows=2"],
    "realnvp": ["model=realnvp", "model.layers=3", "model.hidden=[8]"],
    "permuted": ["model=realnvp", "model.layers=2", "model.hidden=[8]", "model.mixing=permutation"],
    "glow": ["model=glow", "model.steps=2", "model.hidden=[8]"],
    "nsf": ["model=nsf", "model.layers=2", "model.hidden=[8]", "model.bins=4"],
    "maf": ["model=maf", "model.layers=2", "model.hidden=[8]"],
    "spline maf": ["model=maf", "model.layers=2", "model.hidden=[8]", "model.transform=spline", "model.bins=4"],
    "affine": ["model=affine"],
}
IMAGES = {
    "ffjord": ["model=ffjord", "model.hidden=[4]", "model.scales=1"],
    "realnvp": ["model=realnvp", "model.hidden=[4]", "model.layers=1", "model.scales=1"],
    "glow": ["model=glow", "model.hidden=[4]", "model.steps=2", "model.scales=1"],
}
# the smallest image models, for runs of a few steps
IMAGE_MODELS = {
    "realnvp": ["model=realnvp", "model.hidden=[4]", "model.layers=1"],
    "realnvp batchnorm": ["model=realnvp", "model.hidden=[4]", "model.layers=1", "model.batch_norm=true"],
    "glow": ["model=glow", "model.hidden=[4]", "model.steps=1", "model.scales=1"],
    "ffjord": ["model=ffjord", "model.hidden=[4]", "solver.rtol=1e-3"],
    "affine": ["model=affine"],
}


def perturbed(module: Bijection, std: float = 0.4) -> Bijection:
    """Sets random parameters. A new bijection may be the identity, which hides mistakes."""
    for p in module.parameters():
        with torch.no_grad():
            p.add_(std * torch.randn_like(p))
    return module


def continuous(d: int, solver: Solver | None = None, **rule: object) -> Continuous:
    field = MLPField(d, [8, 8], "concatsquash", "tanh")
    perturbed(field, 0.5)  # type: ignore[arg-type]
    return Continuous(field, solver or ode_solver("dopri5", rtol=1e-9), TraceRule(**rule))  # type: ignore[arg-type]


def flow_of(overrides: list[str], samples: Samples, solver: list[str]) -> Flow:
    config = compose_defaults([*overrides, *solver])
    flow = build_flow(config, samples)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow.eval()


TIGHT = ["solver.rtol=1e-9"]


def vectors(name: str, standardized: bool = True, classes: int | None = None, solver: list[str] = TIGHT) -> Flow:
    conditional = [] if classes is None else ["model.conditional=true"]
    samples = Samples((2,), standardized=standardized, classes=classes)
    flow = flow_of([*VECTORS[name], *conditional], samples, solver)
    if standardized:
        state = flow.state_dict()
        state |= {k: torch.tensor([2.0, 0.5]) for k in state if k.endswith(".std")}
        state |= {k: torch.tensor([1.0, -3.0]) for k in state if k.endswith(".mean") and "bijections.1" in k}
        flow.load_state_dict(state)
    return flow


def images(name: str) -> Flow:
    return flow_of(IMAGES[name], Samples((1, 4, 4), integer_valued=True, levels=16), TIGHT)
