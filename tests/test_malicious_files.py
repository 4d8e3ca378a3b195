"""Malicious files run no code, fill no memory and reach no other file. Each file is refused with a one-line message."""

import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run

import flowtrain
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.data.tables.table_reader import read_table
from flowtrain.runs.build import build_flow
from flowtrain.training import checkpoint
from flowtrain.training.checkpoint import checksum
from flowtrain.utils.errors import CheckpointError, DataError


class Bomb:
    """An object whose unpickling calls a function that creates a file."""

    def __init__(self, path: Path, call: Callable[..., Any] = os.system) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return compose_defaults(["model=affine", "data.n_test=20", "data.n_val=20"])


@pytest.fixture
def trained(tmp_path: Path, composed: dict[str, Any]) -> Path:
    """Saves a checkpoint as a run does."""
    torch.set_default_dtype(torch.float32)
    config = deepcopy(composed)
    samples = Samples((2,))
    flow = build_flow(config, samples)
    path = tmp_path / "run/checkpoints/best.pt"
    content = {"config": config, "event_shape": [2], "samples": asdict(samples), "step": 2}
    checkpoint.save(path, {**content, "weights": flow.state_dict(), "ema": None})
    return path


def assert_refused(run: Run, path: Path, words: str | None = None) -> None:
    """Checks that the library and every command that reads checkpoints refuse the file with a one-line error."""
    with pytest.raises(CheckpointError, match=words) as caught:
        flowtrain.load(path)
    assert "\n" not in str(caught.value)
    for command, key in (("floweval", "ckpt"), ("flowsample", "ckpt"), ("flowtrain", "from")):
        code, out, err = run(command, f"{key}={path}")
        assert (code, out) == (2, ""), (command, err)
        assert len(err.strip().splitlines()) == 1, err
        assert "Traceback" not in err


