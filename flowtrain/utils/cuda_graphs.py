"""Captures a function of tensors and its gradient in CUDA graphs.

A CUDA graph is a recorded sequence of kernels. A replay launches all of them at once, and runs no Python. A graph
therefore always uses the memory and the Python numbers of the recorded call. `CapturedCall` follows the rules of torch
(https://docs.pytorch.org/docs/stable/notes/cuda.html#constraints):

- All inputs are copied into buffers with fixed addresses. Numbers that change, such as step sizes, are inputs.
- The function does not read values of tensors on the host, copies nothing from the host, and draws no random numbers.
- Warm-up and capture use the same stream, which is not the default stream.
- Gradients are computed for new leaves that share the memory of the parameters. A leaf that another graph of autograd
  uses may be bound to the default stream, which would invalidate the capture.
- Results are copied out of the private memory pool of the graphs, which the next replay overwrites.

On other devices, the same function runs on the same buffers without graphs.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from flowtrain.utils.autograd import first_derivative
from flowtrain.utils.errors import FlowtrainError

# the number of calls before a capture, in which libraries choose kernels and allocate their workspaces
WARM_UPS = 3

# (inputs, parameters) -> (outputs with a gradient, outputs without one)
Function = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]


class Recording(Protocol):
    """Recorded work that can be replayed."""

    def replay(self) -> None:
        """Runs the recorded work again, with the current values of the same memory."""
        ...


class Recorder(Protocol):
    """Records the work of a device."""

    def warm_up(self) -> Any:
        """Returns a context for calls before a capture."""
        ...

    def record(self) -> Any:
        """Returns a context that records the work inside it. It yields the `Recording`."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share a stream and a memory pool. Only one graph may be in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Context manager in which work runs on the stream of the captures."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Context manager that captures the work inside it. It yields the graph."""
        graph, device = torch.cuda.CUDAGraph(), self.stream.device
        with torch.cuda.device(device):
            before = torch.cuda.current_stream(device)
            try:
                # thread_local: other threads, such as those of NCCL, may call functions that a capture does not allow
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    yield graph
            except RuntimeError:
                _recover(before)
                raise


def _recover(stream: Any) -> None:
    """Restores the state of torch after a failed capture, so that work without graphs can continue on `stream`.

    After a failed capture, `torch.cuda.graph` leaves its stream as the current one. In some versions of torch, the
    random generator stays in capture mode, in which it draws no numbers outside a capture. The next capture that
    succeeds ends this mode.
    """
    torch.cuda.set_stream(stream)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(stream.device)):  # type: ignore[no-untyped-call]
        torch.zeros(1, device=stream.device)


def recorder_of(device: torch.device) -> Recorder | None:
    """Returns the recorder of a device, or None if the device has no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


