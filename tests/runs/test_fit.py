"""`fit` and `train` do the same as the command `flowtrain`, and restore the state of the caller's process."""

import copy
import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers import Run

import flowtrain
from flowtrain.bases import GaussianMixture
from flowtrain.bijections.base import Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.scale import Standardize
from flowtrain.data.toys.shapes import Moons
from flowtrain.evaluation import evaluate
from flowtrain.flow import Flow
from flowtrain.models.ffjord import ffjord
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.runs.fit import fit, train
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError, DataError, FlowtrainError, NonFiniteError

SMALL = {"trainer.val_every": 10, "trainer.log_every": 5, "model.hidden": [8]}
KEYS = [f"{key}={value}".replace(" ", "") for key, value in SMALL.items()]


class Frame:
    """A data frame with only the attributes that flowtrain needs."""

    def __init__(self, values: Any, columns: list[str]) -> None:
        self.values, self.columns = values, columns

    def to_numpy(self) -> Any:
        return np.asarray(self.values)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(300, 3)) * [1, 10, 100] + [0, 5, -50]


def fit_small(x: Any, **named: Any) -> Flow:
    overrides = {**SMALL, **named.pop("overrides", {})}
    return fit(x, **{"model": "realnvp", "steps": 20, "progress": False, "overrides": overrides, **named})


def weights(flow: Flow) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in flow.state_dict().items()}


def equal_weights(a: Flow | Path | str, b: Flow | Path | str) -> bool:
    first, second = (weights(f if isinstance(f, Flow) else flowtrain.load(f)) for f in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Equality with the command


@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_fit_equals_the_command_bitwise(model: str, run: Run, tmp_path: Path, without_figures: None) -> None:
    arguments = [f"model={model}", "data=moons", "seed=3", "trainer.steps=20", "data.n_test=200", *KEYS]
    assert run("flowtrain", *arguments, f"hydra.run.dir={tmp_path}/command")[0] == 0
    overrides = {"data.n_test": 200}
    flow = fit_small("moons", model=model, seed=3, run_dir=tmp_path / "fit", overrides=overrides)
    there, here = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("command", "fit"))
    assert there["kl"] == here["kl"]
    assert there["nll"] == here["nll"]
    assert equal_weights(tmp_path / "command", flow)
    in_memory = fit_small("moons", model=model, seed=3, overrides=overrides)
    assert equal_weights(in_memory, flow)
    assert evaluate(in_memory, Moons(n_test=200)).kl == there["kl"]
    rows = [json.loads(line) for line in (tmp_path / "command/metrics.jsonl").read_text().splitlines()]
    assert in_memory.record is not None
    assert [row["nll"] for row in in_memory.record.metrics] == [row["nll"] for row in rows]


@pytest.mark.parametrize("model", ["realnvp", "affine"])
def test_fit_on_an_array_equals_the_command_on_a_file(
    model: str, x: np.ndarray, run: Run, tmp_path: Path, without_figures: None
) -> None:
    np.save(tmp_path / "x.npy", x)
    keys = [key for key in KEYS if model == "realnvp" or "hidden" not in key]
    arguments = [f"model={model}", "data=array", f"data.path={tmp_path}/x.npy", "trainer.steps=20", *keys]
    assert run("flowtrain", *arguments, f"hydra.run.dir={tmp_path}/r")[0] == 0
    overrides = {key: value for key, value in SMALL.items() if model == "realnvp" or "hidden" not in key}
    flow = fit(x, model=model, steps=20, progress=False, overrides=overrides)
    assert equal_weights(tmp_path / "r", flow)
    assert flow.record is not None
    assert flow.record.samples.record == flowtrain.load(tmp_path / "r").record.samples.record
    by_path = fit(tmp_path / "x.npy", model=model, steps=20, progress=False, overrides=overrides)
    assert equal_weights(by_path, flow)


