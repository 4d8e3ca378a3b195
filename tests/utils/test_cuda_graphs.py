"""The recorder of CUDA graphs, with stand-ins for torch.cuda. tests/ode/test_captured_solve.py tests `CapturedCall`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers.graphs import Recording
from torch import Tensor

from flowtrain.utils.cuda_graphs import CapturedCall, CudaRecorder, GraphMemory


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


class Cuda:
    """Stand-ins for functions of torch.cuda. `log` contains the stream of each warm-up and of each capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, Any, Any]] = []
        self.default = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.default)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(("stream", stream, None))
        yield

    @contextmanager
    def graph(self, graph: Recording, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.log.append(("graph", stream, pool))
        with graph:
            yield


def test_warm_up_and_captures_share_a_stream_and_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    memory = GraphMemory(torch.device("cpu"))
    memory.recorder = recorder = CudaRecorder(torch.device("cuda"))
    weight = torch.tensor([2.0, 3.0], requires_grad=True)

    def function(inputs: Any, parameters: Any) -> tuple[list[Tensor], list[Tensor]]:
        y = inputs[0] * parameters[0]
        return [y], [y.detach().sum()]

    x = torch.ones(2)
    call = CapturedCall(function, [x], [weight], memory)
    assert [(what, pool) for what, _, pool in cuda.log] == [("stream", None), ("graph", "pool"), ("graph", "pool")]
    assert {id(stream) for _, stream, _ in cuda.log} == {id(recorder.stream)}
    # the streams wait for each other before and after the warm-up
    assert recorder.stream.waited == [cuda.default]
    assert cuda.default.waited == [recorder.stream]
    [y], [total] = call([x * 5], [weight])
    assert (y.tolist(), total.item(), total.requires_grad) == ([10.0, 15.0], 25.0, False)
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [5.0, 5.0]


def test_parameter_without_gradient_gets_none() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    call = CapturedCall(
        lambda inputs, parameters: ([inputs[0] * parameters[0]], []), [a], [a, b], GraphMemory(a.device)
    )
    [y], _ = call([torch.ones(2)], [a, b])
    y.sum().backward()
    assert a.grad is not None
    assert b.grad is None
