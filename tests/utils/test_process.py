"""A fit uses its own process settings, and the caller's settings are restored."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flows import vectors
from torch import Tensor, nn

import flowtrain
from flowtrain.cli.config_files import compose_defaults
from flowtrain.flow import Flow
from flowtrain.runs import run as runs
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.precision import default_precision
from flowtrain.utils.process import choose_threads, one_thread_if_small, own_settings

CPU = torch.device("cpu")


def precision() -> list[Any]:
    """Returns torch's precision settings for products. A setting that torch refuses to read gives the error's name."""
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
    """Restores torch's default precision after a test."""
    with default_precision():
        yield
        torch.set_float32_matmul_precision("highest")


def fails() -> None:
    raise KeyError("inside")


@pytest.mark.parametrize("end", [lambda: None, fails])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.usefixtures("restored")
def test_torch_settings_of_the_caller_are_restored(end: Callable[[], None], grad: Callable[[], Any]) -> None:
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


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs the settings of torch 2.9")
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["cuda.matmul", "mkldnn.matmul", "cudnn.conv"])
@pytest.mark.parametrize("value", ["ieee", "tf32", "bf16"])
def test_contradictory_precision_settings_are_restored(legacy: str, backend: str, value: str) -> None:
    """torch has old and new settings of precision, and refuses to read old settings that contradict new settings."""
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


def test_thread_count_depends_on_the_sample_size(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Returns the weights of a short run."""
    options = ["model.layers=2", "model.hidden=[8]", "trainer.steps=4", "trainer.val_every=2", "data.n_val=50"]
    config = compose_defaults(["model=realnvp", "data=moons", "data.n_test=50", *options]) | changes
    run_dir.mkdir()
    with own_settings(CPU):
        runs.train(config, run_dir)
    weights: dict[str, Tensor] = torch.load(run_dir / "checkpoints/best.pt", weights_only=False)["weights"]
    return weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("propagate_logs", "restored")
def test_fit_does_not_depend_on_torch_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowtrain.plotting.style.save", lambda figure, path, options: None)
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


def thread_counts_inside(flow: Flow) -> list[int]:
    """Returns a list to which every forward pass of the flow's layers appends the thread count."""
    counts: list[int] = []

    def note(*_: object) -> None:
        counts.append(torch.get_num_threads())

    for module in flow.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(note)
    return counts


@pytest.mark.parametrize("name", ["ffjord", "realnvp", "glow"])
def test_small_vector_flows_use_one_thread_and_restore_the_count(name: str) -> None:
    flow, x = vectors(name), torch.randn(5, 2)
    flow.log_prob(x)
    counts = thread_counts_inside(flow)
    torch.set_num_threads(2)
    calls = (lambda: flow.log_prob(x), lambda: flow.inverse(x), lambda: flow(x), lambda: flow.sample(3))
    for call in calls:
        counts.clear()
        call()
        assert set(counts) == {1}
        assert torch.get_num_threads() == 2
    loss = flow.train().log_prob(x.requires_grad_()).sum() + flow.rsample(2).sum()
    loss.backward()
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="shape"):
        flow.log_prob(torch.randn(3, 3))
    assert torch.get_num_threads() == 2
    with own_settings(CPU):
        choose_threads(3, (2,))
        counts.clear()
        flow.log_prob(x)
        assert set(counts) == {3}
    assert torch.get_num_threads() == 2


def test_larger_samples_and_gpus_keep_the_thread_count() -> None:
    torch.set_num_threads(2)
    for shape, device, expected in (((16,), "cpu", 1), ((17,), "cpu", 2), ((1, 5, 5), "cpu", 2), ((2,), "cuda", 2)):
        with one_thread_if_small(shape, torch.device(device)):
            assert torch.get_num_threads() == expected


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("order", ["first in, first out", "first in, last out"])
@pytest.mark.parametrize("fresh", [False, True])
def test_overlapping_calls_restore_the_thread_count(order: str, fresh: bool) -> None:
    """If a Python thread first uses torch during a call in another thread, it inherits the thread count of the call."""
    torch.set_num_threads(2)
    started, entered, leave, left = (threading.Event() for _ in range(4))

    def work() -> tuple[int, int]:
        if not fresh:
            assert torch.get_num_threads() == 2
        started.set()
        go.wait(10)
        with one_thread_if_small((2,), CPU):
            inside = torch.get_num_threads()
            entered.set()
            leave.wait(10)
        after = torch.get_num_threads()
        left.set()
        return inside, after

    go = threading.Event()
    thread, found = in_thread(work)
    started.wait(10)
    with one_thread_if_small((2,), CPU):
        assert torch.get_num_threads() == 1
        go.set()
        entered.wait(10)
        if order == "first in, last out":
            leave.set()
            left.wait(10)
        with one_thread_if_small((2,), CPU):
            assert torch.get_num_threads() == 1
        # leaving a nested call does not restore the count
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    leave.set()
    thread.join(10)
    assert found == [(1, 2)]
    # new threads have the restored count
    thread, found = in_thread(torch.get_num_threads)
    thread.join(10)
    assert found == [2]


def test_concurrent_calls_restore_the_thread_count() -> None:
    flow, x = vectors("realnvp"), torch.randn(5, 2)
    expected = flow.log_prob(x)
    torch.set_num_threads(2)
    results = [in_thread(lambda: [flow.log_prob(x) for _ in range(20)]) for _ in range(6)]
    for thread, found in results:
        thread.join(60)
        assert all(torch.equal(log_p, expected) for log_p in found[0])
    assert torch.get_num_threads() == 2
    thread, found = in_thread(torch.get_num_threads)
    thread.join(10)
    assert found == [2]


@pytest.mark.usefixtures("restored", "float32")
def test_flow_fitted_in_inference_mode_can_be_trained() -> None:
    """Parameters created in inference mode receive no gradients."""
    x = torch.randn(50, 2)
    flows = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), torch.device("meta" if context is torch.no_grad else "cpu"):
            before = settings()
            flows.append(flowtrain.fit(x, model="realnvp", steps=3, progress=False))
            assert settings() == before
        torch.rand(3)
    for flow in flows:
        flow.log_prob(x).sum().backward()
        assert flow.like.device == CPU
        assert same(flow.state_dict(), flows[0].state_dict())
