"""The data records in checkpoints: row counts and checksums, class counts, and columns with noise."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Evaluate, Refused, Run, Train
from helpers.files import normal, npy, write_set, written

import flowtrain
from flowtrain.bijections.linear import Affine
from flowtrain.data.base import Samples, changes
from flowtrain.data.images import IDXImages
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.evaluation.log_likelihood import marginal
from flowtrain.flow import Flow
from flowtrain.models.realnvp import realnvp
from flowtrain.runs.load import samples_of
from flowtrain.training import checkpoint
from flowtrain.utils.errors import FlowtrainError

# Records of the data

FAST = ["model=affine", "trainer.steps=4", "trainer.batch_size=64", "trainer.plot_every=null"]


def record_changes(before: ArrayData, now: ArrayData, *sets: str) -> str | None:
    return changes(before.record, now.record, sets or ("file", "val", "test"))


def test_data_record_depends_only_on_the_values(tmp_path: Path) -> None:
    values = np.round(normal(60, 3), 4)
    array = npy(tmp_path / "a.npy", values)
    text = tmp_path / "b.csv"
    np.savetxt(text, values, delimiter=";", header="x;y;z", comments="", fmt="%.6g")
    # the record depends on neither the location nor the format of the file
    assert record_changes(ArrayData(array), ArrayData(str(text))) is None
    big, small = ArrayData(array, memory_map=True), ArrayData(array)
    assert record_changes(big, small, "file") is None
    assert "data.memory_map" in str(record_changes(big, small, "test"))
    for name, other in {
        "a value": values + np.eye(60, 3) * 1e-3,
        "an order": values[::-1].copy(),
        "a row more": np.concatenate([values, values[:1]]),
    }.items():
        now = ArrayData(npy(tmp_path / "c.npy", other))
        assert all(record_changes(ArrayData(array), now, part) for part in ("file", "val", "test")), name
    for options in ({"seed": 1}, {"test_fraction": 0.2}):
        assert record_changes(ArrayData(array), ArrayData(array, **options), "test"), options
    assert record_changes(ArrayData(array), ArrayData(array, columns=[0, 1]), "file")


@pytest.mark.parametrize("memory_map", [False, True])
def test_data_record_does_not_depend_on_centering(
    memory_map: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = npy(tmp_path / "a.npy", normal(60, 2) + np.array([1e5, 0]))
    centered = ArrayData(path, memory_map=memory_map)
    assert centered.offset is not None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said))
    plain = ArrayData(path, memory_map=memory_map, center=False)
    assert plain.offset is None
    assert centered.record == plain.record


def test_data_record_includes_the_labels(tmp_path: Path) -> None:
    values = np.column_stack([normal(40, 2), np.arange(40) % 2])
    before = ArrayData(npy(tmp_path / "a.npy", values), label=2)
    values[5, 2] = 1 - values[5, 2]
    path = npy(tmp_path / "b.npy", values)
    now = ArrayData(path, label=2)
    assert record_changes(before, now, "file")
    assert changes(before.record, now.record, samples_only=True) is None
    assert record_changes(ArrayData(path, label=2, memory_map=True), ArrayData(path, label=2), "file") is None


def test_each_held_out_file_has_a_separate_record(tmp_path: Path) -> None:
    path, test = npy(tmp_path / "a.npy", normal(40, 2)), npy(tmp_path / "test.npy", normal(10, 2, seed=1))
    before = ArrayData(path, test_path=test)
    npy(tmp_path / "a.npy", normal(41, 2))
    grown = ArrayData(path, test_path=test)
    assert record_changes(before, grown, "test") is None
    assert "40 rows and has 41" in str(record_changes(before, grown, "val"))
    npy(tmp_path / "test.npy", normal(11, 2, seed=1))
    assert "10 rows and has 11" in str(record_changes(grown, ArrayData(path, test_path=test)))


def test_image_record_detects_a_changed_split(tmp_path: Path) -> None:
    root = str(write_set(tmp_path / "mnist").parent)
    before, few = (IDXImages("mnist", root, n_val=10, n_test=n) for n in (None, 5))
    assert changes(before.record, few.record) is None
    other = IDXImages("mnist", root, n_val=20)
    assert changes(before.record, other.record, ["val"])
    assert changes(before.record, other.record, ["test"]) is None
    assert sum(before.class_counts) + 10 == sum(other.class_counts) + 20


@pytest.fixture
def grown(trained: Train, tmp_path: Path) -> tuple[str, Path]:
    """Trains a run on 60 rows, whose file then grows to 63 rows."""
    path = tmp_path / "t.npy"
    np.save(path, normal(60, 2))
    run_dir = trained("data=array", f"data.path={path}")
    np.save(path, np.concatenate([normal(60, 2), normal(3, 2, seed=1)]))
    return run_dir, path


def test_changed_data_file_is_refused(run: Run, tmp_path: Path, grown: tuple[str, Path], evaluated: Evaluate) -> None:
    run_dir, path = grown
    kept = {p: p.read_bytes() for p in Path(run_dir).rglob("*") if p.is_file() and p.suffix != ".log"}
    for command, *arguments in (
        ("floweval", f"ckpt={run_dir}"),
        ("floweval", f"ckpt={run_dir}", "split=val"),
        ("flowtrain", f"resume={run_dir}", "trainer.steps=8"),
        ("flowtrain", f"resume={run_dir}", "trainer.steps=8", f"data.path={path}"),
    ):
        code, out, err = run(command, *arguments)
        assert (code, out) == (2, ""), err
        assert len(err.strip().splitlines()) == 1
        assert "60 rows and has 63" in err
    assert {p: p.read_bytes() for p in kept} == kept
    # the option that the message suggests works
    assert evaluated(run_dir, f"data.path={path}", name=f"eval-{path.stem}.json")["n"] == 63
    code, out, err = run("flowtrain", f"from={run_dir}", *FAST[1:], "hydra.run.dir=new")
    assert code == 0, err
    assert "60 rows and has 63" in err
    # an explicit data.path is scored, with a warning
    code, _, err = run("floweval", f"ckpt={run_dir}", f"data.path={path}", "split=test")
    assert code == 0
    assert "60 rows and has 63" in err
    # the same rows in another file are accepted
    np.save(tmp_path / "moved.npy", normal(60, 2))
    code, _, err = run("floweval", f"ckpt={run_dir}", "data.path=moved.npy", "split=test")
    assert (code, err) == (0, "")
    # an explicit test file replaces the test split
    np.save(tmp_path / "test.npy", normal(5, 2, seed=2))
    code, _, err = run("floweval", f"ckpt={run_dir}", "data.test_path=test.npy")
    assert (code, err) == (0, "")
    # the file is restored, but another split is requested
    np.save(path, normal(60, 2))
    for key in ("data.seed=1", "data.test_fraction=0.5"):
        code, _, err = run("floweval", f"ckpt={run_dir}", key)
        assert (code, "data.seed" in err) == (2, True), err


def test_checkpoints_without_a_data_record_load_and_resume(
    run: Run, grown: tuple[str, Path], evaluated: Evaluate
) -> None:
    run_dir, _ = grown
    for name in ("best", "last"):
        file = Path(run_dir) / f"checkpoints/{name}.pt"
        saved = checkpoint.load(file)
        for key in ("record", "class_counts", "noisy"):
            del saved["samples"][key]
        checkpoint.save(file, saved)
    assert evaluated(run_dir)["n"] == 6
    code, _, err = run("flowtrain", f"resume={run_dir}", "trainer.steps=8")
    assert code == 0, err


# Classes


def labelled(tmp_path: Path, n: int = 400) -> str:
    """Writes two columns that depend on the label, which is 1 (90% of rows), 3 or 5."""
    label = np.random.default_rng(0).choice([1, 3, 5], n, p=[0.9, 0.05, 0.05])
    return npy(tmp_path / "l.npy", np.column_stack([normal(n, 2) + 10 * label[:, None], label]))


@pytest.mark.parametrize("memory_map", [False, True])
def test_class_counts_include_empty_classes(tmp_path: Path, memory_map: bool, caplog: pytest.LogCaptureFixture) -> None:
    data = ArrayData(labelled(tmp_path), label=2, memory_map=memory_map)
    labels = data.train_labels(0, 320, 0)
    assert labels is not None
    assert data.classes == 6
    assert data.samples.class_counts == tuple(torch.bincount(labels, minlength=6).tolist())
    assert [r.getMessage().count("0, 2, 4 of 0 to 5") for r in caplog.records if r.levelname == "WARNING"] == [1]


def test_held_out_class_without_training_rows_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.column_stack([normal(40, 2), np.arange(40) % 2])
    path = npy(tmp_path / "a.npy", values)
    values[:3, 2] = 2
    test = npy(tmp_path / "b.npy", values)
    data = ArrayData(path, test_path=test, label=2)
    assert data.class_counts[2] == 0
    assert "3 rows of the test set" in caplog.text
    caplog.clear()
    RowsToScore(test, Samples((2,), classes=3, class_counts=(18, 18, 0)), label=2)
    assert "3 rows of the scored set" in caplog.text


def test_labels_are_sampled_by_class_frequency() -> None:
    flow = realnvp((2,), layers=1, hidden=[4], conditional=True, classes=4).eval()
    flow.class_counts = (0, 30, 0, 10)
    assert flow.cycled_labels(5).tolist() == [1, 3, 1, 3, 1]
    labels = flow.drawn_labels(4000)
    assert torch.bincount(labels, minlength=4).tolist() == pytest.approx([0, 3000, 0, 1000], abs=150)
    assert not torch.equal(labels, flow.drawn_labels(4000))
    torch.manual_seed(3)
    samples = flow.sample(50)
    torch.manual_seed(3)
    drawn = flow.drawn_labels(50)
    torch.testing.assert_close(samples, flow(torch.randn(50, 2), drawn))
    for label in (0, torch.tensor([1, 2])):
        with pytest.raises(FlowtrainError, match=r"no rows? of this class.*1, 3"):
            flow.sample(2, label=label)
    # rows of a class without training rows can still be scored
    assert flow.log_prob(torch.zeros(1, 2), 0).isfinite().all()
    # checkpoints of earlier versions have no class counts
    flow.class_counts = ()
    assert flow.drawn_labels(5).tolist() == flow.cycled_labels(5).tolist() == [0, 1, 2, 3, 0]


def test_marginal_weights_classes_by_frequency() -> None:
    flow = realnvp((2,), layers=2, hidden=[4], conditional=True, classes=3).eval()
    for p in flow.parameters():
        p.data.normal_()
    x = torch.randn(5, 2)
    each = torch.stack([flow.log_prob(x, y) for y in range(3)]).exp()
    torch.testing.assert_close(marginal(flow, x).exp(), each.mean(0))
    flow.class_counts = (1, 0, 3)
    torch.testing.assert_close(marginal(flow, x).exp(), each[0] / 4 + 3 * each[2] / 4)


def test_commands_handle_labels_with_gaps(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "flowtrain", *FAST[1:], "data=array", f"data.path={labelled(tmp_path)}", "data.label=2", "model=realnvp",
        "model.conditional=true", "model.hidden=[8]", "model.layers=2", "recipe=none",
    )  # fmt: skip
    assert (code, err.count("0, 2, 4 of 0 to 5")) == (0, 1), err
    run_dir = out.splitlines()[-1]
    code, _, err = run("flowsample", f"ckpt={run_dir}", "n=300", "out=s.npy")
    assert code == 0, err
    flow = flowtrain.load(run_dir)
    assert [int(n > 0) for n in flow.class_counts] == [0, 1, 0, 1, 0, 1]
    # the labels are drawn from the seed, with the frequencies in the training data
    torch.manual_seed(0)
    np.testing.assert_allclose(np.load("s.npy"), flow.sample(300), rtol=1e-5)
    code, out, err = run("flowsample", f"ckpt={run_dir}", "label=2")
    assert (code, out) == (2, "")
    assert "1, 3, 5" in err
    code, _, err = run("flowsample", f"ckpt={run_dir}", "label=3", "n=5", "out=s.npy")
    assert code == 0, err
    code, _, err = run("flowsample", f"ckpt={run_dir}", "animate=true", "n=5", "out=a.gif")
    assert code == 0, err


# Columns with noise


def test_samples_are_rounded_back_to_integers() -> None:
    flow = Flow((3,), Affine(3), noisy=(0, 2)).eval()
    x = torch.tensor([[1.7, 1.7, -0.2]])
    assert flow.quantized(x).tolist() == [[1.0, 1.7, -1.0]]
    assert x.tolist() == [[1.7, 1.7, -0.2]]
    assert flow.dequantized(x).tolist() == x.tolist()


def test_commands_dequantize_selected_columns(run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate) -> None:
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.integers(0, 9, 300), 10 + rng.normal(size=300)])
    path = written(tmp_path / "t.csv", "n,x", rows)
    run_dir = trained("data=array", f"data.path={path}", "data.dequantize=[n]")
    # the noise on the rows of a file is fixed, and the flow is the density of value plus noise
    for name in ("a.npy", "b.npy"):
        evaluated(run_dir, f"data.path={path}", f"scores={name}", name="eval-t.json")
    first, second = np.load("a.npy"), np.load("b.npy")
    np.testing.assert_array_equal(first, second)
    flow = flowtrain.load(run_dir)
    low, high = (flow.log_prob(torch.from_numpy(rows) + torch.tensor([u, 0.0])).detach() for u in (0.0, 1.0))
    ends = torch.stack([low, high])
    inner = torch.from_numpy(first)
    assert ((inner > ends.amin(0) - 1e-5) | (inner > ends.amax(0) - 0.5)).all()
    assert np.unique(first - low.numpy()).size > 250
    code, _, err = run("flowsample", f"ckpt={run_dir}", "n=50", "out=s.npy")
    assert code == 0, err
    samples = np.load("s.npy")
    np.testing.assert_array_equal(samples[:, 0], np.floor(samples[:, 0]))
    assert (samples[:, 1] != np.floor(samples[:, 1])).all()
    for key, words in {"data.dequantize=false": "columns 0", "dequantization_samples=3": "noise"}.items():
        code, out, err = run("floweval", f"ckpt={run_dir}", key)
        assert (code, out) == (2, ""), err
        assert words in err
    new = written(tmp_path / "bad.csv", "n,x", rows + 0.5)
    code, _, err = run("floweval", f"ckpt={run_dir}", f"data.path={new}")
    assert (code, "'n'" in err) == (2, True)


DAMAGED: dict[str, Any] = {
    "noisy": (3,),
    "class_counts": (1,),
    "record": (("file", -1, "x"),),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_damaged_sample_spec_is_refused(key: str, refused: Refused) -> None:
    good: dict[str, Any] = {"integer_valued": False, "noisy": (1,), "class_counts": [2, 3], "classes": 2}
    good["record"] = [["file", 5, "ab"]]
    found = samples_of({"event_shape": [2], "samples": good})
    assert (found.noisy, found.class_counts, found.record) == ((1,), (2, 3), (("file", 5, "ab"),))
    refused(
        lambda: samples_of({"event_shape": [2], "samples": {**good, key: DAMAGED[key]}}), FlowtrainError, ["samples"]
    )


@pytest.mark.parametrize("memory_map", [False, True])
def test_noise_and_offset_apply_to_separate_columns(memory_map: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts, large = rng.integers(0, 5, 300), 1e9 + rng.normal(size=300)
    path = npy(tmp_path / "t.npy", np.column_stack([counts, large]))
    data = ArrayData(path, dequantize=[0], memory_map=memory_map)
    assert data.offset is not None
    for x in (data.train_batch(3, 50, 0), data.train_rows(240), data.val, data.test):
        assert x.dtype == torch.float64
        # the real column has the values of the file, and the integer column has noise added
        assert set(x[:, 1].tolist()) <= set(large.tolist())
        u = x[:, 0] - x[:, 0].floor()
        assert 0.2 < float(u.mean()) < 0.8
        assert set(x[:, 0].floor().tolist()) <= set(range(5))
    rows = data.train_rows(240)
    moments = data.statistics()
    assert moments is not None
    # the baseline is a Gaussian over the same noisy rows as the flow
    torch.testing.assert_close(rows.var(0, correction=0).sqrt(), moments[1], rtol=0.05, atol=0)


def test_scoring_and_sampling_do_not_repeat_training_warnings(run: Run, tmp_path: Path) -> None:
    rows = normal(80, 2)
    path = npy(tmp_path / "t.npy", np.column_stack([rows[:, 0], -rows[:, 0]]))
    code, out, err = run("flowtrain", *FAST, "data=array", f"data.path={path}")
    assert code == 0
    assert err.count("dependent") == 1
    run_dir = out.splitlines()[-1]
    for command in (["floweval"], ["floweval", "split=val"], ["flowsample", "n=10"]):
        code, _, err = run(command[0], f"ckpt={run_dir}", *command[1:])
        assert code == 0
        assert "dependent" not in err, command
    # warnings about other data are printed once
    new = npy(tmp_path / "new.npy", np.column_stack([rows[:, 0], rows[:, 0]]))
    _, _, err = run("floweval", f"ckpt={run_dir}", f"data.path={new}", "split=test", f"ood={path}")
    assert err.count("dependent") == 1
