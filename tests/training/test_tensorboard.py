"""logger=[jsonl,tensorboard]: TensorBoard shows the contents of metrics.jsonl, result.json and plots/."""

import errno
import math
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import matplotlib.image
import numpy as np
import pytest
from helpers import Run
from helpers.files import write_set

from flowtrain.training import checkpoint, tensorboard
from flowtrain.training.metrics import Metrics
from flowtrain.utils.errors import ConfigError

EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
LOGGER = "logger=[jsonl,tensorboard]"
SMALL = [
    "model=affine", "trainer.steps=6", "trainer.batch_size=16", "trainer.log_every=1", "trainer.val_every=2",
    "trainer.plot_every=2", "data.n_val=32", "data.n_test=32",
]  # fmt: skip


def test_tensorboard_contains_every_metric_and_figure(
    run: Run,
    tmp_path: Path,
    read_tensorboard: Callable[..., Any],
    expected_scalars: Callable[..., Any],
    expected_pictures: Callable[..., Any],
) -> None:
    code, _, err = run("flowtrain", *SMALL, LOGGER, f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    scalars, images = read_tensorboard(tmp_path / "r")
    assert scalars == expected_scalars(tmp_path / "r")
    names = {name for name, _ in scalars}
    assert {"train/nll", "val/nll", "train/grad_norm", "train/lr", "train/seconds", "test/nll", "test/kl"} <= names
    assert not {name for name in names if name.endswith(("step", "split", "nfe_forward", "bits_per_dim"))}
    assert images == expected_pictures(tmp_path / "r", 6)
    assert set(images) == {("samples", 2), ("samples", 4), ("samples", 6)} | {
        (f"final/{name}", 6) for name in ("samples", "curves", "calibration", "transport", "paths")
    }
    for png in images.values():
        assert matplotlib.image.imread(BytesIO(png)).ndim == 3


def test_tensorboard_contains_figures_of_image_runs(
    run: Run, tmp_path: Path, read_tensorboard: Callable[..., Any], expected_pictures: Callable[..., Any]
) -> None:
    root = write_set(tmp_path / "data/mnist").parent
    keys = [
        "data=mnist",
        f"data.root={root}",
        "data.n_val=10",
        "trainer.steps=1",
        "trainer.batch_size=8",
        "recipe=none",
    ]
    code, _, err = run("flowtrain", *keys, "model=affine", LOGGER, f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    scalars, images = read_tensorboard(tmp_path / "r")
    assert {("train/bits_per_dim", 1), ("val/bits_per_dim", 1), ("test/bits_per_dim", 1)} <= set(scalars)
    assert ("test/kl", 1) not in scalars
    assert {("final/reconstructions", 1), ("final/temperature", 1), ("final/interpolation", 1)} <= set(images)
    assert images == expected_pictures(tmp_path / "r", 1)


def test_figure_sizes_are_recorded(run: Run, tmp_path: Path) -> None:
    board = new_board(tmp_path / "tensorboard")
    picture = np.random.default_rng(0).random((5, 7, 4))
    matplotlib.image.imsave(tmp_path / "odd_name_1234567.png", picture)
    board.picture(tmp_path / "odd_name_1234567.png", 1234567)
    board.picture(tmp_path / "missing.png", 1)
    (tmp_path / "empty.png").touch()
    board.picture(tmp_path / "empty.png", 1)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Tags()["images"] == ["odd_name"]
    image = read.Images("odd_name")[0]
    assert (image.step, image.width, image.height) == (1234567, 7, 5)


def test_default_logger_writes_no_tensorboard_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_tensorboard: None
) -> None:
    assert run("flowtrain", *SMALL, f"hydra.run.dir={tmp_path}/r")[0] == 0
    assert not (tmp_path / "r/tensorboard").exists()
    assert checkpoint.load(tmp_path / "r/checkpoints/last.pt")["config"]["logger"] == ["jsonl"]


@pytest.mark.parametrize(
    ("given", "shown", "choices"),
    [
        ("[jsonl,wandb]", "logger[1]=wandb", ["jsonl", "tensorboard"]),
        ("[jsonl,[tensorboard]]", "logger[1]=['tensorboard']", ["jsonl", "tensorboard"]),
        ("tensorboard", "logger=tensorboard", ["logger=[jsonl,tensorboard]"]),
        ("null", "logger=None", ["logger=[jsonl,tensorboard]"]),
        ("[tensorboard]", "logger=[tensorboard]", ["logger=[jsonl,tensorboard]"]),
        ("[]", "logger=[]", ["logger=[jsonl]"]),
    ],
)
def test_invalid_loggers_are_refused(given: str, shown: str, choices: list[str], run: Run, tmp_path: Path) -> None:
    code, out, err = run("flowtrain", *SMALL, f"logger={given}", f"hydra.run.dir={tmp_path}/r")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"flowtrain: {shown}: ")
    assert [choice for choice in choices if choice not in err] == []
    assert not (tmp_path / "r/checkpoints").exists()


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(m for m in sys.modules if m.split(".")[0] == "tensorboard"), "tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_tensorboard_message_names_the_extra(run: Run, tmp_path: Path, without_tensorboard: None) -> None:
    code, out, err = run("flowtrain", *SMALL, LOGGER, f"hydra.run.dir={tmp_path}/r")
    assert (code, out) == (2, "")
    assert err.startswith("flowtrain: logger=[jsonl,tensorboard] needs tensorboard, which ")
    assert "'flowtrain[tensorboard]'" in err
    assert err.endswith(" or give logger=[jsonl]\n")
    assert not (tmp_path / "r/checkpoints").exists()