@pytest.mark.parametrize("where", ["whole", "config", "weights", "extra"])
@pytest.mark.parametrize("call", [os.system, subprocess.check_output, eval, exec, pickle.loads])
def test_malicious_pickle_is_not_executed(
    run: Run, trained: Path, tmp_path: Path, where: str, call: Callable[..., Any]
) -> None:
    content: Any = torch.load(trained, weights_only=True)
    bomb = Bomb(tmp_path / "boom", call)
    if where == "whole":
        content = bomb
    elif where == "config":
        content["config"]["model"]["hidden"] = bomb
    elif where == "weights":
        content["weights"]["w"] = bomb
    else:
        content["more"] = [bomb]
    torch.save(content, trained)
    assert_refused(run, trained, "refused")
    # files of older torch versions are a single pickle
    trained.write_bytes(pickle.dumps(content))
    assert_refused(run, trained, "refused|complete")
    assert not (tmp_path / "boom").exists()


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edits a checkpoint so that it stays complete, with a correct checksum, but differs from what flowtrain writes."""
    content = checkpoint.load(path)
    change(content)
    torch.save({**content, "checksum": checksum(content)}, path)
    checkpoint.previous(path).unlink(missing_ok=True)


def put(keys: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        *path, last = keys.split(".")
        for key in path:
            content = content[key]
        content[last] = value

    return change


SYSTEM = {"_target_": "os.system", "_args_": ["touch boom"]}
CONFIGS = {
    "target": put("config.model._target_", "os.system"),
    "attribute of a flowtrain module": put("config.model._target_", "flowtrain.models.affine.math.prod"),
    "name imported by flowtrain": put("config.model._target_", "flowtrain.runs.build.instantiate"),
    "target of another group": put("config.model._target_", "flowtrain.runs.run.train"),
    "builtin": put("config.data._target_", "builtins.eval"),
    "nested": put("config.model.hidden", SYSTEM),
    "nested in a list": put("config.solver.rtol", [{"a": SYSTEM}]),
    "in an unused group": put("config.hydra", {"launcher": SYSTEM}),
    "list as target": put("config.model._target_", ["os.system"]),
    "environment": put("config.data.path", "${oc.env:HOME}"),
    "resolver": put("config.solver.method", "${oc.decode:'[1]'}"),
    "interpolation": put("config.model.name", "${data}"),
    "nested interpolation": put("config.trainer", {"a": [("x", "${oc.create:{}}")]}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_in_a_checkpoint_runs_no_code(run: Run, trained: Path, tmp_path: Path, name: str) -> None:
    changed(trained, CONFIGS[name])
    assert_refused(run, trained, "would run|interpolation|cannot be imported|damaged|complete|not a class|no _target_")
    assert not (tmp_path / "boom").exists()


SIZES = {
    "event shape": put("event_shape", [10**12]),
    "negative event shape": put("event_shape", [-2]),
    "event shape of strings": put("event_shape", ["2", "3"]),
    "empty event shape": put("event_shape", []),
    "large image": put("event_shape", [3, 10**6, 10**6]),
    "step": put("step", -1),
    "width": lambda c: c["config"].update(
        model={"_target_": "flowtrain.models.realnvp.realnvp", "hidden": [10**9, 10**9]}
    ),
    "width within the weights": lambda c: c["config"].update(
        model={"_target_": "flowtrain.models.realnvp.realnvp", "hidden": [1000, 1000]}
    ),
    "layers": lambda c: c["config"].update(model={"_target_": "flowtrain.models.realnvp.realnvp", "layers": 10**9}),
    "layers as a float": lambda c: c["config"].update(
        model={"_target_": "flowtrain.models.realnvp.realnvp", "layers": 1e9}
    ),
    "wrong weight shape": put("weights", {"bijection.bijections.0.mean": torch.zeros(3)}),
    "list as weight": put("weights", {"bijection.bijections.0.mean": [1.0]}),
    "list of weights": put("weights", [torch.zeros(2)]),
    "samples": put("samples", {"levels": 3, "code": "x"}),
    "string as samples": put("samples", "x"),
    "levels": put("samples.levels", "many"),
    "solver": put("config.solver.rtol", "x"),
    "nonexistent model class": put("config.model", {"_target_": "flowtrain.models.ffjord.Flows"}),
    "empty model": put("config.model", {}),
}


@pytest.mark.parametrize("name", SIZES)
def test_invalid_sizes_and_types_are_refused(run: Run, trained: Path, name: str) -> None:
    changed(trained, SIZES[name])
    assert_refused(run, trained)


def test_expanded_tensor_is_refused(run: Run, trained: Path) -> None:
    content = checkpoint.load(trained)
    content["weights"]["bijection.bijections.0.mean"] = torch.zeros(1).expand(10**12)
    torch.save({**content, "format": 1}, trained)
    checkpoint.previous(trained).unlink(missing_ok=True)
    assert_refused(run, trained, "less memory")


def test_loading_does_not_open_paths_in_the_config(run: Run, trained: Path, tmp_path: Path) -> None:
    """Only commands that need the data read the file that the config names, and they read it as a table."""
    (tmp_path / "secret.txt").write_text("root:x:0:0\n")

    def traverse(content: dict[str, Any]) -> None:
        content["config"]["data"] = {
            "_target_": "flowtrain.data.tables.array.ArrayData",
            "path": f"{tmp_path}/run/../secret",
        }
        content["config"]["resume"] = content["config"]["from"] = "../../secret.txt"

    changed(trained, traverse)
    assert flowtrain.load(trained).event_shape == (2,)
    before = set(tmp_path.rglob("*"))
    code, out, err = run("floweval", f"ckpt={trained}")
    assert (code, out) == (2, "")
    assert "data files end in" in err
    assert "root:x" not in err
    assert set(tmp_path.rglob("*")) == before


def npy(path: Path, header: str, body: bytes = b"") -> Path:
    words = header.encode() + b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words + body)
    return path


ARRAYS = {
    "terabytes": "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 2)}",
    "overflow": "{'descr': '<f8', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807)}",
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-5, 2)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (5, 2)}",
    "code": "__import__('os').system('touch boom')",
    "no header": "",
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_array_headers_larger_than_the_file_are_refused(run: Run, tmp_path: Path, name: str, ending: str) -> None:
    path = npy(tmp_path / "a.npy", ARRAYS[name], b"\0" * 160)
    if ending == ".npz":
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "x.npy")
        path = tmp_path / "a.npz"
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)
    code, out, err = run("flowtrain", "data=array", f"data.path={path}", "model=affine")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "boom").exists()


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    array = np.array([[Bomb(tmp_path / "boom"), 1.0]], dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=array)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(DataError):
            read_table(tmp_path / name)
    assert not (tmp_path / "boom").exists()
