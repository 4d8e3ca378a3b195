"""Settings of the process: a fit has its own, and the caller's are restored."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowtrain.cli.config_files import compose_defaults
from flowtrain.runs import run as runs
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.precision import default_precision
from flowtrain.utils.process import choose_threads, own_settings

CPU = torch.device("cpu")


def precision() -> list[Any]:
    """What torch says about the precision of products; the name of the error if settings contradict each other."""
    found: list[Any] = []
    backends: Any = torch.backends
    cuda, cudnn = backends.cuda, backends.cudnn
    old = (torch.get_float32_matmul_precision, lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32)
    for read in old:
        try:
            found.append(read())
        except RuntimeError as e:
            found.append(type(e).__name__)
    if not hasattr(cudnn, "conv"):
        return found
    places = (cuda.matmul, cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return found + [place.fp32_precision for place in places]


def settings() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        *precision(),
    ]


@pytest.fixture
def restored() -> Iterator[None]:
    """For tests that change the precision: torch's defaults after them."""
    with default_precision():
        yield
        torch.set_float32_matmul_precision("highest")


def fails() -> None:
    raise KeyError("inside")


@pytest.mark.parametrize("end", [lambda: None, fails])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.usefixtures("restored")
def test_settings_of_the_caller_are_restored(end: Callable[[], None], grad: Callable[[], Any]) -> None:
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float16)
    torch.set_float32_matmul_precision("medium")
    with grad(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        before = settings()
        try:
            with own_settings(CPU):
                torch.manual_seed(3)
                choose_threads(3, (2,))
                x = torch.rand(2, requires_grad=True)
                (x.square().sum() + torch.ones(2, 2).matmul(x).sum()).backward()
                assert (x.dtype, x.device) == (torch.float32, CPU)
                assert x.grad is not None
                assert not x.is_inference()
                assert torch.get_num_threads() == 3
                assert precision()[0] == "highest"
                torch.set_default_dtype(torch.float64)
                end()
        except KeyError:
            pass
        assert settings() == before


@pytest.mark.skipif(not hasattr(torch.cudnn, "conv"), reason="the names of torch 2.9 and later")
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["cuda.matmul", "mkldnn.matmul", "cudnn.conv"])
@pytest.mark.parametrize("value", ["ieee", "tf32", "bf16"])
def test_contradicting_precisions_are_restored(legacy: str, backend: str, value: str) -> None:
    """torch has old and new names for them, and refuses to read old ones after new ones have been set otherwise."""
    torch.set_float32_matmul_precision(legacy)
    first, second = backend.split(".")
    place: Any = getattr(getattr(torch.backends, first), second)
    try:
        place.fp32_precision = value
    except RuntimeError:
        pytest.skip("not a precision of this backend")
    before = precision()
    with default_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert precision() == before


def test_threads_by_the_size_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowtrain.utils.process.cores", lambda: 3)
    with own_settings(CPU):
        for threads, shape, expected in ((None, (16,), 1), (None, (17,), 3), (None, (1, 5, 5), 3), (2, (2,), 2)):
            choose_threads(threads, shape)
            assert torch.get_num_threads() == expected
        for bad in (0, 1025, 1.5, "two"):
            with pytest.raises(ConfigError, match="threads"):
                choose_threads(bad, (2,))  # type: ignore[arg-type]
    assert torch.get_num_threads() == 1


def fit(run_dir: Path, **changes: Any) -> dict[str, Tensor]:
    """The weights of a short run."""
    options = ["model.layers=2", "model.hidden=[8]", "trainer.steps=4", "trainer.val_every=2", "data.n_val=50"]
    config = compose_defaults(["model=realnvp", "data=moons", "data.n_test=50", *options]) | changes
    run_dir.mkdir()
    with own_settings(CPU):
        runs.train(config, run_dir)
    weights: dict[str, Tensor] = torch.load(run_dir / "checkpoints/best.pt", weights_only=False)["weights"]
    return weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("heard", "restored")
def test_a_fit_does_not_depend_on_the_settings_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowtrain.plotting.style.save", lambda figure, path: None)
    torch.set_default_dtype(torch.float32)
    alone = fit(tmp_path / "alone")
    assert not same(alone, fit(tmp_path / "seed", seed=1))
    torch.set_default_dtype(torch.float64)
    torch.rand(7)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        before = settings()
        assert same(alone, fit(tmp_path / "again"))
        assert settings() == before
    with torch.no_grad():
        assert same(alone, fit(tmp_path / "no grad"))