class GraphMemory:
    """The memory that captured calls share. Each forward pass overwrites the tensors of the last one.

    Attributes:
        recorder: records graphs. None if the device has no graphs.
        generation: the number of forward passes so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorder = recorder_of(device)
        self.generation = 0
        self._pending: weakref.ref[_Use] | None = None

    @property
    def in_use(self) -> bool:
        """Whether the last forward pass may still need its backward pass."""
        return self._pending is not None and self._pending() is not None

    def begin(self) -> "_Use":
        """Marks the memory as used by a new forward pass, until `end` or until the returned object is deleted."""
        self.generation += 1
        use = _Use(self.generation)
        self._pending = weakref.ref(use)
        return use

    def end(self) -> None:
        """Marks the memory as free."""
        self._pending = None


class _Use:
    """A forward pass. The autograd graph of the results owns this object."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class CapturedCall:
    """A function of tensors that is captured with its gradient, for inputs of fixed shapes.

    Args:
        function: (inputs, parameters) -> (outputs that are differentiated, other outputs). It must follow the rules of
            this module.
        inputs: the inputs of one call. Their shapes, dtypes and requires_grad are those of all calls.
        parameters: further inputs, which are not copied. Their memory must stay at the same addresses.
        memory: the memory of the graphs.

    Raises:
        RuntimeError: the function cannot be captured.
    """

    def __init__(
        self, function: Function, inputs: Sequence[Tensor], parameters: Sequence[Tensor], memory: GraphMemory
    ) -> None:
        self.memory, self.recorder = memory, memory.recorder
        self.function: Function | None = function
        with torch.no_grad():
            self.buffers = [torch.empty_like(x).copy_(x).requires_grad_(x.requires_grad) for x in inputs]
        self.leaves = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        self.wanted = [x for x in (*self.buffers, *self.leaves) if x.requires_grad]
        self.outputs: list[Tensor] = []
        self.others: list[Tensor] = []
        self.cotangents: list[Tensor] = []
        # the gradients of `wanted` that are not None as one tensor, and the positions of these gradients
        self.flat, self.found = torch.empty(0), list[int]()
        if self.recorder is not None:
            self._capture(self.recorder)

    def __call__(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the results of the function for inputs and parameters as in the constructor.

        Raises:
            RuntimeError: the memory is in use.
        """
        if self.memory.in_use:
            raise RuntimeError("the results of the last captured call are still needed")
        found = _Call.apply(self, len(inputs), *inputs, *parameters)  # type: ignore[no-untyped-call]
        n = len(self.outputs)
        return list(found[:n]), list(found[n:])

    def _capture(self, recorder: Recorder) -> None:
        with recorder.warm_up():
            for _ in range(WARM_UPS):
                self._forward()
                self.cotangents = [torch.zeros_like(y) for y in self.outputs]
                self._backward()
        self.outputs, self.others, self.flat = [], [], torch.empty(0)
        with recorder.record() as self.forward_graph:
            self._forward()
        with recorder.record() as self.backward_graph:
            self._backward()
        # the graphs need the memory of these tensors, but not their autograd graph
        self.outputs, self.others = ([y.detach() for y in found] for found in (self.outputs, self.others))
        self.function = None

    def _forward(self) -> None:
        assert self.function is not None
        with torch.enable_grad():
            self.outputs, self.others = self.function(self.buffers, self.leaves)

    def _backward(self) -> None:
        pairs = [(y, c) for y, c in zip(self.outputs, self.cotangents, strict=True) if y.requires_grad]
        outputs, cotangents = zip(*pairs, strict=True)
        # the autograd graph is retained, because `backward` may be called several times, as with a CUDA graph
        gradients = torch.autograd.grad(outputs, self.wanted, cotangents, retain_graph=True, allow_unused=True)
        self.found = [i for i, g in enumerate(gradients) if g is not None]
        self.flat = torch.cat([g.flatten() for g in gradients if g is not None])

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Copies the inputs and returns copies of all outputs, without an autograd graph."""
        for buffer, x in zip(self.buffers, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        if self.recorder is None:
            self._forward()
            self.cotangents = [torch.empty_like(y) for y in self.outputs]
        else:
            self.forward_graph.replay()
        return [y.detach().clone() for y in (*self.outputs, *self.others)]

    @torch.no_grad()
    def backward(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns the gradients of all inputs and parameters for cotangents of the outputs."""
        for buffer, c in zip(self.cotangents, cotangents, strict=True):
            buffer.copy_(c)
        if self.recorder is None:
            self._backward()
        else:
            self.backward_graph.replay()
        sizes = [self.wanted[i].numel() for i in self.found]
        # one copy is one kernel, and the parts of the copy may become the gradients of parameters
        parts = torch.split(self.flat.clone(), sizes)
        of_wanted: list[Tensor | None] = [None] * len(self.wanted)
        for i, part in zip(self.found, parts, strict=True):
            of_wanted[i] = part.view_as(self.wanted[i])
        each = iter(of_wanted)
        return [next(each) if x.requires_grad else None for x in (*self.buffers, *self.leaves)]


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: CapturedCall, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.use = call, call.memory.begin()
        # the parameters are saved, so that torch raises an error in backward if they were changed in place
        ctx.save_for_backward(*tensors[n_inputs:])
        results = call.forward(tensors[:n_inputs])
        ctx.mark_non_differentiable(*results[len(call.outputs) :])
        return tuple(results)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        memory: GraphMemory = ctx.call.memory
        if ctx.use.generation != memory.generation:
            raise FlowtrainError(
                "the tensors for this backward pass were overwritten by a later solve: call backward before the next "
                "solve, or set solver.cuda_graphs=false"
            )
        gradients = ctx.call.backward(cotangents[: len(ctx.call.outputs)])
        memory.end()
        return None, None, *gradients
