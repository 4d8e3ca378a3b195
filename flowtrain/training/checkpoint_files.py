"""Finds the checkpoint files of a run directory. This module does not import torch."""

from pathlib import Path

from flowtrain.utils.errors import CheckpointError


def previous(path: Path) -> Path:
    """Returns the path at which the previous version of the checkpoint `path` is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def has_checkpoint(run_dir: Path) -> bool:
    """Returns whether a run directory contains a checkpoint, best or last."""
    paths = [run_dir / "checkpoints" / f"{name}.pt" for name in ("best", "last")]
    return any(path.exists() or previous(path).exists() for path in paths)


def find(path: Path, prefer: str = "best") -> Path:
    """Returns the checkpoint file for `path`: the file itself, or a run directory's best checkpoint, else its last.

    Args:
        prefer: "best" for the best checkpoint, or the last if there is no best; "last" for the last checkpoint.

    Raises:
        CheckpointError: there is no such file, or no checkpoint in the directory.
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
        f"{path.absolute()} contains no checkpoints/{' or checkpoints/'.join(names)}: "
        "give a run directory (flowtrain prints it last) or a .pt file"
    )
