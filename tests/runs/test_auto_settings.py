"""Small tables: flows start at the Gaussian of the training rows, and defaults depend on the size of the table."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_tables
import torch
from helpers import Run

from flowtrain.bijections.base import Chain
from flowtrain.bijections.coupling import IndexCoupling
from flowtrain.bijections.linear import FromGaussian, Preconditioned, gaussian_log_prob, shrunk_covariance
from flowtrain.bijections.scale import Standardize
from flowtrain.cli.config_files import compose_defaults
from flowtrain.flow import Flow
from flowtrain.models.affine import affine
from flowtrain.models.ffjord import ffjord
from flowtrain.models.glow import glow
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.models.realnvp import realnvp
from flowtrain.nn.conditioners import MLP
from flowtrain.ode import ode_solver
from flowtrain.runs import auto_settings
from flowtrain.runs.load import load
from flowtrain.runs.run import train
from flowtrain.training import checkpoint
from flowtrain.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("without_figures")

D = 4
MODELS = {
    "affine": lambda: affine((D,)),
    "realnvp": lambda: realnvp((D,), mixing="permutation", dropout=0.2, input_bound=3.0),
    "batch_norm": lambda: realnvp((D,), batch_norm=True),
    "glow": lambda: glow((D,), steps=3),
    "nsf": lambda: nsf((D,), dropout=0.2, input_bound=3.0),
    "maf": lambda: maf((D,), mixing="linear"),
    "maf spline": lambda: maf((D,), transform="spline", passes=2),
    "ffjord": lambda: ffjord((D,), solver=ode_solver("dopri5"), hidden=[16]),
}


def correlated(rows: int) -> torch.Tensor:
    mixing = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.4, 0, 0], [0, 30.0, 1, 0], [0.1, 0, 0, 2]])
    return torch.randn(rows, D) @ mixing.T + torch.tensor([5.0, 0, -100, 1])


@pytest.mark.parametrize("name", MODELS)
def test_initialized_flow_equals_the_training_gaussian(name: str) -> None:
    x, fresh = correlated(12), correlated(50)
    flow = MODELS[name]()
    standardize = Standardize((D,))
    standardize.fit(x.mean(0), x.std(0, correction=0))
    start = Preconditioned if flow.ode_blocks else FromGaussian
    flow.bijection = Chain([start(flow.bijection, D), standardize])
    flow.bijection.initialize(x)
    flow.eval()
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(fresh), gaussian_log_prob(fresh, *shrunk_covariance(x)))
        torch.testing.assert_close(flow.forward(flow.inverse(fresh)), fresh)


def flow_with_large_weights(**settings: Any) -> Flow:
    """Returns a flow of 16 couplings whose networks have large random weights, as can happen in training."""
    flow = realnvp((6,), layers=16, hidden=[32], mixing="permutation", **settings)
    generator = torch.Generator().manual_seed(1)
    for module in flow.modules():
        if isinstance(module, MLP):
            for layer in module:
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5
    return flow.eval()


def curvature(flow: Flow, r: float) -> float:
    """Returns the largest -log p / r^2 at distance r from the origin along random rays, 1/2 for a standard normal."""
    rays = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return (-flow.log_prob(r * rays / rays.norm(dim=1, keepdim=True)) / r**2).max().item()


def test_bounded_couplings_limit_nll_growth_along_rays() -> None:
    bounded, unbounded = flow_with_large_weights(input_bound=3.0, cap=0.5), flow_with_large_weights()
    assert curvature(bounded, 1e6) < 1.5 * curvature(bounded, 1e3)
    # at most a factor exp(2 x 0.5) per coupling, and half of the 16 couplings change an element
    assert curvature(bounded, 1e6) < math.exp(2 * 0.5 * 8)
    assert curvature(unbounded, 1e6) > 1e3 * curvature(bounded, 1e6)


def test_bounded_couplings_have_exact_inverse_and_log_det() -> None:
    mask = torch.tensor([True, False, True, False, False])
    coupling = IndexCoupling(mask, MLP(2, [16], 6, "tanh"), input_bound=2.0)
    for parameter in coupling.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    z = torch.cat([torch.randn(5, 5), 100 * torch.randn(5, 5)])
    x, log_det = coupling(z)
    torch.testing.assert_close(coupling.inverse(x)[0], z)
    for row, value in zip(z, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: coupling(v.unsqueeze(0))[0][0], row)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(value.item(), abs=1e-9)


# defaults


def composed(*overrides: str) -> dict[str, Any]:
    return compose_defaults(["data=array", "data.path=x.npy", *overrides])


SHAPES = [(12, (3,)), (700, (3,)), (3000, (3,)), (9000, (3,)), (3000, (1, 8, 8))]
CASES = [
    (model, rows, shape)
    for model in ("affine", "realnvp", "glow", "nsf", "maf", "ffjord")
    for rows, shape in SHAPES
    if len(shape) == 1 or model not in ("nsf", "maf")
]


@pytest.mark.parametrize(("model", "rows", "shape"), CASES)
def test_every_auto_value_is_resolved(model: str, rows: int, shape: tuple[int, ...]) -> None:
    config = auto_settings.resolve_auto(composed(f"model={model}"), rows, shape)
    automatic = {k for g in ("model", "trainer") for k, v in config[g].items() if v == "auto"}
    # tests/models/test_heavy_tails.py tests `df`
    assert automatic <= {"trace", "eval_trace", "df"}


def test_networks_grow_with_the_number_of_rows() -> None:
    sizes = []
    for rows in (16, 120, 1600, 8000):
        model = auto_settings.resolve_auto(composed("model=realnvp"), rows, (8,))["model"]
        keys = {k: v for k, v in model.items() if k not in ("name", "_target_", "df")}
        sizes.append(sum(p.numel() for p in realnvp((8,), **keys).parameters()))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[0]


def test_array_images_get_a_small_model() -> None:
    model = auto_settings.resolve_auto(composed("model=realnvp"), 3000, (1, 8, 8))["model"]
    keys = {k: v for k, v in model.items() if k not in ("name", "_target_", "df")}
    assert sum(p.numel() for p in realnvp((1, 8, 8), **keys).parameters()) < 300_000


def test_only_glow_is_trained_by_muon_on_images() -> None:
    """Its networks have square 1x1 convolutions."""

    def optimizer(model: str) -> str:
        found: str = auto_settings.resolve_auto(composed(f"model={model}"), 3000, (1, 8, 8))["trainer"]["optimizer"]
        return found

    assert optimizer("glow") == "muon"
    assert optimizer("realnvp") == "adam"


def test_given_values_are_kept_and_unresolvable_auto_is_refused() -> None:
    config = auto_settings.resolve_auto(composed("model=realnvp", "model.layers=3", "trainer.lr=0.5"), 50, (4,))
    assert (config["model"]["layers"], config["trainer"]["lr"]) == (3, 0.5)
    with pytest.raises(ConfigError, match="log_every"):
        auto_settings.resolve_auto(composed("model=realnvp", "trainer.log_every=auto"), 50, (4,))


def test_checkpoints_contain_the_resolved_values(run: Run, tmp_path: Path) -> None:
    np.save("t.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    code, _, err = run(
        "flowtrain", "model=realnvp", "data=array", "data.path=t.npy", "trainer.steps=20", "hydra.run.dir=r"
    )
    assert code == 0, err
    config = checkpoint.load(Path("r/checkpoints/best.pt"))["config"]
    assert config["trainer"]["batch_size"] == 48
    assert isinstance(config["model"]["layers"], int)
    code, _, err = run("flowtrain", "resume=r", "trainer.steps=30")
    assert code == 0, err


@pytest.mark.parametrize(
    ("model", "kind", "rows", "columns"),
    [
        ("realnvp", "heavy", 20, 5),
        ("glow", "correlated", 60, 12),
        ("nsf", "heavy", 20, 5),
        ("maf", "correlated", 60, 12),
    ],
)
def test_default_models_are_not_worse_than_the_gaussian(
    float32: None, model: str, kind: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = small_tables.measure(model, kind, rows, columns, 0, "trainer.plot_every=null")
    assert not result.fails, result


@pytest.mark.slow
def test_outlying_row_does_not_destroy_the_likelihood(float32: None, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator) / 4 + torch.eye(16)
    z = torch.randn(1200, 16, generator=generator)
    chi2 = torch.randn(1200, 3, generator=generator).square().sum(1, keepdim=True)
    x = z @ mixing.T
    heavy = x[:, :1] * (3 / chi2).sqrt()
    x = torch.cat([heavy, x[:, 1:] + 0.5 * heavy], 1)
    np.save(tmp_path / "t.npy", x[:1000].numpy())
    (tmp_path / "r").mkdir()
    config = compose_defaults(
        ["model=realnvp", "data=array", f"data.path={tmp_path}/t.npy", "trainer.steps=150", "trainer.plot_every=null"]
    )
    config.pop("trust")
    train(config, tmp_path / "r")
    moved = x[1000:]
    moved[:, 0] += 5 * x[:1000, 0].std()
    with torch.no_grad():
        assert load(tmp_path / "r").log_prob(moved).min() > -1500


def test_dropout_depends_on_the_rows_per_column() -> None:
    def dropout(model: str, rows: int, columns: int) -> float:
        found = auto_settings.resolve_auto(composed(f"model={model}"), rows, (columns,))["model"]["dropout"]
        return float(found)

    for model in ("nsf", "maf", "realnvp"):
        assert dropout(model, 8000, 60) > dropout(model, 8000, 6) == 0
    assert 0 == dropout("maf", 8000, 20) < dropout("nsf", 8000, 20) < dropout("nsf", 8000, 60)


def test_large_tables_are_trained_by_muon() -> None:
    def optimizer(model: str, rows: int, columns: int) -> str:
        found = auto_settings.resolve_auto(composed(f"model={model}"), rows, (columns,))["trainer"]["optimizer"]
        return str(found)

    for model in ("nsf", "maf", "realnvp", "glow"):
        assert optimizer(model, 20_000, 5) == optimizer(model, 3000, 40) == "muon"
        assert optimizer(model, 3000, 5) == "adam"
    assert optimizer("affine", 20_000, 5) == "adam"


def test_tables_of_one_or_two_columns_get_more_bins() -> None:
    bins = {d: auto_settings.resolve_auto(composed("model=nsf"), 3000, (d,))["model"]["bins"] for d in (1, 2, 6, 60)}
    assert bins[1] == bins[2] > bins[6] > bins[60]
