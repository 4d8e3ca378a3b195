"""Removes what a refused command wrote before its mistake was found.

Only new, empty directories and the files of a run that never began are removed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from flowtrain.training import checkpoint

# what a run writes before its training begins
FILES = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "flowtrain.log", "metrics.jsonl",
         "checkpoints/teacher.pt")  # fmt: skip
# the directories that Hydra creates for this command, innermost first
_MADE: list[Path] = []


class Made(Callback):
    """Hydra's callback that records the directory of a run or a sweep before Hydra creates it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        note(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        note(Path(str(config.hydra.sweep.dir)))


def note(folder: Path) -> None:
    """Records which of a directory and its parents do not exist yet."""
    folder = folder.absolute()
    _MADE[:] = [path for path in (folder, *folder.parents) if not path.exists()]


def is_new(folder: Path) -> bool:
    """Whether this command creates `folder`, one of the directories recorded by `note`."""
    return folder.absolute() in _MADE


@contextmanager
def tidied() -> Iterator[None]:
    """On exit, removes the directories that the command has created and that are empty, also after an error."""
    _MADE.clear()
    try:
        yield
    finally:
        remove_empty(_MADE)


def remove_empty(folders: list[Path]) -> None:
    """Removes empty directories, innermost first. Stops at the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def holds_run(run_dir: Path) -> bool:
    """Whether training has begun in a directory."""
    metrics = run_dir / "metrics.jsonl"
    measured = metrics.exists() and metrics.stat().st_size > 0
    return measured or (run_dir / "result.json").exists() or checkpoint.any_in(run_dir)


@contextmanager
def unless_begun(run_dir: Path, refused: tuple[type[BaseException], ...]) -> Iterator[None]:
    """If one of the `refused` errors is raised inside before training has begun, removes the files written so far.

    Files that existed before are kept, and configs among them get their old content back. Only the process that holds
    the lock of the directory may call this.
    """
    paths = [run_dir / name for name in FILES]
    before = {path: path.read_bytes() if path.suffix == ".yaml" else None for path in paths if path.exists()}
    try:
        yield
    except refused:
        if not holds_run(run_dir):
            boards = [*run_dir.glob("tensorboard/events.out.tfevents.*")] if is_new(run_dir) else []
            for path in (*paths, *boards):
                content = before.get(path)
                if content is not None:
                    path.write_bytes(content)
                elif path not in before:
                    path.unlink(missing_ok=True)
                    remove_empty([path.parent] if path.parent != run_dir else [])
        raise
