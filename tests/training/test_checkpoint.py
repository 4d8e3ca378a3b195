"""Checkpoints run no code, and truncated, corrupted or foreign files are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MakeTrainer, ReadRows
from torch import nn

from flowtrain.flow import Flow
from flowtrain.runs.load import load
from flowtrain.training import checkpoint, checkpoint_files
from flowtrain.training.checkpoint import checksum
from flowtrain.utils.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("propagate_logs", "float32")


@pytest.fixture(scope="module")
def trained_affine(trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Returns the bytes of best.pt."""
    torch.set_default_dtype(torch.float32)
    run_dir = tmp_path_factory.mktemp("affine")
    trainer(run_dir, "model=affine", "trainer.steps=1").fit()
    return (run_dir / "checkpoints/best.pt").read_bytes()


@pytest.fixture
def best(trained_affine: bytes, tmp_path: Path) -> Path:
    """Returns a best.pt in an otherwise empty run directory."""
    path = tmp_path / "checkpoints/best.pt"
    path.parent.mkdir()
    path.write_bytes(trained_affine)
    return path


@pytest.mark.parametrize(
    ("where", "target"),
    [
        (("model", "_target_"), "os.system"),
        (("model", "_target_"), "flowtrain.bijections.base.Chain.os.system"),
        (("model", "_target_"), "flowtrain.training.checkpoint.save"),
        (("model", "_target_"), "flowtrain.models.realnvp.torch.load"),
        (("solver", "method"), {"_target_": "builtins.eval"}),
        (("model", "note"), "${oc.env:HOME}"),
    ],
)
def test_loading_a_checkpoint_runs_no_code(where: tuple[str, str], target: Any, best: Path) -> None:
    content = checkpoint.load(best)
    content["config"][where[0]][where[1]] = target
    checkpoint.save(best, content)
    with pytest.raises(CheckpointError, match=r"would run|interpolation|cannot be imported"):
        load(best)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path, best: Path) -> None:
    whole = best.read_bytes()
    torn, foreign, pickled = (tmp_path / name for name in ("torn.pt", "foreign.pt", "pickled.pt"))
    torn.write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(2)}, foreign)
    torch.save({"model": nn.Linear(1, 1)}, pickled)
    for bad, words in ((torn, "complete"), (foreign, "lacks"), (pickled, "refused"), (tmp_path / "no.pt", "no such")):
        with pytest.raises(CheckpointError, match=words) as caught:
            load(bad)
        assert str(caught.value).isprintable()


def test_failed_save_keeps_the_old_checkpoint(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = best.read_bytes()
    content = checkpoint.load(best)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(best, content)
    assert best.read_bytes() == before
    assert [p.name for p in best.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_load_leaves_the_random_state_unchanged(best: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert isinstance(load(best), Flow)
    assert torch.equal(torch.rand(3), expected)


CONTENT = {
    "format": 1, "a": [1, 2.5, True, None, "x"], "t": torch.arange(6.0).view(2, 3),
    "b": (torch.tensor(3), torch.zeros(0)),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"a": [1, 2.5, True, None, "y"]},
        {"a": [1, 2.5, 1, None, "x"]},
        {"a": (1, 2.5, True, None, "x")},
        {"t": torch.arange(6.0).view(3, 2)},
        {"t": torch.arange(6).view(2, 3)},
        {"t": torch.nextafter(torch.arange(6.0), torch.ones(6)).view(2, 3)},
        {"b": (torch.tensor(3.0), torch.zeros(0))},
        {"c": 1},
    ],
)
def test_checksum_detects_every_change(change: dict[str, Any]) -> None:
    assert checksum(CONTENT) == checksum({**CONTENT, "t": CONTENT["t"].clone()})  # type: ignore[attr-defined]
    assert checksum(CONTENT) != checksum({**CONTENT, **change})


def test_checksum_refuses_expanded_tensors_and_objects() -> None:
    with pytest.raises(CheckpointError, match="less memory"):
        checksum({"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(CheckpointError, match="not a plain value"):
        checksum({"w": object()})


def test_flipped_bits_are_detected_or_harmless(best: Path) -> None:
    """At each of 500 random offsets, a flipped bit is refused or does not change the loaded content."""
    whole = best.read_bytes()
    right = checksum(checkpoint.load(best))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(500):
        at = int(torch.randint(len(whole), (), generator=generator))
        bit = int(torch.randint(8, (), generator=generator))
        best.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            content = checkpoint.load(best)
        except CheckpointError:
            refused += 1
        else:
            # padding, or an archive field that is never read
            assert checksum(content) == right
    assert refused > 150


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, saved_run: Callable[..., Path]
) -> None:
    path = saved_run(tmp_path)
    whole = bytearray(path.read_bytes())
    assert checkpoint.load(path)["step"] == 8
    if damage == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole.copy()
        # a longer range than the padding of the archive
        flipped[middle : middle + 256] = bytes(255 - b for b in flipped[middle : middle + 256])
        path.write_bytes({"torn": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    assert checkpoint.load(checkpoint_files.find(tmp_path, prefer="last"))["step"] == 4
    assert re.search(r"last\.previous\.pt.*step 4", caplog.text)


def test_resume_from_the_previous_checkpoint_is_bitwise_exact(
    tmp_path: Path, saved_run: Callable[..., Path], trainer: MakeTrainer, rows: ReadRows
) -> None:
    whole = saved_run(tmp_path / "whole")
    path = saved_run(tmp_path / "torn")
    path.write_bytes(path.read_bytes()[:1000])
    saved = checkpoint.load(path)
    overrides = ["model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=8"]
    trainer(tmp_path / "torn", *overrides, saved=saved).fit()
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")
    ends = [checkpoint.load(p)["weights"] for p in (path, whole)]
    assert all(torch.equal(ends[0][k], v) for k, v in ends[1].items())


def test_checkpoint_that_fails_verification_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_run: Callable[..., Path]
) -> None:
    path = saved_run(tmp_path)
    before, content = path.read_bytes(), checkpoint.load(path)
    save = torch.save

    def lossy(what: dict[str, Any], f: Any) -> None:
        save({**what, "step": 99}, f)

    monkeypatch.setattr(torch, "save", lossy)
    with pytest.raises(OSError, match="does not read back"):
        checkpoint.save(path, content)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


def test_checkpoints_without_checksum_load(tmp_path: Path, saved_run: Callable[..., Path]) -> None:
    path = saved_run(tmp_path)
    content = checkpoint.load(path)
    torch.save({**content, "format": 1}, path)
    assert checkpoint.load(path)["step"] == 8
    torch.save(content, path)
    checkpoint.previous(path).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)
