"""The processes of one run, started by torchrun or alike: which of them this is, and what they agree on.

Without a launcher there is one rank, 0 of 1, and everything here is free: nothing is copied or waited for.
Every rank must call the functions that speak of "all ranks", in the same order; where one of the
others has ended, they raise RankLostError.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowtrain.utils.errors import ConfigError, FlowtrainError, first_line
from flowtrain.utils.status import status

T = TypeVar("T")

_STORE: list[Any] = []


class RankLostError(FlowtrainError):
    """Another process of the run has ended."""

    exit_code = 1


def launched() -> bool:
    """Whether a launcher has said which rank this process is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Which of the run's processes this is, from 0."""
    return dist.get_rank() if _is_joined() else 0


def size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if _is_joined() else 1


def _is_joined() -> bool:
    """Whether this process is one of several; a torch built without torch.distributed has one rank."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this is the rank that writes."""
    return rank() == 0


def on_this_machine() -> int:
    """How many ranks share its cores."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if launched() else 1


def share(n: int) -> slice:
    """This rank's rows of n: each has n / size of them, give or take one, and together they have all."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def device(asked: torch.device) -> torch.device:
    """The GPU of this rank, where GPUs are asked for by no number.

    Raises:
        ConfigError: more ranks on this machine than it has GPUs, or one GPU for all ranks.
    """
    if not _is_joined() or asked.type != "cuda":
        return asked
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if asked.index is not None and on_this_machine() > 1:
        raise ConfigError(f"device={asked}: {on_this_machine()} ranks would share it; give device=cuda")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {rank()}: this machine has {torch.cuda.device_count()} CUDA devices, and {on_this_machine()} ranks; "
            "start no more ranks than devices"
        )
    chosen = asked if asked.index is not None else torch.device("cuda", local)
    torch.cuda.set_device(chosen)
    return chosen


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the ranks that a launcher has started know of each other: NCCL between GPUs, Gloo between CPUs.

    Raises:
        ConfigError: the ranks cannot meet.
    """
    if not launched():
        yield
        return
    if not dist.is_available():
        raise ConfigError(
            "RANK and WORLD_SIZE say that this is one of several processes, but this torch was built without "
            "torch.distributed: unset both variables, or install another build of torch"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        with status("waiting for the other ranks"):
            store, mine, ranks = next(iter(rendezvous("env://")))
    except (ValueError, RuntimeError) as e:
        raise ConfigError(
            f"RANK and WORLD_SIZE say that this is one of several processes, which cannot meet ({first_line(e)}): "
            "start them with torchrun, or unset both"
        ) from e
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if mine == 0 and attempt == "0":
        # of a launcher of the same name, long ago
        _note().unlink(missing_ok=True)
    # a launcher that starts the ranks again may hand them the store of before, with the addresses of the dead in it
    store = PrefixStore(f"attempt_{attempt}", store)
    _STORE[:] = [store]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=mine, world_size=ranks)
    # what ends with an error leaves that to the launcher: a rank that waits for one that has ended waits for ever
    yield
    if mine == 0:
        _note().unlink(missing_ok=True)
    dist.destroy_process_group()


def first_to_say(message: str) -> bool:
    """Whether no other rank has said it: a mistake that all ranks find is told once."""
    try:
        return not _STORE or int(_STORE[0].add(f"flowtrain/said/{message}", 1)) == 1
    except RuntimeError:
        # the launcher that keeps count is gone
        return True


# the attempts of an elastic launcher


def remember(run_dir: Path) -> None:
    """Keeps, for the attempts of this launcher to come, where the run is."""
    if launched():
        _note().write_text(str(run_dir), encoding="utf-8")


def remembered() -> Path | None:
    """Where an earlier attempt of this launcher had the run, if that was on this machine."""
    return Path(_note().read_text(encoding="utf-8")) if launched() and _note().is_file() else None


def _note() -> Path:
    # on Windows, each user has a temporary folder
    user = os.getuid() if hasattr(os, "getuid") else 0
    launcher = f"{user}-{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}-{os.getppid()}"
    return Path(tempfile.gettempdir()) / f"flowtrain-{launcher.replace('/', '_')}"


# what all ranks do together


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        raise RankLostError("another process of this run has ended; what it has saved is there to go on from") from e


def summed(values: Sequence[float]) -> list[float]:
    """The sums of all ranks' values, in float64."""
    return _reduced(values, "SUM")


def largest(values: Sequence[float]) -> list[float]:
    """The largest of all ranks' values, each by itself."""
    return _reduced(values, "MAX")


def _reduced(values: Sequence[float], operation: str) -> list[float]:
    if size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    with _together():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return [float(value) for value in tensor.tolist()]


def sum_in_place(tensor: Tensor) -> None:
    """Puts the sum of all ranks' tensors, alike in shape, in the place of each."""
    if size() > 1:
        with _together():
            dist.all_reduce(tensor)


def broadcast_object(value: T) -> T:
    """The value that rank 0 has, on all ranks; plain values only."""
    if size() == 1:
        return value
    box = [value]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank; plain values only."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _together():
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copies rank 0's values into the tensors of all ranks."""
    if size() > 1:
        with _together():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def gather_errors(error: FlowtrainError | None) -> FlowtrainError | None:
    """The first of all ranks' errors, with the rank it comes from; None where no rank has one."""
    if size() == 1:
        return error
    found = all_gather(None if error is None else (type(error), str(error)))
    for i, each in enumerate(found):
        if each is not None:
            kind, message = each
            return kind(f"rank {i}: {message}")
    return None
