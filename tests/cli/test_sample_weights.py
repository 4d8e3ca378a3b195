"""`flowsample` for runs on a target: log weights, resampling, pictures and refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, Run
from helpers.figures import skip_figures
from helpers.files import gif_of
from torch.distributions import Normal

from flowtrain.bijections.linear import Affine
from flowtrain.cli.sample_weights import draw_weighted
from flowtrain.data.targets.base import FunctionTarget
from flowtrain.evaluation.log_weights import weighted_samples
from flowtrain.flow import Flow
from flowtrain.plotting import animation, transport_pictures
from flowtrain.runs.load import load
from flowtrain.utils.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("float32")

MODULE = """
from torch.distributions import Normal

def log_density(x):
    return Normal(0.5, 0.7).log_prob(x).sum(1) + 3
"""


@pytest.fixture
def trained(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on a target of two columns in the directory r, without figures."""
    (tmp_path / "mydensity25.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    target = ["target=custom", "target._target_=mydensity25.log_density", "target.dim=2", "model=affine"]
    with pytest.MonkeyPatch.context() as patched:
        skip_figures(patched)
        code, _, err = run("flowtrain", *SMALL, *target, "hydra.run.dir=r")
    assert code == 0, err
    return tmp_path


def sample(run: Run, *arguments: str) -> str:
    code, out, err = run("flowsample", "r", "trust=[mydensity25]", *arguments)
    assert code == 0, err
    return out


def test_log_weights_are_written_beside_the_same_samples(run: Run, trained: Path) -> None:
    sample(run, "n=300", "seed=4", "out=plain.npy")
    out = sample(run, "n=300", "seed=4", "weights=true", "out=x.npy")
    assert "x_log_weights.npy" in out
    x, log_w = np.load("x.npy"), np.load("x_log_weights.npy")
    np.testing.assert_array_equal(x, np.load("plain.npy"))
    assert np.exp(log_w).sum() == pytest.approx(1)
    flow = load("r", trust=["mydensity25"])
    target = FunctionTarget(lambda x: Normal(0.5, 0.7).log_prob(x).sum(1) + 3, 2)
    drawn = weighted_samples(flow, target, 300, 4)
    np.testing.assert_allclose(log_w, drawn.log_w - drawn.log_w.logsumexp(0), atol=1e-6)
    # log q from the inverse pass
    log_q = flow.log_prob(torch.from_numpy(x)).detach().double()
    other = target(torch.from_numpy(x)).double() - log_q
    np.testing.assert_allclose(log_w, other - other.logsumexp(0), atol=1e-4)


def test_tables_have_a_column_of_log_weights(run: Run, trained: Path) -> None:
    sample(run, "n=50", "weights=true", "out=x.csv")
    assert Path("x.csv").read_text().splitlines()[0] == "x1,x2,log_weight"
    table = np.loadtxt("x.csv", delimiter=",", skiprows=1)
    assert np.exp(table[:, 2]).sum() == pytest.approx(1)
    assert not list(trained.glob("*_log_weights*"))


def test_resampled_samples_are_some_of_the_samples(run: Run, trained: Path) -> None:
    sample(run, "n=200", "out=x.npy")
    out = sample(run, "n=200", "resample=true", "out=y.npy")
    assert "Pareto k" in out
    drawn, resampled = ({tuple(row) for row in np.load(name)} for name in ("x.npy", "y.npy"))
    assert resampled < drawn
    assert Path("y.png").exists()


def test_booleans_are_not_taken_as_weights_of_an_ensemble(run: Run, trained: Path) -> None:
    sample(run, "n=20", "weights=false", "out=x.npy")
    assert not list(trained.glob("*_log_weights*"))
    code, _, err = run("flowsample", "r", "trust=[mydensity25]", "weights=equal")
    assert (code, "single run" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["weights=true", "resample=true"], "resample=true"),
        (["weights=true", "temperature=0.5"], "temperature"),
        (["resample=true", "temperature=0.5"], "temperature"),
        (["resample=true", "animate=true"], "animate"),
        (["resample=1.5"], "resample"),
        (["quality=[1,2]"], "floweval"),
    ],
)
def test_invalid_options_are_refused(run: Run, trained: Path, arguments: list[str], names: str) -> None:
    before = set(trained.rglob("*"))
    code, out, err = run("flowsample", "r", "trust=[mydensity25]", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert names in err
    assert {path for path in trained.rglob("*") if "__pycache__" not in str(path)} <= before


def test_runs_on_data_refuse_weights_and_resample(run: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        skip_figures(patched)
        assert run("flowtrain", *SMALL, "model=affine", "hydra.run.dir=r")[0] == 0
    for option in ("weights=true", "resample=true"):
        code, out, err = run("flowsample", "r", option)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert option in err
    assert not Path("r/samples.npy").exists()


def test_samples_of_a_target_are_animated(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(animation, "RESOLUTION", 12)
    monkeypatch.setattr(animation, "AFTER", 1)
    monkeypatch.setattr(transport_pictures, "FRAMES", 3)
    sample(run, "animate=true", "n=30")
    assert gif_of(Path("r/animation.gif")).n_frames > 1


def gaussian(mean: float, width: float) -> FunctionTarget:
    return FunctionTarget(lambda x: Normal(mean, width).log_prob(x).sum(1) - 7, 1)


def test_resampling_gives_the_distribution_of_the_target() -> None:
    """The flow is N(0, 1), and the target N(0.5, 0.6^2). The effective sample size of the weights has a closed form."""
    n = 20_000
    x, log_w, words = draw_weighted(Flow((1,), Affine(1)), gaussian(0.5, 0.6), n, 3, resampled=True)
    assert (len(x), log_w) == (n, None)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(x.std()) == pytest.approx(0.6, abs=0.03)
    # 1 / E_q[(p / q)^2], a Gaussian integral
    s2 = 0.36
    second = math.exp(0.25 / (2 - s2)) / (math.sqrt(s2) * math.sqrt(2 - s2))
    found = float(words.partition("size ")[2].partition("%")[0]) / 100
    assert found == pytest.approx(1 / second, abs=0.03)


def test_large_pareto_k_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    draw_weighted(Flow((1,), Affine(1)), gaussian(0.0, 0.8), 4000, 0, resampled=False)
    assert not caplog.records
    draw_weighted(Flow((1,), Affine(1)), gaussian(0.0, 3.0), 4000, 0, resampled=False)
    assert any("0.7" in record.message for record in caplog.records)


def test_samples_whose_weights_are_all_zero_are_refused() -> None:
    zero = FunctionTarget(lambda x: torch.full((len(x),), -math.inf), 1)
    with pytest.raises(NonFiniteError):
        draw_weighted(Flow((1,), Affine(1)), zero, 100, 0, resampled=False)
