"""Solves with planned steps that are captured in CUDA graphs, see `flowtrain.utils.cuda_graphs`.

In training, the steps of a solve are planned from the last solve. The solve, the quadrature and the gradient can
therefore be captured before the error ratios of the steps are known. The ratios of all steps are read once, after the
solve. If a step is rejected, the solve is repeated without graphs.

The structure of a graph depends on the number of steps and on the number of quadrature nodes in each step. Times, step
sizes, tolerances, nodes and weights are inputs of the graph.
"""

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.ode.quadrature import Nodes
from flowtrain.utils.cuda_graphs import CapturedCall, GraphMemory

log = logging.getLogger("flowtrain")

# the largest number of graphs
MOST_GRAPHS = 16
# a structure is captured at its second solve, because a capture takes as long as several solves
BEFORE_CAPTURE = 2
# the alignment of each array in bytes, as torch aligns its tensors
ALIGNMENT = 64


class SolveGraphs:
    """The captured solves of one ODE block, by structure. The least recently used one is dropped."""

    def __init__(self) -> None:
        self.calls: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self.seen: Counter[Hashable] = Counter()
        self.memory: GraphMemory | None = None
        self.failed = False

    def find(self, key: Hashable, device: torch.device, make: Callable[[GraphMemory], CapturedCall]) -> Any:
        """Returns the captured solve of a structure, or None if it must be solved without a graph.

        Args:
            key: everything that is constant in a graph.
            make: captures the solve.
        """
        if self.memory is not None and self.memory.device != device:
            # the flow was moved
            self.calls.clear()
            self.memory = None
        if self.failed or (self.memory is not None and self.memory.in_use):
            return None
        if key in self.calls:
            self.calls.move_to_end(key)
            return self.calls[key]
        self.seen[key] += 1
        if self.seen[key] < BEFORE_CAPTURE:
            return None
        self.memory = self.memory or GraphMemory(device)
        try:
            self.calls[key] = make(self.memory)
        except RuntimeError as e:
            self.failed = True
            self.calls.clear()
            first = str(e).splitlines()[0]
            log.warning("solver.cuda_graphs: the capture failed, and training continues without graphs: %s", first)
            return None
        if len(self.calls) > MOST_GRAPHS:
            self.calls.popitem(last=False)
        return self.calls[key]


@dataclass(frozen=True)
class Capturable:
    """The parts of a problem from which it is built again for other tensors.

    Attributes:
        inputs: the tensors that differ between solves, with x first.
        key: everything on which the problem depends besides the inputs, the parameters and the times.
        call: (inputs, parameters, function) -> function(the problem for these tensors).
        graphs: the graphs of earlier solves.
    """

    inputs: tuple[Tensor, ...]
    key: Hashable
    call: Callable[[Sequence[Tensor], Sequence[Tensor], Callable[[Any], Any]], Any]
    graphs: SolveGraphs = field(default_factory=SolveGraphs)


@dataclass(frozen=True)
class PlannedSteps:
    """The numbers of a planned solve, as NumPy arrays on the host or as tensors on the device.

    Attributes:
        tolerance: atol and rtol, (2,).
        h: the step sizes, (n,).
        times: the times of the stages of each step, (n, stages).
        nodes: the quadrature of the path integrals.
    """

    tolerance: Any
    h: Any
    times: Any
    nodes: Nodes

    @property
    def arrays(self) -> list[np.ndarray]:
        """All numbers."""
        nodes = self.nodes
        return [
            self.tolerance,
            self.h,
            self.times,
            np.array(nodes.times),
            np.array(nodes.weights),
            *nodes.rows,
            *nodes.tails,
        ]

    @property
    def structure(self) -> Hashable:
        """Everything about the steps that is constant in a graph: their shapes, and the slopes that nodes use."""
        shapes = tuple(a.shape for a in self.arrays)
        return shapes, len(self.nodes.rows), tuple(self.nodes.last_used), self.nodes.spectral

    def packed(self, like: Tensor) -> Tensor:
        """Returns all numbers as one tensor on the host, with the dtype of `like`."""
        arrays, dtype = self.arrays, like.dtype
        starts, total = offsets([a.size for a in arrays], dtype)
        flat = np.zeros(total)
        for start, a in zip(starts, arrays, strict=True):
            flat[start : start + a.size] = a.ravel()
        packed = torch.from_numpy(flat).to(dtype)
        # a copy from other memory would block the host
        return packed.pin_memory() if like.is_cuda else packed

    def on_device(self, packed: Tensor) -> "PlannedSteps":
        """Returns these steps as views of `packed`, a copy on the device of the result of `PlannedSteps.packed`."""
        arrays = self.arrays
        starts, _ = offsets([a.size for a in arrays], packed.dtype)
        views = [packed[s : s + a.size].view(a.shape) for s, a in zip(starts, arrays, strict=True)]
        tolerance, h, times, node_times, weights, *rest = views
        n = len(self.nodes.rows)
        on_device: dict[str, Any] = {"times": node_times, "weights": weights, "rows": rest[:n], "tails": rest[n:]}
        return PlannedSteps(tolerance, h, times, replace(self.nodes, **on_device))


def offsets(sizes: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """Returns the aligned positions of arrays in one tensor, and its length.

    Example:
        >>> offsets([2, 17, 1], torch.float32)
        ([0, 16, 48], 64)
    """
    unit = ALIGNMENT // dtype.itemsize
    padded = [math.ceil(size / unit) * unit for size in sizes]
    return [sum(padded[:i]) for i in range(len(padded))], sum(padded)