def test_every_input_type_gives_the_same_flow(x: np.ndarray) -> None:
    first = fit_small(x)
    names = ["a", "b", "c"]
    framed = fit_small(Frame(x, names))
    assert equal_weights(first, framed)
    assert framed.record is not None
    assert framed.record.samples.columns == ("a", "b", "c")
    assert equal_weights(first, fit_small(torch.from_numpy(x)))
    assert equal_weights(first, fit_small(x.tolist()))
    assert equal_weights(first, fit_small(np.asfortranarray(x)))
    assert equal_weights(
        fit_small(x.astype(np.float32)), fit_small(torch.from_numpy(x.astype(np.float32)).requires_grad_())
    )


# The caller's process


def test_nothing_is_written_without_a_run_directory(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    fit_small(x)
    assert list(tmp_path.iterdir()) == []


def test_fit_neither_uses_nor_changes_torch_settings(x: np.ndarray) -> None:
    expected = fit_small(x)
    threads = torch.get_num_threads()
    torch.manual_seed(77)
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad():
            assert equal_weights(fit_small(x), expected)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            assert equal_weights(fit_small(x), expected)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_concurrent_fits_run_one_after_another(x: np.ndarray, tmp_path: Path, without_figures: None) -> None:
    logger = logging.getLogger("flowtrain")

    def settings() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_rng_state().sum(),
            logger.level,
            logger.propagate,
            [*logger.handlers],
        )

    def fitted(i: int) -> None:
        found[i] = fit_small(x, run_dir=tmp_path / str(i) if i % 2 else None)

    alone, found = fit_small(x), {}
    torch.set_default_dtype(torch.float64)
    try:
        before = settings()
        threads = [threading.Thread(target=fitted, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert settings() == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert [equal_weights(found[i], alone) for i in range(6)] == [True] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_process_forked_during_a_fit_can_fit() -> None:
    # the other thread only waits, because torch can hang if it computes while another thread forks
    code = """
import os, threading, numpy as np, torch, flowtrain
from flowtrain.runs.fit import _one_at_a_time
from flowtrain.utils.process import own_settings
torch.set_default_dtype(torch.float64)
x = np.random.default_rng(0).normal(size=(100, 2))
def fit():
    flowtrain.fit(x, model="affine", steps=1, progress=False)
fit()
begun = threading.Event()
def other():
    with _one_at_a_time(), own_settings(torch.device("cpu")):
        begun.set()
        threading.Event().wait()
threading.Thread(target=other, daemon=True).start()
begun.wait()
child = os.fork()
if child == 0:
    fit()
    os._exit(7 if torch.get_default_dtype() == torch.float64 else 8)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "7", done.stderr


@pytest.mark.parametrize("kind", ["none", "closed", "write only", "broken", "broken terminal"])
def test_progress_bar_works_without_a_usable_stderr(x: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class WriteOnly:
        def write(self, text: str) -> None:
            pass

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return kind == "broken terminal"

    closed = io.StringIO()
    closed.close()
    streams: dict[str, Any] = {"none": None, "closed": closed, "write only": WriteOnly()}
    monkeypatch.setattr(sys, "stderr", streams.get(kind, Broken()))
    fit_small(x, progress=True)


def test_fitted_flow_is_in_eval_mode_and_pickles(x: np.ndarray) -> None:
    flow = fit_small(x)
    assert not flow.training
    assert equal_weights(pickle.loads(pickle.dumps(flow)), flow)
    assert flow.record is not None
    held = flow.record.held_out
    assert len(held["val"]) == len(held["test"]) == 30
    assert not {*held["val"]} & {*held["test"]}


# Run directories


def test_resumed_fit_equals_an_uninterrupted_fit(
    x: np.ndarray, run: Run, tmp_path: Path, without_figures: None
) -> None:
    whole = fit_small(Frame(x, ["a", "b", "c"]), run_dir=tmp_path / "whole", overrides={"trainer.lr_decay": "constant"})
    fit_small(
        Frame(x, ["a", "b", "c"]), run_dir=tmp_path / "part", steps=10, overrides={"trainer.lr_decay": "constant"}
    )
    assert run("flowtrain", f"resume={tmp_path}/part", "trainer.steps=20")[0] == 0
    assert equal_weights(tmp_path / "part", whole)
    assert equal_weights(tmp_path / "whole", whole)
    there = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert {"flowtrain.log", "metrics.jsonl", "result.json", "checkpoints/best.pt", "checkpoints/last.pt"} < there
    assert {".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "data/train.npz"} < there
    assert "step 20" in (tmp_path / "part/flowtrain.log").read_text()
    assert run("floweval", f"ckpt={tmp_path}/whole")[0] == 0
    assert run("flowsample", f"ckpt={tmp_path}/whole", "n=5", f"out={tmp_path}/s.npy")[0] == 0


def test_run_directory_that_contains_a_run_is_refused(x: np.ndarray, tmp_path: Path, without_figures: None) -> None:
    fit_small(x, run_dir=tmp_path / "r")
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError):
        fit_small(x, run_dir=tmp_path / "r")
    assert before == {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}


def test_refused_fit_creates_and_changes_no_files(x: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        fit_small(x, run_dir=tmp_path / "a/b", overrides={"trainer.lr": -1.0})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.npz").write_text("mine")
    with pytest.raises(ConfigError):
        fit_small(x, run_dir=tmp_path)
    assert (tmp_path / "data/train.npz").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "name",
    [
        "flowtrain.log",
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        "plots/samples.png",
        "checkpoints/teacher.pt",
        "data/val.npz",
        ".lock",
        ".holder",
    ],
)
def test_unrelated_files_are_never_overwritten(name: str, x: np.ndarray, tmp_path: Path, without_figures: None) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=name):
        fit_small(x, run_dir=tmp_path)
    assert mine.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_data_beside_a_foreign_hydra_config_are_not_overwritten(x: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("lr: 1\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.npz").write_text("mine")
    with pytest.raises(ConfigError):
        fit_small(x, run_dir=tmp_path)
    assert (tmp_path / "data/train.npz").read_text() == "mine"


def test_data_of_a_killed_command_are_not_overwritten(x: np.ndarray, tmp_path: Path, without_figures: None) -> None:
    fit_small(x, run_dir=tmp_path)
    forget_training(tmp_path)
    overrides = tmp_path / ".hydra/overrides.yaml"
    overrides.write_text(f"- data=array\n- data.path={tmp_path}/data/train.npz\n")
    before = (tmp_path / "data/train.npz").read_bytes()
    with pytest.raises(ConfigError):
        fit_small(x + 1, run_dir=tmp_path)
    assert (tmp_path / "data/train.npz").read_bytes() == before


def test_fit_reuses_the_directory_of_an_early_killed_fit(x: np.ndarray, tmp_path: Path, without_figures: None) -> None:
    fit_small(x, run_dir=tmp_path)
    forget_training(tmp_path)
    again = fit_small(x + 1, run_dir=tmp_path)
    assert equal_weights(again, tmp_path)
    assert equal_weights(again, fit_small(x + 1))


def forget_training(run_dir: Path) -> None:
    """Removes the first checkpoint and all files that a fit writes later."""
    for path in [*run_dir.glob("checkpoints/*"), run_dir / "metrics.jsonl", run_dir / "result.json"]:
        path.unlink()


def test_symbolic_links_are_not_written_through(x: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    (tmp_path / "r/.hydra").mkdir(parents=True)
    (tmp_path / "r/.hydra/config.yaml").symlink_to(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError):
        fit_small(x, run_dir=tmp_path / "r")
    assert (tmp_path / "mine.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize("run_dir", ["", 5, False, b"r", "a\0b", "a" * 300, "file", "file/r"])
def test_invalid_run_directories_are_refused(
    run_dir: Any, x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError):
        fit_small(x, run_dir=run_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_deleted_working_directory_is_refused_only_for_run_dir(
    x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError):
        fit_small(x, run_dir="r")
    fit_small(x)


# Data


def test_val_may_be_a_set_or_a_fraction(x: np.ndarray) -> None:
    flow = fit_small(x, val=0.2, test=0.3)
    assert flow.record is not None
    assert {name: len(rows) for name, rows in flow.record.held_out.items()} == {"val": 60, "test": 90}
    flow = fit_small(Frame(x, ["a", "b", "c"]), val=Frame(x[:40, ::-1], ["c", "b", "a"]), test=x[:20])
    assert flow.record is not None
    assert flow.record.held_out == {}
    same_order = fit_small(Frame(x, ["a", "b", "c"]), val=x[:40], test=x[:20])
    assert equal_weights(flow, same_order)


@pytest.mark.parametrize("share", [np.float32(0.25), np.array(0.25), torch.tensor(0.25)])
def test_val_fraction_may_be_a_numpy_or_torch_scalar(x: np.ndarray, share: Any) -> None:
    flow = fit_small(x, val=share)
    assert flow.record is not None
    assert len(flow.record.held_out["val"]) == 75


@pytest.mark.parametrize(
    "val", ["0.2", Path("val.csv"), np.zeros((3, 1, 1, 3)), (np.zeros((3, 3)), [0, 1, 0]), (1, 2, 3), np.float64(1)]
)
def test_bad_validation_sets_are_refused(x: np.ndarray, val: Any) -> None:
    for name in ("val", "test"):
        with pytest.raises(FlowtrainError, match=name):
            fit_small(x, **{name: val})


def test_validation_images_of_another_shape_are_refused() -> None:
    images = np.random.default_rng(0).integers(0, 16, size=(60, 1, 4, 4))
    with pytest.raises(DataError, match="val"):
        fit_small(images, levels=16, val=images[:5].reshape(5, 1, 2, 8), overrides={"model.scales": 0})


def test_label_matches_a_column_name_before_a_position(x: np.ndarray) -> None:
    y = np.arange(300) % 2
    flow = fit_small(Frame(np.column_stack([y, x]), [3, 0, 1, 2]), label=3)  # type: ignore[list-item]
    assert flow.record is not None
    assert (flow.classes, flow.record.samples.label, flow.record.samples.columns) == (2, "3", ("0", "1", "2"))
    assert fit_small(np.column_stack([x, y]), label=np.int64(3)).classes == 2


@pytest.mark.parametrize("label", [True, False, np.True_, 1.5])
def test_invalid_label_types_are_refused(x: np.ndarray, label: Any) -> None:
    with pytest.raises(FlowtrainError, match="label"):
        fit_small(x, label=label)


def test_labels_for_a_named_dataset_are_refused() -> None:
    with pytest.raises(ConfigError, match="label"):
        fit_small("moons", label=np.zeros(5))


def test_labels_give_a_conditional_flow() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 200)
    x = rng.normal(size=(400, 2)) + 6 * y[:, None]
    flow = fit_small(x, label=y, steps=200, overrides={"trainer.lr": 0.01})
    assert flow.classes == 2
    ours, other = (flow.log_prob(torch.from_numpy(x).float(), torch.from_numpy(label)) for label in (y, 1 - y))
    assert (ours - other).mean().item() > 1
    frame = Frame(np.column_stack([y, x]), ["kind", "a", "b"])
    by_name = fit_small(frame, label="kind", steps=20)
    assert by_name.record is not None
    assert (by_name.classes, by_name.record.samples.columns) == (2, ("a", "b"))
    assert fit_small(x, label=y, val=(x[:50], y[:50]), steps=20).classes == 2
    with pytest.raises(DataError):
        fit_small(x, label=y[:-1])
    with pytest.raises(DataError):
        fit_small(x, label=y, val=x)


def test_byte_images_with_labels_are_fitted() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 16, size=(120, 1, 4, 4)).astype(np.uint8)
    y = rng.integers(0, 3, size=120)
    flow = fit_small(images, levels=16, label=y, overrides={"model.scales": 1, "model.layers": 1})
    assert (flow.event_shape, flow.levels, flow.classes) == ((1, 4, 4), 16, 3)
    assert flow.quantized(flow.sample(4)).dtype == torch.uint8
    assert flow.log_prob(torch.from_numpy(images), torch.from_numpy(y)).isfinite().all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((0, 2)), "(0, 2)"),
        (np.full((50, 2), np.nan), "x"),
        (np.ones((50, 2)), "constant"),
        (np.array([["a", "b"]] * 50), "'a'"),
        (np.zeros((5, 2, 2)), "(5, 2, 2)"),
        (np.zeros(()), "()"),
        (np.zeros((50, 2), complex), "complex"),
        ([[1, 2], [3]], "x"),
        ("nothing", "nothing"),
        ("moon", "moons"),
        (object(), "x"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(50, 2, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
        ([torch.ones(2, device="meta")], "x"),
        (np.array([[1, 10**400]] * 50, dtype=object), "'c1'"),
    ],
)
def test_error_for_bad_data_names_the_fault(bad: Any, words: str) -> None:
    with pytest.raises(FlowtrainError) as e:
        fit_small(bad)
    assert words in str(e.value)


def test_tensors_with_the_negative_bit_are_accepted(x: np.ndarray) -> None:
    flipped = torch.complex(torch.zeros(300, 3).double(), torch.from_numpy(x)).conj().imag
    assert flipped.is_neg()
    assert equal_weights(fit_small(flipped), fit_small(-x))


def test_date_columns_are_refused(x: np.ndarray) -> None:
    class Dated(Frame):
        dtypes = ("Float64", "Datetime(time_unit='us')", "Float64")

    with pytest.raises(DataError, match="'when'"):
        fit_small(Dated(x, ["a", "when", "b"]))


def test_dates_in_columns_that_are_not_used_are_ignored(x: np.ndarray) -> None:
    colours = np.array(["red", "green"])[np.arange(300) % 2]
    frame = pl.DataFrame({"a": x[:, 0], "c": colours, "when": np.arange(300).astype("M8[D]"), "b": x[:, 1]})
    used = ["a", "c", "b"]
    overrides: dict[str, Any] = {"data.types": {"c": "categorical"}}
    plain = fit_small(frame[used], val=frame[used][:50], overrides=overrides)
    picked = fit_small(frame, val=frame[:50], overrides={**overrides, "data.columns": used})
    assert equal_weights(plain, picked)
    assert equal_weights(plain, fit_small(frame[used], val=frame[:50], overrides=overrides))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        log_p = plain.log_prob(frame[used])
        torch.manual_seed(0)
        assert np.array_equal(plain.log_prob(frame), log_p)
    for bad in ({"context": "when"}, {"context": frame[["when"]]}, {"weights": "when"}):
        with pytest.raises(DataError, match="'when'"):
            fit_small(frame, overrides={**overrides, "data.columns": used}, **bad)
    with pytest.raises(DataError, match="'when'"):
        fit_small(frame, overrides={**overrides, "data.columns": [*used, "when"]})


def test_types_with_bounds_in_a_list_of_overrides() -> None:
    x = np.random.default_rng(0).uniform(0, 2, (100, 2))
    for overrides in (["data.types={0: interval(-1,2), 1: real}"], ["data.types.0=interval(-1,2)"]):
        flow = fit(x, model="affine", steps=2, progress=False, overrides=overrides)
        assert [str(each) for each in flow.types] == ["interval(-1,2)", "real"]


def test_error_messages_do_not_print_whole_objects(x: np.ndarray) -> None:
    flow = realnvp(3)
    bad: list[dict[str, Any]] = [{"x": flow}, {"x": {"a": x}}, {"x": x, "model": flow}, {"x": x, "val": flow}]
    for named in bad:
        with pytest.raises(FlowtrainError) as e:
            fit(**{"progress": False, **named})
        assert len(str(e.value)) < 300


def test_overrides_are_applied_and_validated(x: np.ndarray) -> None:
    flow = fit(x, model="affine", progress=False, overrides=["trainer.steps=3", "trainer.lr=1e-3"])
    assert flow.record is not None
    assert (flow.record.config["trainer"]["steps"], flow.record.config["trainer"]["lr"]) == (3, 1e-3)
    wrong: list[Any] = [{"trainer.learnin_rate": 1}, ["nothing"], {"model": "none"}, {"seed": -1}]
    # invalid YAML, not a mapping, no model, and data keys although the rows are in memory
    wrong += [["trainer.lr=[1"], 5, {"model": None}, {"data.path": "x.npy"}, {"data": "moons"}]
    for bad in wrong:
        with pytest.raises(ConfigError):
            fit(x, progress=False, overrides=bad)
    for named in ({"steps": 0}, {"minutes": 0}, {"device": "tpu"}, {"model": "nvp"}):
        with pytest.raises(ConfigError):
            fit(x, progress=False, **named)


# Failures


def test_failed_fit_message_suggests_a_setting(x: np.ndarray) -> None:
    with pytest.raises(NonFiniteError) as e:
        fit_small(x, overrides={"trainer.lr": 1e30, "trainer.clip_norm": None, "trainer.val_early": False})
    assert "resume" not in str(e.value)
    assert "trainer.lr" in str(e.value)


def test_rewind_works_without_a_run_directory(x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    step, failed = Trainer.train_step, []

    def fails_once(self: Trainer) -> Any:
        if self.step == 15 and not failed:
            failed.append(True)
            with torch.no_grad():
                next(self.flow.parameters()).fill_(torch.nan)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", fails_once)
    flow = fit_small(x, overrides={"trainer.on_nonfinite": "rewind"})
    assert failed
    assert all(bool(value.isfinite().all()) for value in flow.state_dict().values())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    step = Trainer.train_step

    def signalled(self: Trainer) -> Any:
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", signalled)


def test_interrupted_fit_returns_the_best_flow_so_far(
    x: np.ndarray, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, without_figures: None
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, 15)
        flow = fit_small(x, run_dir=tmp_path / "r")
        assert flow.record is not None
        assert flow.record.stopped_by == "SIGINT"
        assert equal_weights(fit_small(x), flow)
    assert run("flowtrain", f"resume={tmp_path}/r")[0] == 0
    assert equal_weights(tmp_path / "r", fit_small(x))
    interrupt_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        fit_small("moons")


# Flows built by hand


def hand_built_flow() -> Flow:
    return Flow((3,), Chain([*realnvp((3,), layers=2, hidden=[8]).bijection.bijections, Standardize((3,))]))


def test_train_updates_the_flow_in_place(x: np.ndarray) -> None:
    torch.manual_seed(0)
    flow = hand_built_flow()
    record = train(flow, x, steps=30, progress=False, overrides={"trainer.val_every": 10})
    assert flow.record is record
    assert not flow.training
    val = [row["nll"] for row in record.metrics if row["split"] == "val"]
    assert -flow.log_prob(torch.from_numpy(x[record.held_out["val"]]).float()).double().mean().item() == pytest.approx(
        min(val), rel=1e-5
    )
    assert min(val) < val[0] or record.step == 0
    before = weights(flow)
    again = train(flow, x, steps=1, progress=False, overrides={"trainer.lr": 1e-12, "trainer.ema": None})
    assert again.step <= 1
    assert all(torch.allclose(before[name], value, atol=1e-6) for name, value in flow.state_dict().items())


def test_untrainable_flows_are_refused(x: np.ndarray) -> None:
    frozen = Flow((3,), Affine(3)).requires_grad_(False)
    with torch.inference_mode():
        made = Flow((3,), Affine(3))
    for flow in (frozen, made, torch.nn.Linear(3, 3), "realnvp", None):
        with pytest.raises(ConfigError, match="flow"):
            train(flow, x, steps=2, progress=False)  # type: ignore[arg-type]


def test_failed_training_leaves_the_weights_unchanged(x: np.ndarray) -> None:
    flow = hand_built_flow()
    before = weights(flow)
    with pytest.raises(NonFiniteError):
        train(flow, x, steps=30, progress=False, overrides={"trainer.lr": 1e30, "trainer.clip_norm": None})
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


def test_train_refuses_data_that_do_not_match_the_flow(x: np.ndarray) -> None:
    with pytest.raises(DataError):
        train(hand_built_flow(), x[:, :2], progress=False)
    with pytest.raises(DataError):
        train(hand_built_flow(), x, label=np.zeros(300, int), progress=False)
    with pytest.raises(DataError):
        train(realnvp((3,), conditional=True, classes=2), x, progress=False)
    with pytest.raises(DataError):
        train(realnvp((3,), conditional=True, classes=2), x, label=np.arange(300) % 3, progress=False)
    with pytest.raises(ConfigError):
        train(hand_built_flow(), x, progress=False, overrides={"model.hidden": [3]})


def test_trained_affine_flow_equals_the_gaussian_of_the_training_rows(x: np.ndarray) -> None:
    flow = Flow((3,), Affine(3))
    train(flow, x, steps=50, progress=False, overrides={"trainer.lr": 1e-4})
    inside = np.delete(x, np.concatenate([*flow.record.held_out.values()]), axis=0)
    mean = torch.from_numpy(inside.mean(0))
    covariance = torch.from_numpy(np.cov(inside.T, bias=True))
    truth = torch.distributions.MultivariateNormal(mean, covariance).log_prob(torch.from_numpy(x)).mean()
    assert flow.log_prob(torch.from_numpy(x).float()).mean().item() == pytest.approx(float(truth), abs=0.02)


def test_base_parameters_are_trained() -> None:
    flow = Flow(GaussianMixture(2, components=2), Chain([Standardize((2,))]))
    before = weights(flow)
    train(flow, "moons", steps=20, progress=False, overrides={"trainer.val_every": 10})
    assert any(not torch.equal(before[name], value) for name, value in flow.state_dict().items() if "base" in name)


def test_rectified_training_without_from_uses_the_flow_as_teacher(tmp_path: Path) -> None:
    overrides = {"objective": "rectified", "objective.pairs": 100, "trainer.val_every": 10}
    flow = ffjord((2,), hidden=[8])
    train(flow, "moons", steps=10, progress=False, overrides=overrides)
    assert flow.record is not None
    assert flow.record.config["objective"]["name"] == "rectified"
    with pytest.raises(ConfigError):
        train(flow, "moons", steps=10, progress=False, overrides=overrides, run_dir=tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_float64_flows_and_image_glow_are_trained(x: np.ndarray) -> None:
    flow = hand_built_flow().double()
    train(flow, x, steps=5, progress=False)
    assert flow.like.dtype == torch.float64
    images = np.random.default_rng(0).normal(size=(60, 1, 4, 4))
    picture = glow((1, 4, 4), steps=1, hidden=[4], scales=1)
    train(picture, images, steps=3, progress=False)
    assert picture.log_prob(torch.from_numpy(images).float()).isfinite().all()


def test_hand_built_flow_in_a_run_directory_resumes(
    x: np.ndarray, run: Run, tmp_path: Path, without_figures: None
) -> None:
    constant = {"trainer.lr_decay": "constant", "trainer.val_every": 10}
    torch.manual_seed(0)
    flow = hand_built_flow()
    whole, part = copy.deepcopy(flow), copy.deepcopy(flow)
    frame = Frame(x, ["a", "b", "c"])
    train(whole, frame, steps=20, progress=False, run_dir=tmp_path / "whole", overrides=constant)
    train(part, frame, steps=10, progress=False, run_dir=tmp_path / "part", overrides=constant)
    assert run("flowtrain", f"resume={tmp_path}/part", "trainer.steps=20")[0] == 0
    assert equal_weights(tmp_path / "part", whole)
    in_memory = copy.deepcopy(flow)
    train(in_memory, frame, steps=20, progress=False, overrides=constant)
    assert equal_weights(in_memory, whole)
    loaded = flowtrain.load(tmp_path / "part")
    assert loaded.record is not None
    assert loaded.record.samples.columns == ("a", "b", "c")
    assert run("floweval", f"ckpt={tmp_path}/part")[0] == 0
    for saved in (whole, loaded, in_memory):
        saved.save(tmp_path / "flow.pt")
        assert equal_weights(tmp_path / "flow.pt", whole)


def test_floweval_evaluates_a_saved_fit(x: np.ndarray, run: Run, tmp_path: Path, without_figures: None) -> None:
    flow = fit_small(Frame(x, ["a", "b", "c"]))
    flow.save(tmp_path / "flow.pt")
    assert equal_weights(tmp_path / "flow.pt", flow)
    (tmp_path / "new.csv").write_text("c,a,b\n" + "\n".join(",".join(map(str, row[[2, 0, 1]])) for row in x))
    scores = tmp_path / "scores.npy"
    code, _, err = run("floweval", f"ckpt={tmp_path}/flow.pt", f"data.path={tmp_path}/new.csv", f"scores={scores}")
    assert code == 0, err
    assert np.load(scores) == pytest.approx(flow.log_prob(Frame(x, ["a", "b", "c"])), abs=1e-4)
    assert flow.log_prob(x) == pytest.approx(np.load(scores), abs=1e-4)