def test_only_rank_zero_writes_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowtrain.utils.ranks.rank", lambda: 1)
    assert tensorboard.board(["jsonl", "tensorboard"], tmp_path) is None
    with pytest.raises(ConfigError):
        tensorboard.board(["tensorboard"], tmp_path)


def new_board(folder: Path) -> tensorboard.Board:
    board = tensorboard.board(["jsonl", "tensorboard"], folder)
    assert board is not None
    return board


class Disk:
    """Limits the bytes that can be appended to files in a folder, like a full disk."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = math.inf
        opened = Path.open

        def open_file(path: Path, *arguments: Any, **named: Any) -> Any:
            file = opened(path, *arguments, **named)
            return _Full(file, self) if path.is_relative_to(folder) and arguments == ("ab",) else file

        monkeypatch.setattr(Path, "open", open_file)


class _Full:
    def __init__(self, file: IO[bytes], disk: Disk) -> None:
        self.file, self.disk, self.tell = file, disk, file.tell

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        fits = int(min(len(data), self.disk.room))
        self.file.write(data[:fits])
        self.disk.room -= fits
        if fits < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path / "r/tensorboard", monkeypatch)


def test_full_disk_gives_one_warning(
    run: Run, tmp_path: Path, disk: Disk, read_tensorboard: Callable[..., Any], expected_scalars: Callable[..., Any]
) -> None:
    disk.room = 1000
    code, _, err = run("flowtrain", *SMALL, LOGGER, f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    assert err.count("cannot be written") == 1
    assert "tensorboard/events.out.tfevents.000000" in err
    assert "[Errno 28]" in err
    assert "Traceback" not in err
    scalars, _ = read_tensorboard(tmp_path / "r")
    assert scalars.items() <= expected_scalars(tmp_path / "r").items()
    assert scalars
    assert (tmp_path / "r/result.json").exists()


def test_entries_are_written_once_the_disk_has_space(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, read_tensorboard: Callable[..., Any]
) -> None:
    (tmp_path / "r").mkdir()
    matplotlib.image.imsave(tmp_path / "x_000000.png", np.zeros((5, 7, 4)))
    metrics = Metrics(tmp_path / "r/metrics.jsonl", 0)
    board = new_board(tmp_path / "r/tensorboard")
    board.follow(metrics, 0, tmp_path / "r/plots")
    for step in range(1, 9):
        disk.room = 10 if step in (2, 3, 5) else math.inf
        board.picture(tmp_path / "x_000000.png", step)
        metrics.write(step=step, split="train", nll=1.5 * step, none=None, bad=math.nan, word="no", large=10**400)
    metrics.back_to(7)
    scalars, images = read_tensorboard(tmp_path / "r")
    assert scalars == {("train/nll", step): 1.5 * step for step in range(1, 8)}
    # pictures are not queued: TensorBoard has the pictures that fitted, and the first picture that did not fit
    assert [step for _, step in images] == [1, 2, 5, 7]
    assert len([r for r in caplog.records if r.name == "flowtrain"]) == 1


def test_uncreatable_directory_does_not_fail_the_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/tensorboard").write_text("a file")
    code, _, err = run("flowtrain", *SMALL, LOGGER, f"hydra.run.dir={tmp_path}/r")
    assert code == 0, err
    assert err.count("cannot be written") == 1
