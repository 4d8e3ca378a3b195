"""Checkpoints: weights and plain values only, written so that a crash leaves the old file or the new one."""

import pickle
from pathlib import Path
from typing import Any

import torch

from flowtrain.errors import CheckpointError
from flowtrain.files import replacing

FORMAT = 1
KEYS = ("format", "config", "event_shape", "step", "weights")
# of the config, what a flow is built from and told of
GROUPS = ("model", "data", "solver")


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes the whole of it, to the disk, or nothing."""
    with replacing(path, durable=True) as f:
        torch.save({"format": FORMAT, **checkpoint}, f)


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
        if candidate.is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(f"{path.absolute()}: there is no such file or run directory")
    raise CheckpointError(
        f"{path.absolute()} holds no checkpoints/{' or checkpoints/'.join(names)}: "
        "give a run directory (flowtrain prints it last) or a .pt file"
    )


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running anything from it.

    Raises:
        CheckpointError: not a checkpoint of ours, damaged, or with more in it than weights and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        first = str(e).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: not a flowtrain checkpoint, or one that asks to run code; refused ({first})"
        ) from e
    except Exception as e:  # a file of another kind can fail in any way
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint; is it complete? ({first})") from e
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config", {}), dict):
        raise CheckpointError(f"{path}: not a flowtrain checkpoint")
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: not a flowtrain checkpoint (it lacks {', '.join(missing)})")
    missing = [group for group in GROUPS if not isinstance(checkpoint["config"].get(group), dict)]
    if missing:
        raise CheckpointError(f"{path}: the checkpoint's config has no {', '.join(missing)}: it is damaged")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {checkpoint['format']}; this flowtrain reads format {FORMAT}")
    return dict(checkpoint)
