"""Checkpoint files: weights and plain values with a checksum. A crash leaves the old file or the new one."""

import hashlib
import io
import logging
import pickle
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.training.old_checkpoints import upgraded
from flowtrain.utils.errors import CheckpointError, first_line
from flowtrain.utils.files import replacing

log = logging.getLogger("flowtrain")


def checksum(content: Any) -> str:
    """SHA-256 of plain values and tensors, by type, order and value.

    Raises:
        CheckpointError: a value of another kind, or a tensor that claims more than its memory holds.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)};".encode())
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise CheckpointError(f"a {type(value).__name__} is no plain value")


def _add_tensor(digest: Any, value: Tensor) -> None:
    # a few bytes can claim a tensor of any shape, which would be written out below
    if value.device.type != "cpu":
        raise CheckpointError(f"a tensor is on {value.device}, where no file can put it")
    if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"a tensor of shape {tuple(value.shape)} has less memory than that")
    digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# 2: with a checksum. Format 1 is read too
FORMAT = 2
KEYS = ("format", "config", "event_shape", "step", "weights")
# what some of them are
KINDS: dict[str, Callable[[Any], bool]] = {
    "event_shape": lambda v: isinstance(v, list | tuple) and bool(v) and all(type(n) is int and n > 0 for n in v),
    "step": lambda v: type(v) is int and v >= 0,
    "weights": lambda v: isinstance(v, dict) and all(isinstance(w, torch.Tensor) for w in v.values()),
    "ema": lambda v: v is None or isinstance(v, dict),
}
# of the config, what a flow is built from and told of
GROUPS = ("model", "data", "solver")


def save(path: Path, checkpoint: dict[str, Any], keep_previous: bool = True) -> None:
    """Writes the whole of it, to the disk, or nothing.

    Args:
        keep_previous: whether the file before it stays as `previous(path)`.

    Raises:
        OSError: it could not be written, or does not read back as it was.
    """
    content = on_cpu({"format": FORMAT, **checkpoint})
    content["checksum"] = checksum(content)

    def reads_back(written: Path) -> None:
        try:
            _read(written)
        except CheckpointError as e:
            raise OSError(f"{path}: what was written does not read back ({e})") from e

    # in memory first: torch answers a disk that is full with an error of its own archive's
    archive = io.BytesIO()
    torch.save(content, archive)
    with replacing(path, durable=True, check=reads_back, keep=previous(path) if keep_previous else None) as f:
        f.write(archive.getbuffer())


def on_cpu(content: Any) -> Any:
    """The same values, their tensors on the CPU: a file should not tell of a device that its reader may not have."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        # of its own kind, which may be made in another way
        found = copy(content)
        found.update((key, on_cpu(value)) for key, value in content.items())
        return found
    if isinstance(content, list | tuple):
        return type(content)([on_cpu(value) for value in content])
    return content


def previous(path: Path) -> Path:
    """Where the checkpoint before that of `path` is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def any_in(run_dir: Path) -> bool:
    """Whether a run has left one to go on from, or to be evaluated."""
    paths = [run_dir / "checkpoints" / f"{name}.pt" for name in ("best", "last")]
    return any(path.exists() or previous(path).exists() for path in paths)


def find(path: Path, prefer: str = "best") -> Path:
    """The checkpoint file that `path` means: itself, or the best (else last) one of a run directory.

    Raises:
        CheckpointError: nothing there.
    """
    if path.is_file():
        return path
    names = ("best.pt", "last.pt") if prefer == "best" else (f"{prefer}.pt",)
    for name in names:
        candidate = path / "checkpoints" / name
        if candidate.is_file() or previous(candidate).is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(f"{path.absolute()}: there is no such file or run directory")
    raise CheckpointError(
        f"{path.absolute()} holds no checkpoints/{' or checkpoints/'.join(names)}: "
        "give a run directory (flowtrain prints it last) or a .pt file"
    )


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running anything from it; where it is damaged, the one before it, with a warning.

    Raises:
        CheckpointError: not a checkpoint of ours, damaged, or with more in it than weights and plain values.
    """
    try:
        return _read(path)
    except CheckpointError as e:
        before = previous(path)
        if not before.is_file():
            raise
        try:
            content = _read(before)
        except CheckpointError:
            raise e from None
        log.warning("%s Taking the one before it, %s of step %s.", e, before.name, content["step"])
        return content


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path}: not a flowtrain checkpoint, or one that asks to run code; refused ({first_line(e)})."
        ) from e
    except Exception as e:  # a file of another kind can fail in any way
        raise CheckpointError(f"{path}: cannot be read as a checkpoint; is it complete? ({first_line(e)}).") from e
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config", {}), dict):
        raise CheckpointError(f"{path}: not a flowtrain checkpoint.")
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: not a flowtrain checkpoint (it lacks {', '.join(missing)}).")
    if checkpoint["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: checkpoint format {checkpoint['format']}; this flowtrain reads formats 1 and {FORMAT}."
        )
    expected = checkpoint.pop("checksum", None)
    try:
        found = checksum(checkpoint)
    except (CheckpointError, RecursionError) as e:
        raise CheckpointError(f"{path}: the checkpoint is damaged: {e}.") from e
    if found != expected and (expected is not None or checkpoint["format"] != 1):
        raise CheckpointError(f"{path}: the checkpoint is damaged: what it holds has another checksum than it says.")
    for key, good in KINDS.items():
        if not good(checkpoint.get(key)):
            raise CheckpointError(f"{path}: the checkpoint's {key} is not one: it is damaged.")
    missing = [group for group in GROUPS if not isinstance(checkpoint["config"].get(group), dict)]
    if missing:
        raise CheckpointError(f"{path}: the checkpoint's config has no {', '.join(missing)}: it is damaged.")
    return upgraded(checkpoint)
