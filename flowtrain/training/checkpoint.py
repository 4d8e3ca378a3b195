"""Checkpoint files: weights and plain values with a checksum. After a crash, the old or the new file is complete."""

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.training.checkpoint_files import previous
from flowtrain.training.old_checkpoints import upgraded
from flowtrain.utils.errors import CheckpointError, first_line
from flowtrain.utils.files import replacing

log = logging.getLogger("flowtrain")


def checksum(content: Any) -> str:
    """Returns the SHA-256 of plain values and tensors. The checksum depends on types, order and values.

    Raises:
        CheckpointError: a value of another type, or a tensor that is larger than its storage.
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
        raise CheckpointError(f"it contains a {type(value).__name__}, which is not a plain value")


def _add_tensor(digest: Any, value: Tensor) -> None:
    # a small file can contain a tensor of any shape (with stride 0), which `contiguous` below would allocate
    if value.device.type != "cpu":
        raise CheckpointError(f"it contains a tensor on {value.device}, not on the CPU")
    if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"it contains a tensor of shape {tuple(value.shape)} with less memory than it needs")
    digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# format 2 has a checksum. Format 1 has no checksum, and can still be read
FORMAT = 2
KEYS = ("format", "config", "event_shape", "step", "weights")
# checks of values by key
VALUE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "event_shape": lambda v: isinstance(v, list | tuple) and bool(v) and all(type(n) is int and n > 0 for n in v),
    "step": lambda v: type(v) is int and v >= 0,
    "weights": lambda v: isinstance(v, dict) and all(isinstance(w, torch.Tensor) for w in v.values()),
    "ema": lambda v: v is None or isinstance(v, dict),
}
# config groups that are needed to build a flow
GROUPS = ("model", "data", "solver")


def save(path: Path, checkpoint: dict[str, Any], keep_previous: bool = True) -> None:
    """Writes a checkpoint atomically and flushes it to the disk.

    Args:
        keep_previous: whether the existing file is kept as `previous(path)`.

    Raises:
        OSError: the file could not be written, or could not be read back.
    """
    content = on_cpu({"format": FORMAT, **checkpoint})
    content["checksum"] = checksum(content)

    def reads_back(written: Path) -> None:
        try:
            _read(written)
        except CheckpointError as e:
            raise OSError(f"{path}: the written file does not read back ({e})") from e

    # torch.save writes to memory, because on a full disk its zip writer does not raise OSError
    archive = io.BytesIO()
    torch.save(content, archive)
    with replacing(path, durable=True, check=reads_back, keep=previous(path) if keep_previous else None) as f:
        f.write(archive.getbuffer())


def on_cpu(content: Any) -> Any:
    """Returns the values with all tensors on the CPU, so that a machine without the device can load the file."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        # `copy` keeps subclasses of dict whose constructors have other arguments
        found = copy(content)
        found.update((key, on_cpu(value)) for key, value in content.items())
        return found
    if isinstance(content, list | tuple):
        return type(content)([on_cpu(value) for value in content])
    return content


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code from it.

    If the file is damaged, the previous checkpoint is read instead, with a warning.

    Raises:
        CheckpointError: a file that is not a flowtrain checkpoint, is damaged, or contains objects other than weights
            and plain values.
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
        log.warning("%s Using the previous checkpoint instead, %s of step %s.", e, before.name, content["step"])
        return content


_BY_SAVE = "Files for flowtrain.load are written by Flow.save, not by torch.save."


def _object_in(error: pickle.UnpicklingError) -> str:
    """Returns words on the object that torch refuses to load; empty if torch does not name one.

    The rest of torch's message advises to load the file without a check.
    """
    found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    return f" (it contains {found[1]})" if found else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path}: refused, because it is not a flowtrain checkpoint, or would run code{_object_in(e)}. {_BY_SAVE}"
        ) from e
    except Exception as e:  # a file of another format can raise any exception
        raise CheckpointError(f"{path}: cannot be read as a checkpoint; is it complete? ({first_line(e)}).") from e
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config", {}), dict):
        raise CheckpointError(f"{path}: not a flowtrain checkpoint. {_BY_SAVE}")
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: not a flowtrain checkpoint (it lacks {', '.join(missing)}). {_BY_SAVE}")
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
        raise CheckpointError(f"{path}: the checkpoint is damaged: its contents do not match its checksum.")
    for key, good in VALUE_CHECKS.items():
        if not good(checkpoint.get(key)):
            raise CheckpointError(f"{path}: the checkpoint is damaged: its {key} is not valid.")
    missing = [group for group in GROUPS if not isinstance(checkpoint["config"].get(group), dict)]
    if missing:
        raise CheckpointError(f"{path}: the checkpoint is damaged: its config has no {', '.join(missing)}.")
    return upgraded(checkpoint)
