"""A stand-in for CUDA graphs on the CPU: records operations of torch and replays them on the same memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# operations that read values on the host, copy values from the host, or draw random numbers
FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "lift_fresh", "rand", "bernoulli", "normal")


class Recording(TorchDispatchMode):
    """The operations inside a context. As with a CUDA graph, `replay` runs no Python code of the recorded function."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replayed = False
        # whether an operation was not allowed
        self.refused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        # on a CPU, tanh uses new_tensor(-1), see `Tanh.replace`
        from_host = name == "lift_fresh" and args[0].dim() == 0
        self.refused = self.refused or (not from_host and any(name.startswith(f) for f in FORBIDDEN))
        assert not self.refused, f"{name} inside a graph"
        out = func(*args, **(kwargs or {}))
        self.refused = len({str(y.device) for y in tree_leaves((args, kwargs, out)) if isinstance(y, Tensor)}) > 1
        assert not self.refused, f"{name} copies between devices inside a graph"
        self.operations.append((func, alias(args), alias(kwargs or {}), alias(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        if not self.replayed:
            self.forget()
        self.replayed = True
        for func, args, kwargs, out in self.operations:
            again = func(*alias(args), **alias(kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @torch.no_grad()
    def forget(self) -> None:
        """Overwrites all results with NaN, because a capture computes nothing."""
        inputs = {leaf.untyped_storage().data_ptr() for leaf in self._fed() if leaf.numel()}
        for *_, out in self.operations:
            for leaf in tree_leaves(out):
                made_here = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in inputs
                if made_here and leaf.is_floating_point():
                    leaf.fill_(torch.nan)

    def _fed(self) -> list[Tensor]:
        """Returns the tensors that no recorded operation has made."""
        made: set[int] = set()
        fed = []
        for _, args, kwargs, out in self.operations:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in made:
                    fed.append(leaf)
            made |= {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return fed


def alias(values: Any) -> Any:
    """Replaces tensors by tensors on the same memory, whose shapes do not change with operations such as squeeze_."""
    return tree_map_only(Tensor, lambda x: x.detach(), values)


class Recorder:
    """Records on the CPU. `recordings` are all recordings so far."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        yield

    @contextmanager
    def record(self) -> Iterator[Recording]:
        recording = Recording()
        with recording:
            yield recording
        self.recordings.append(recording)
