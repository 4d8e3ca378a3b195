"""Files read with a checkpoint: `floweval data.path=` and `ood=` use the columns that the flow was trained on."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Evaluate, Refused, Run, Train
from helpers.files import npy, written

import flowtrain
from flowtrain.data.tables.array import ArrayData
from flowtrain.data.tables.rows_to_score import RowsToScore
from flowtrain.training import checkpoint
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError

MEAN, STD = np.array([3.0, -1.0, 8.0, 0.0]), np.array([1.0, 5.0, 0.1, 2.0])
# a label column with two classes follows the samples
DATA = np.column_stack([np.random.default_rng(0).normal(MEAN, STD, (60, 4)).round(3), np.arange(60) % 2])


def table(path: Path, columns: list[int], names: str | None = None) -> str:
    """Writes the given columns of the data, with a header for text files."""
    if path.suffix == ".npy":
        return npy(path, DATA[:, columns])
    return str(written(path, names or ",".join("abcdy"[i] for i in columns), DATA[:, columns]))


def rows_to_score(data: ArrayData, path: str, label: Any = None, columns: Any = None, **given: Any) -> RowsToScore:
    """Reads a file as `floweval` does with the checkpoint of a run on `data`."""
    return RowsToScore(path, data.samples, label=label, columns=columns, **given)


POSITIONS: list[tuple[str, Any, Any]] = [
    # positions refer to the training file
    ("same.npy", [1, 0], [1, 0]),
    ("same.npy", ["0:2"], [0, 1]),
    ("same.npy", [-2, 0], [3, 0]),
    ("same.npy", ["1:4:2"], [1, 3]),
    ("same.npy", [4, 2], [4, 2]),
]


@pytest.mark.parametrize(("name", "columns", "expected"), POSITIONS, ids=str)
@pytest.mark.parametrize("header", [True, False])
def test_positions_select_the_training_columns(
    tmp_path: Path, name: str, columns: Any, expected: list[int], header: bool
) -> None:
    """Positions select the same columns in files with and without names, after training on a file with or without
    names."""
    files = [table(tmp_path / "t.npy", list(range(5))), table(tmp_path / "t.csv", list(range(5)))]
    data = ArrayData(files[header], columns=columns)
    for path in files:
        np.testing.assert_array_equal(rows_to_score(data, path, columns=columns).test, DATA[:, expected])


def test_file_with_only_the_selected_columns_keeps_its_order(tmp_path: Path) -> None:
    data = ArrayData(table(tmp_path / "t.npy", list(range(5))), columns=[3, 1])
    chosen = table(tmp_path / "chosen.npy", [3, 1])
    # the new file has no columns 3 and 1, which the training file had
    np.testing.assert_array_equal(rows_to_score(data, chosen, columns=[3, 1]).test, DATA[:, [3, 1]])
    # positions that exist select columns; data.columns overrides this
    data = ArrayData(table(tmp_path / "two.npy", [0, 1]), columns=[1, 0])
    np.testing.assert_array_equal(rows_to_score(data, chosen, columns=[1, 0]).test, DATA[:, [1, 3]])
    np.testing.assert_array_equal(rows_to_score(data, chosen, columns=["0:2"], asked={"columns"}).test, DATA[:, [3, 1]])


def test_different_column_count_is_refused_without_names(tmp_path: Path, refused: Refused) -> None:
    data = ArrayData(table(tmp_path / "t.csv", [0, 1]))
    np.testing.assert_array_equal(rows_to_score(data, table(tmp_path / "m.csv", [2, 1, 4, 0])).test, DATA[:, [0, 1]])
    for columns, count in (([0, 1, 2], "3 columns"), ([0], "1 column,")):
        path = table(tmp_path / "n.npy", columns)
        refused(lambda path=path: rows_to_score(data, path), DataError, [path, count, "trained on 2", "data.columns"])
    path = table(tmp_path / "o.csv", [0, 2])
    refused(lambda: rows_to_score(data, path), ConfigError, [path, "'b'"])


def test_duplicate_names_are_matched_by_position(tmp_path: Path, refused: Refused) -> None:
    path = table(tmp_path / "t.csv", [0, 1, 2], "a,a,b")
    for columns, expected in ((None, [0, 1, 2]), ([2, 1], [2, 1])):
        data = ArrayData(path, columns=columns)
        np.testing.assert_array_equal(rows_to_score(data, path, columns=columns).test, DATA[:, expected])
    data = ArrayData(path)
    # the order differs, and duplicate names do not determine the order
    other = table(tmp_path / "o.csv", [2, 0, 1], "b,a,a")
    refused(lambda: rows_to_score(data, other), DataError, [other, "'b', 'a', 'a'", "data.columns"])
    # names give the order of the columns if the names that are needed are unique
    data = ArrayData(table(tmp_path / "u.csv", [0, 1]))
    np.testing.assert_array_equal(
        rows_to_score(data, table(tmp_path / "v.csv", [1, 2, 3, 0], "b,c,c,a")).test, DATA[:, [0, 1]]
    )


LABELS: list[tuple[Any, list[int], str, list[int], Any]] = [
    # label in training; the new file's columns and ending, the expected samples, whether it has labels
    (4, [0, 1, 2, 3, 4], "csv", [0, 1, 2, 3], True),
    (4, [0, 1, 2, 3, 4], "npy", [0, 1, 2, 3], True),
    (4, [4, 0, 3, 2, 1], "csv", [0, 1, 2, 3], True),
    ("y", [4, 0, 3, 2, 1], "csv", [0, 1, 2, 3], True),
    (-1, [4, 0, 3, 2, 1], "csv", [0, 1, 2, 3], True),
    (4, [0, 1, 2, 3], "npy", [0, 1, 2, 3], False),
    (4, [3, 0, 2, 1], "csv", [0, 1, 2, 3], False),
    ("y", [0, 1, 2, 3], "npy", [0, 1, 2, 3], False),
]


@pytest.mark.parametrize(("label", "columns", "ending", "expected", "labelled"), LABELS, ids=str)
def test_labels_are_found_by_their_training_name(
    tmp_path: Path, label: Any, columns: list[int], ending: str, expected: list[int], labelled: bool
) -> None:
    data = ArrayData(table(tmp_path / "t.csv", list(range(5))), label=label)
    assert data.samples.label == "y"
    rows = rows_to_score(data, table(tmp_path / f"n.{ending}", columns), label=label)
    np.testing.assert_array_equal(rows.test, DATA[:, expected])
    assert (rows.test_labels is not None) == labelled
    if rows.test_labels is not None:
        np.testing.assert_array_equal(rows.test_labels, DATA[:, 4])


def test_label_column_may_precede_the_data_columns(tmp_path: Path) -> None:
    data = ArrayData(table(tmp_path / "t.npy", [4, 0, 1]), label=0)
    same = rows_to_score(data, table(tmp_path / "same.npy", [4, 0, 1]), label=0)
    np.testing.assert_array_equal(same.test, DATA[:, [0, 1]])
    assert same.test_labels is not None
    bare = rows_to_score(data, table(tmp_path / "bare.npy", [0, 1]), label=0)
    np.testing.assert_array_equal(bare.test, DATA[:, [0, 1]])
    assert bare.test_labels is None


def test_held_out_file_with_another_label_name_is_refused(tmp_path: Path, refused: Refused) -> None:
    path, other = table(tmp_path / "t.csv", [0, 1, 4]), table(tmp_path / "o.csv", [0, 1, 4], "a,b,kind")
    refused(lambda: ArrayData(path, label=2, test_path=other), DataError, [other, "'kind'", "'y'"])
    assert ArrayData(path, label=2, test_path=table(tmp_path / "same.csv", [0, 1, 4])).classes == 2


def test_key_is_refused_unless_the_file_is_an_archive(tmp_path: Path, refused: Refused) -> None:
    np.savez(tmp_path / "many.npz", train=DATA[:, :2], other=DATA[:, 1:3])
    np.savez(tmp_path / "one.npz", DATA[:, :2])
    np.savez(tmp_path / "two.npz", x=DATA[:, :2], z=DATA[:, :2])
    half = npy(tmp_path / "f16.npy", DATA[:, :2].astype(np.float16))
    data = ArrayData(str(tmp_path / "many.npz"), key="train", test_path=half)
    assert len(data.test) == len(DATA)
    for name, expected in (("many.npz", DATA[:, :2]), ("one.npz", DATA[:, :2]), ("f16.npy", np.load(half))):
        np.testing.assert_array_equal(rows_to_score(data, str(tmp_path / name), key="train").test, expected)
    for name, given, kind in (
        ("two.npz", {}, ConfigError),
        ("one.npz", {"asked": {"key"}}, ConfigError),
        ("f16.npy", {"asked": {"key"}}, ConfigError),
    ):
        kinds: type[FlowtrainError] = kind
        refused(
            lambda name=name, given=given: rows_to_score(data, str(tmp_path / name), key="train", **given),
            kinds,
            ["train", name],
        )


def test_numeric_headers_are_matched_by_name(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [0, 1], "2019,2020")
    data = ArrayData(path, header=True)
    assert data.columns == ("2019", "2020")
    # without data.columns, names select the columns; a file without names is read by position
    for name, names in (("same.csv", "2019,2020"), ("turned.csv", "2020,2019")):
        columns = [0, 1] if name == "same.csv" else [1, 0]
        rows = rows_to_score(data, table(tmp_path / name, columns, names), header=True)
        np.testing.assert_array_equal(rows.test, DATA[:, [0, 1]])
    bare = tmp_path / "bare.csv"
    np.savetxt(bare, DATA[:, :2], delimiter=",", fmt="%.9g")
    np.testing.assert_array_equal(rows_to_score(data, str(bare), header=True).test, DATA[:, [0, 1]])


def test_pandas_index_is_not_a_data_column(tmp_path: Path) -> None:
    with_index = np.column_stack([np.arange(60), DATA[:, :2]])
    names = tmp_path / "t.csv"
    written(names, ",0,1", with_index)
    data = ArrayData(str(names))
    assert data.columns == ("0", "1")
    plain = ArrayData(npy(tmp_path / "t.npy", DATA[:, :2]))
    for trained_on in (data, plain):
        for path in (str(names), str(tmp_path / "t.npy")):
            np.testing.assert_array_equal(rows_to_score(trained_on, path).test, DATA[:, :2])


def test_idx_in_a_file_name_does_not_select_the_idx_reader(tmp_path: Path) -> None:
    data = ArrayData(table(tmp_path / "t.npy", [0, 1]))
    np.testing.assert_array_equal(rows_to_score(data, table(tmp_path / "my-idx.csv", [0, 1])).test, DATA[:, :2])


def test_images_are_read_for_any_training_columns(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, (50, 13)).astype(float)
    values[:, 12] = np.arange(50) % 3
    path = npy(tmp_path / "t.npy", values)
    read: dict[str, Any] = {"columns": ["0:12"], "label": 12}
    data = ArrayData(path, event_shape=[1, 3, 4], levels=9, **read)
    assert rows_to_score(data, path, **read).test_labels is not None
    for shape in ((50, 12), (50, 3, 4), (50, 1, 3, 4)):
        images = npy(tmp_path / "i.npy", values[:, :12].reshape(shape))
        rows = rows_to_score(data, images, **read)
        np.testing.assert_array_equal(rows.test.flatten(1), values[:, :12])
        assert rows.test_labels is None


# The commands


def test_commands_score_the_training_columns(trained: Train, evaluated: Evaluate, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal([0.0, 100.0], [1.0, 10.0], (400, 2))
    path = npy(tmp_path / "perm.npy", rows)
    run_dir = trained("data=array", f"data.path={path}", "data.columns=[1,0]")
    gaussian = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * np.cov(rows.T)))
    found = evaluated(run_dir, f"data.path={path}", f"ood={path}", name="eval-perm.json")
    assert found["nll"] == pytest.approx(gaussian, abs=0.05)
    assert found["ood"]["auroc"] == pytest.approx(0.5)


def test_commands_score_a_plain_file_after_training_on_an_archive(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    np.savez(tmp_path / "many.npz", train=DATA[:, :2], labels=DATA[:, 4])
    half = npy(tmp_path / "f16.npy", DATA[:50, :2].astype(np.float16))
    run_dir = trained("data=array", "data.path=many.npz", "data.key=train")
    assert evaluated(run_dir, f"data.path={half}", f"ood={half}", name="eval-f16.json")["n"] == 50
    assert evaluated(run_dir, f"data.path={half}", "split=test", name="eval-f16-test.json")["n"] == 5
    code, _, err = run("floweval", f"ckpt={run_dir}", f"data.path={half}", "data.key=train")
    assert (code, "data.key=train" in err) == (2, True)


def test_runs_of_older_versions_read_files_as_before(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    """Runs of older versions kept the index of pandas, and read columns with a large mean as float32."""
    rows = np.column_stack([np.arange(60), 3e4 + DATA[:, 0], DATA[:, 1]])
    path = written(tmp_path / "t.csv", ",a,b", rows)
    run_dir = Path(trained("data=array", f"data.path={path}", "data.columns=[0:3]", "data.center=false"))
    nll = evaluated(str(run_dir))["nll"]
    for name in ("best", "last"):
        file = run_dir / f"checkpoints/{name}.pt"
        saved = checkpoint.load(file)
        new = {"header", "decimal", "center", "missing", "na", "context", "weights", "signed_weights", "id"}
        data = {k: v for k, v in saved["config"]["data"].items() if k not in new} | {"columns": None}
        samples = {k: v for k, v in saved["samples"].items() if k not in ("label", "centered")}
        checkpoint.save(file, {**saved, "config": {**saved["config"], "data": data}, "samples": samples})
    assert evaluated(str(run_dir))["nll"] == nll
    assert evaluated(str(run_dir), "split=all", "data.header=true", name="eval-all.json")["n"] == 60
    assert evaluated(str(run_dir), "split=all", "data.id=a", "scores=s.csv", name="eval-all.json")["n"] == 60
    assert (tmp_path / "s.csv").read_text().startswith("a,row,log_prob,")
    (run_dir / "result.json").unlink()
    code, _, err = run("flowtrain", f"resume={run_dir}", "trainer.steps=6")
    assert code == 0, err
    assert flowtrain.load(run_dir).event_shape == (3,)


# Files from bug reports

CASES = {
    "dup_names.csv": (60, 2),
    "dataframe.csv": (200, 2),
    "pipe.csv": (60, 3),
    "ws_decimal_comma.txt": (60, 2),
    "comments_top.csv": (60, 2),
    "quoted_thousands.csv": (60, 2),
    "tab.tsv": (60, 2),
    "plain.csv.gz": (60, 2),
    "unix.csv": (60, 2),
    "utm.npy": (2000, 2),
    "f16.npy": (3000, 2),
    "../earth/flood.csv": (4875, 2),
    "../earth/volerup.csv": (827, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_files_from_bug_reports_are_scored(name: str, real: Callable[..., list[str]]) -> None:
    (path,) = real(f"cases/{name}")
    data = ArrayData(path)
    rows = rows_to_score(data, path)
    assert rows.test.shape == CASES[name]
    assert data.n_train is not None
    assert data.n_train + len(data.val) + len(data.test) == len(rows.test)
    if name.endswith(".gz"):
        assert gzip.decompress(Path(path).read_bytes()).count(b"\n") == 61
    assert bool(torch.isfinite(rows.test).all())


def test_anomaly_labels_are_not_part_of_a_sample(tmp_path: Path) -> None:
    data = ArrayData(table(tmp_path / "train.npy", [0, 1, 2, 3]))
    y = np.where(np.arange(60) % 7 == 0, 1.0, 0.0)
    # the trained columns have no names, and the file has one column more than a sample
    path = npy(tmp_path / "new.npy", np.column_stack([DATA[:, :2], y, DATA[:, 2:4]]))
    rows = rows_to_score(data, path, anomaly_label=2)
    np.testing.assert_allclose(rows.test, DATA[:, :4])
    assert rows.anomaly_labels().tolist() == y.tolist()
    assert rows_to_score(data, table(tmp_path / "same.npy", [0, 1, 2, 3])).anomaly_labels() is None
    with pytest.raises(DataError, match=r"columns"):
        rows_to_score(data, path)
    with pytest.raises(ConfigError, match=r"data\.anomaly_label"):
        rows_to_score(data, path, anomaly_label=9)


def test_anomaly_labels_may_be_words_or_missing(tmp_path: Path) -> None:
    data = ArrayData(table(tmp_path / "train.csv", [0, 1]), missing="drop")
    path = tmp_path / "new.csv"
    path.write_text("b,bad,a\n1,True,2\n3,0,\n5,,6\n7,0.0,8\n9,NA,1\n")
    rows = rows_to_score(data, str(path), anomaly_label="bad", missing="drop")
    # row 1 has no value in column a. Rows without a label are scored
    assert rows.test.tolist() == [[2, 1], [6, 5], [8, 7], [1, 9]]
    torch.testing.assert_close(
        rows.anomaly_labels(), torch.tensor([1, torch.nan, 0, torch.nan]).double(), equal_nan=True
    )
    path.write_text("b,bad,a\n1,0,2\n3,2,1\n")
    with pytest.raises(DataError, match=r"'bad'.*'?2'?"):
        rows_to_score(data, str(path), anomaly_label="bad").anomaly_labels()
