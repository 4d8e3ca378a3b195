"""The ranks of a run (processes started by torchrun or a similar launcher) and their communication.

Without a launcher, there is one rank, and the functions of this module cost nothing. All ranks must call the functions
that exchange values, in the same order. These functions raise RankLostError if another rank has ended.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowtrain.utils.errors import ConfigError, FlowtrainError, first_line
from flowtrain.utils.status import status

# torch is imported inside functions, so that a refused command can ask for its rank before torch is loaded
if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

_STORE: list[Any] = []


class RankLostError(FlowtrainError):
    """Another rank of the run has ended."""

    exit_code = 1


def launched() -> bool:
    """Whether a launcher has set the rank of this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Returns the rank of this process, from 0."""
    dist = _joined_group()
    return 0 if dist is None else int(dist.get_rank())


def size() -> int:
    """Returns the number of ranks."""
    dist = _joined_group()
    return 1 if dist is None else int(dist.get_world_size())


def _joined_group() -> Any:
    """Returns the module torch.distributed, or None if this process has not joined a process group.

    A process whose torch.distributed is not loaded cannot have joined a group.
    """
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def is_first() -> bool:
    """Whether this is rank 0, which writes files."""
    return rank() == 0


def on_this_machine() -> int:
    """Returns the number of ranks on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if launched() else 1


def share(n: int) -> slice:
    """Returns the slice of n rows for this rank. The slices cover all rows, and their lengths differ by at most 1."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def device(asked: torch.device) -> torch.device:
    """Returns the GPU of this rank if `asked` is a GPU without an index; otherwise returns `asked`.

    Raises:
        ConfigError: this machine has more ranks than GPUs, or all ranks would share one GPU.
    """
    if _joined_group() is None or asked.type != "cuda":
        return asked
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if asked.index is not None and on_this_machine() > 1:
        raise ConfigError(f"device={asked}: {on_this_machine()} ranks would share this GPU; give device=cuda")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {rank()}: this machine has {torch.cuda.device_count()} CUDA devices, but {on_this_machine()} ranks; "
            "start at most as many ranks as devices"
        )
    chosen = asked if asked.index is not None else torch.device("cuda", local)
    torch.cuda.set_device(chosen)
    return chosen


@contextmanager
def joined() -> Iterator[None]:
    """Joins the ranks that a launcher has started to a process group: NCCL for GPUs, Gloo for CPUs.

    Raises:
        ConfigError: the ranks cannot connect.
    """
    if not launched():
        yield
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise ConfigError(
            "RANK and WORLD_SIZE are set, so this is one of several processes, but this torch was built without "
            "torch.distributed: unset both variables, or install another build of torch"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        with status("waiting for the other ranks"):
            store, mine, ranks = next(iter(rendezvous("env://")))
    except (ValueError, RuntimeError) as e:
        raise ConfigError(
            "RANK and WORLD_SIZE are set, so this is one of several processes, but the processes cannot connect "
            f"({first_line(e)}): start them with torchrun, or unset both variables"
        ) from e
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if mine == 0 and attempt == "0":
        # remove a note of an earlier launcher with the same name
        _note().unlink(missing_ok=True)
    # a launcher that restarts the ranks may reuse the store, which contains the addresses of ended processes
    store = PrefixStore(f"attempt_{attempt}", store)
    _STORE[:] = [store]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=mine, world_size=ranks)
    # after an error, the group is not destroyed: that could wait forever for ended ranks. The launcher ends all ranks
    yield
    if mine == 0:
        _note().unlink(missing_ok=True)
    dist.destroy_process_group()


def first_to_report(message: str) -> bool:
    """Whether this rank is the first to report a message, so that an error of all ranks is reported once."""
    try:
        return not _STORE or int(_STORE[0].add(f"flowtrain/said/{message}", 1)) == 1
    except RuntimeError:
        # the launcher stores the counter, and it has ended
        return True


# Restarts by an elastic launcher


def save_run_dir(run_dir: Path) -> None:
    """Saves the run directory for restarts by the same launcher."""
    if launched():
        _note().write_text(str(run_dir), encoding="utf-8")


def saved_run_dir() -> Path | None:
    """Returns the run directory that was saved before a restart by the same launcher on this machine, or None."""
    return Path(_note().read_text(encoding="utf-8")) if launched() and _note().is_file() else None


def _note() -> Path:
    # Windows has no getuid, but a temporary folder for each user
    user = os.getuid() if hasattr(os, "getuid") else 0
    launcher = f"{user}-{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}-{os.getppid()}"
    return Path(tempfile.gettempdir()) / f"flowtrain-{launcher.replace('/', '_')}"


# Communication of all ranks


@contextmanager
def _rank_loss_reported() -> Iterator[None]:
    import torch

    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        raise RankLostError("another process of this run has ended; resume the run from its last checkpoint") from e


def summed(values: Sequence[float]) -> list[float]:
    """Returns the sum of each value over all ranks, in float64."""
    return _reduced(values, "SUM")


def largest(values: Sequence[float]) -> list[float]:
    """Returns the maximum of each value over all ranks."""
    return _reduced(values, "MAX")


def _reduced(values: Sequence[float], operation: str) -> list[float]:
    if size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64)
    with _rank_loss_reported():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return [float(value) for value in tensor.tolist()]


def sum_in_place(tensor: Tensor) -> None:
    """Replaces a tensor by the sum of the tensors of all ranks, which have the same shape."""
    if size() > 1:
        import torch.distributed as dist

        with _rank_loss_reported():
            dist.all_reduce(tensor)


def broadcast_object(value: T) -> T:
    """Returns rank 0's value on all ranks. The value must be picklable."""
    if size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    with _rank_loss_reported():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: T) -> list[T]:
    """Returns the values of all ranks, in the order of ranks. The values must be picklable."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    with _rank_loss_reported():
        dist.all_gather_object(values, value)
    return values


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copies the tensors of rank 0 to all ranks, in place."""
    if size() > 1:
        import torch
        import torch.distributed as dist

        with torch.no_grad(), _rank_loss_reported():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def gather_errors(error: FlowtrainError | None) -> FlowtrainError | None:
    """Returns the error of the first rank that has one, with the rank in its message; None if no rank has an error."""
    if size() == 1:
        return error
    found = all_gather(None if error is None else (type(error), str(error)))
    for i, each in enumerate(found):
        if each is not None:
            kind, message = each
            return kind(f"rank {i}: {message}")
    return None
