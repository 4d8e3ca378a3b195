"""A streamed training file gives the same rows and labels as a file in memory. One window is read at a time."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run

from flowtrain.data.images import IDXImages
from flowtrain.data.tables import array, streaming
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.streaming import Moments, NpyRows, WindowedEpochs, draw_rows

pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.mark.parametrize("batch_size", [7, 64, 900, 2500])
def test_epoch_visits_each_training_row_once(
    batch_size: int,
    tmp_path: Path,
    table: Callable[..., tuple[str, np.ndarray]],
    open_streamed: Callable[..., ArrayData],
) -> None:
    path, values = table(tmp_path)
    data = open_streamed(path)
    assert (len(data.val), len(data.test)) == (60, 60)
    held = {float(row[0]) for row in torch.cat([data.val, data.test])}
    assert len(held) == 120
    steps = -(-3 * 880 // batch_size)
    drawn = torch.cat([data.train_batch(step, batch_size, 0) for step in range(steps)])
    assert drawn.dtype == torch.float32
    for epoch in range(3):
        rows = drawn[880 * epoch : 880 * (epoch + 1)]
        found = {float(row[0]) for row in rows}
        assert len(found) == 880
        assert found | held == set(range(1000))
        for row in rows[:50]:
            (at,) = np.flatnonzero(values[:, 0] == float(row[0]))
            np.testing.assert_array_equal(row.numpy(), values[at])
    # the order differs between epochs, between seeds, and from the file
    assert not torch.equal(drawn[:880], drawn[880:1760])
    assert not torch.equal(drawn[:batch_size], data.train_batch(0, batch_size, 1))


def test_batch_depends_only_on_step_size_and_seed(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, _ = table(tmp_path)
    data = open_streamed(path)
    found = {(step, seed): data.train_batch(step, 50, seed) for step in range(40) for seed in (0, 1)}
    again = open_streamed(path)
    for step, seed in reversed(found):
        assert torch.equal(again.train_batch(step, 50, seed), found[step, seed])


@pytest.mark.parametrize("memory_map", [True, False])
def test_shares_of_the_ranks_form_the_whole_batch(
    memory_map: bool, tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]]
) -> None:
    path, _ = table(tmp_path)
    data = ArrayData(path, memory_map=memory_map, label=2)
    for step in (0, 3, 12):
        shares = [slice(0, 33), slice(33, 67), slice(67, 101)]
        x = torch.cat([data.train_share(step, 101, 0, share) for share in shares])
        y = torch.cat([part for share in shares if (part := data.labels_share(step, 101, 0, share)) is not None])
        assert torch.equal(x, data.train_batch(step, 101, 0))
        labels = data.train_labels(step, 101, 0)
        assert labels is not None
        assert torch.equal(y, labels)


def test_crop_of_an_image_does_not_depend_on_the_rank(tmp_path: Path) -> None:
    for kind, n in (("train", 50), ("t10k", 20)):
        images, labels = np.random.default_rng(n).integers(0, 256, (n, 6, 8)), np.arange(n) % 10
        for what, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / f"{kind}-{what}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    data = IDXImages("mnist", str(tmp_path), n_val=10, crop=3)
    shares = [data.train_share(2, 20, 0, slice(*ends)) for ends in ((0, 7), (7, 20))]
    assert torch.equal(torch.cat(shares), data.train_batch(2, 20, 0))
    assert torch.equal(data.labels_share(2, 20, 0, slice(7, 20)), data.train_labels(2, 20, 0)[7:])  # type: ignore


def test_windows_are_shuffled() -> None:
    windows = WindowedEpochs(10_000, 100, 20, 1)
    seen = Counter(b[0] // 100 for w in range(5) for b in windows.blocks_of(0, w, 0))
    assert seen == Counter(range(100))
    first = [b[0] for b in windows.blocks_of(0, 0, 0)]
    assert first != sorted(first)
    assert windows.blocks_of(0, 0, 0) != windows.blocks_of(1, 0, 0)
    assert windows.mixed(0, 0, 50, 0).tolist() != windows.mixed(1, 0, 50, 0).tolist()
    # in a random order of 2,000 rows, the mean distance of neighbours in the file is a third of the rows
    place = np.argsort(windows.mixed(0, 0, 2000, 0))
    assert np.abs(np.diff(place)).mean() == pytest.approx(2000 / 3, rel=0.1)


@pytest.mark.parametrize("n", [1, 99, 100, 101, 1999, 2000, 2001])
def test_windows_cover_every_row_once(n: int) -> None:
    windows = WindowedEpochs(n, 100, 20, 1)
    found = []
    for piece in windows.pieces(3 * n, n, 0):
        blocks = windows.blocks_of(piece.epoch, piece.window, 0)
        positions = np.concatenate([np.arange(*block) for block in blocks])
        assert piece.epoch == 3
        found.append(positions[windows.mixed(piece.epoch, piece.window, len(positions), 0)][piece.start : piece.stop])
    assert sorted(np.concatenate(found).tolist()) == list(range(n))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.int32, np.uint8])
def test_moments_equal_numpy_on_the_training_rows(
    dtype: Any, tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, values = table(tmp_path, dtype, n=200)
    data = open_streamed(path)
    moments = data.statistics()
    assert moments is not None
    held = {float(row[0]) for row in torch.cat([data.val, data.test])}
    train = np.array([row for row in values.astype(np.float64) if float(row[0]) not in held])
    np.testing.assert_allclose(moments[0].numpy(), train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments[1].numpy(), train.std(0), rtol=1e-12)


def test_moments_are_accurate_far_from_zero() -> None:
    """Moments from sums of squares would lose all digits."""
    values = 1e9 + np.random.default_rng(0).standard_normal((1000, 2))
    moments = Moments(2)
    for part in np.split(values, [1, 1, 300, 301]):
        moments.add(part)
    np.testing.assert_allclose(moments.variance, (values - 1e9).var(0), rtol=1e-6)


def test_streamed_options_match_in_memory_options(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, values = table(tmp_path, np.int64)
    np.save(tmp_path / "test.npy", values[:10])
    data = open_streamed(path, columns=[1, 2], label=2, test_path=str(tmp_path / "test.npy"), dequantize=True)
    plain = ArrayData(path, columns=[1, 2], label=2, test_path=str(tmp_path / "test.npy"), dequantize=True)
    assert data.samples == plain.samples
    assert (data.classes, data.event_shape, data.columns) == (4, (1,), ("c1",))
    assert torch.equal(data.test, plain.test)
    assert data.test_labels is not None
    assert plain.test_labels is not None
    assert torch.equal(data.test_labels, plain.test_labels)
    x, y = data.train_batch(0, 300, 0), data.train_labels(0, 300, 0)
    assert (x.dtype, x.shape) == (torch.int64, (300, 1))
    assert y is not None
    by_row = {(int(row[1]), int(row[2])) for row in values}
    assert {(int(a), int(b)) for a, b in zip(x[:, 0], y, strict=True)} <= by_row
    images = open_streamed(path, columns=[2], event_shape=[1, 1, 1], levels=256)
    assert images.train_batch(0, 5, 0).shape == (5, 1, 1, 1)
    assert images.train_batch(0, 5, 0).dtype == torch.uint8


def test_memory_does_not_grow_with_steps(
    tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]], open_streamed: Callable[..., ArrayData]
) -> None:
    path, _ = table(tmp_path)
    data = open_streamed(path)
    for step in range(60):
        data.train_batch(step, 100, step % 3)
    store = data._store
    assert isinstance(store, streaming.StreamedStore)
    assert len(store._kept) == 2
    assert max(len(rows) for rows in store._kept.values()) == 16 * 8


def test_one_dimensional_array_is_one_column(tmp_path: Path, open_streamed: Callable[..., ArrayData]) -> None:
    np.save(tmp_path / "x.npy", np.arange(500.0))
    data = open_streamed(str(tmp_path / "x.npy"))
    assert data.event_shape == (1,)
    assert NpyRows(str(tmp_path / "x.npy")).read(3, 5).tolist() == [[3.0], [4.0]]


@pytest.mark.parametrize(("n", "k"), [(10, 10), (10, 3), (1000, 1)])
def test_rows_are_drawn_uniformly_without_replacement(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(n)
    for _ in range(400):
        rows = draw_rows(n, k, generator)
        assert len(set(rows.tolist())) == k
        counts[rows] += 1
    assert counts.sum() == 400 * k
    if n == 10:
        # each row is drawn equally often, within five binomial standard deviations
        assert np.abs(counts - 40 * k).max() <= 5 * np.sqrt(40 * k * (1 - k / n)) + 1e-9


def test_large_file_is_streamed_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Callable[..., tuple[str, np.ndarray]]
) -> None:
    path, _ = table(tmp_path)
    assert not isinstance(ArrayData(path)._store, streaming.StreamedStore)
    monkeypatch.setattr(streaming, "LARGE", 1000)
    assert isinstance(ArrayData(path)._store, streaming.StreamedStore)
    assert not isinstance(ArrayData(path, memory_map=False)._store, streaming.StreamedStore)


def test_resume_on_a_streamed_file_is_bitwise_exact(
    run: Run, tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]]
) -> None:
    path, _ = table(tmp_path)
    keys = ["data=array", f"data.path={path}", "data.memory_map=true", "model=affine", "trainer.batch_size=64"]
    keys += ["trainer.log_every=1", "trainer.val_every=5", "trainer.patience=null"]
    code, _, err = run("flowtrain", *keys, "trainer.steps=20", "trainer.lr_decay=constant", "hydra.run.dir=a")
    assert code == 0, err
    code, _, err = run("flowtrain", *keys, "trainer.steps=10", "trainer.lr_decay=constant", "hydra.run.dir=b")
    assert code == 0, err
    assert run("flowtrain", "resume=b", "trainer.steps=20")[0] == 0
    a, b = (
        [line.split('"seconds"')[0] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ab"
    )
    assert a == b


def test_wide_rows_are_shuffled_within_the_memory_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_streamed: Callable[..., ArrayData]
) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 2**14)
    monkeypatch.setattr(streaming, "WINDOW", 2**17)
    values = np.random.default_rng(0).standard_normal((900, 300)).astype(np.float32)
    values[:, 0] = np.arange(900)
    np.save(tmp_path / "x.npy", values)
    data = open_streamed(str(tmp_path / "x.npy"))
    x = data.train_batch(0, 50, 0)[:, 0]
    assert x.max() - x.min() > 400
    # a batch is not a run of consecutive rows of the file
    assert (x.diff() == 1).sum() < 5
    store = data._store
    assert isinstance(store, streaming.StreamedStore)
    assert sum(rows.nbytes for rows in store._kept.values()) <= 2**18


def test_windows_have_nearly_equal_size() -> None:
    windows = WindowedEpochs(17 * 16, 16, 8, 1)
    sizes = [len(windows.blocks_of(0, window, 0)) for window in range(3)]
    assert sorted(sizes) == [5, 6, 6]


def test_large_held_out_files_are_subsampled(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    table: Callable[..., tuple[str, np.ndarray]],
    open_streamed: Callable[..., ArrayData],
) -> None:
    path, _ = table(tmp_path)
    other = table(tmp_path, np.float64)[1]
    np.save(tmp_path / "val.npy", other)
    np.save(tmp_path / "test.npy", other[:40])
    monkeypatch.setattr(streaming, "LARGE", 900)
    caplog.set_level("INFO", "flowtrain")
    data = open_streamed(path, val_path=str(tmp_path / "val.npy"), test_path=str(tmp_path / "test.npy"))
    assert re.search(r"val\.npy: 60\b.*\b1,000\b", caplog.text)
    assert len({float(row[0]) for row in data.val}) == 60
    assert not {float(row[0]) for row in data.val} <= set(other[:200, 0])
    # a small held-out file keeps its order
    np.testing.assert_array_equal(data.test.numpy(), other[:40].astype(np.float32))
    assert open_streamed(path, val_path=str(tmp_path / "val.npy")).val.equal(data.val)


def test_number_of_held_out_rows_is_bounded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    table: Callable[..., tuple[str, np.ndarray]],
    open_streamed: Callable[..., ArrayData],
) -> None:
    path, _ = table(tmp_path)
    monkeypatch.setattr(array, "HELD_OUT_BYTES", 8 * 3 * 20)
    caplog.set_level("INFO", "flowtrain")
    data = open_streamed(path)
    assert (len(data.val), len(data.test)) == (20, 20)
    assert "at most 20 rows are held out" in caplog.text


@pytest.mark.parametrize("memory_map", [True, False])
def test_share_of_a_rank_may_be_empty(
    memory_map: bool, tmp_path: Path, table: Callable[..., tuple[str, np.ndarray]]
) -> None:
    path, _ = table(tmp_path)
    assert ArrayData(path, memory_map=memory_map).train_share(0, 4, 0, slice(2, 2)).shape == (0, 3)
