"""Every mistake on the command line gives one message and leaves the files as they were."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, TINY, Run

from flowtrain.runs import build
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import SolverError

pytestmark = pytest.mark.usefixtures("without_figures")

BAD_TRAIN = [
    (["model=realnvp", "model.layerz=3"], r"no key model.layerz; did you mean model.layers\?.* layers, hidden"),
    (["model=realnvp", "model.actnorm=no"], r"model.actnorm=no: give true or false"),
    (["~objective"], r"~objective"),
    (["seed=99999999999999999999"], r"seed=9+: give a whole number"),
    (["+stepz=3"], r"no key stepz"),
    (["+solver.depth=3"], r"solver: unknown key depth; valid keys are method, rtol"),
    (["solver.max_nfe=many"], r"solver.max_nfe=many: give a whole number"),
    (["solver.warmup=x"], r"solver.warmup=x"),
    (["recipe=foo"], r"recipe=foo: choose one of .*ffjord_rings.*none"),
    (["recipe=null"], r"recipe=null: choose one of .*none"),
    (["solver=rk4", "solver.step_size=0.1", "solver.warmup=5"], r"remove solver.warmup"),
    (["model=realnvp", "solver.rtol=-1"], r"solver.rtol=-1"),
    (["model.hidden=64"], r"model.hidden=64: give a list"),
    (["model.hidden=[a]"], r"model.hidden\[0\]=a: give a whole number"),
    (["model.flows=two"], r"model.flows=two"),
    (["model.noise_samples=1.5"], r"model.noise_samples=1.5"),
    (["data.n_val=many"], r"data.n_val=many"),
    (["trainer.stepz=3"], r"no key trainer.stepz; did you mean trainer.steps\?.* steps, batch_size"),
    (["modell=ffjord"], r"no key modell; did you mean model\?.* model"),
    (["model=ffjrd"], r"model=ffjrd: did you mean ffjord\?.* affine, auto, ffjord, glow, .*realnvp"),
    (["+model.depth=3"], r"model: unknown key depth; the keys of ffjord are field, hidden"),
    (["solver=rk4"], r"solver.step_size"),
    (["solver.rtol=-1"], r"solver.rtol=-1"),
    (["trainer.steps=many"], r"trainer.steps=many: give a whole number"),
    (["device=cuda:9"], r"this machine has \d+ CUDA devices"),
    (["device=tpu"], r"device=tpu: choose auto"),
    (["seed=-1"], r"seed=-1"),
    (["threads=0"], r"threads=0"),
    (["data=array"], r"data.path"),
    (["data=array", "data.path=nowhere.npy"], r"nowhere.npy"),
    (["model.activation=relu"], r"model.activation=relu: choose one of tanh"),
    (["resume=nowhere"], r"nowhere: there is no such"),
    (["resume="], r"resume=RUN_DIR"),
    (["trainer.steps=[1"], r"trainer.steps"),
    (["data=array", "data.types={'a': positive}"], r"position"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_TRAIN, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_mistakes_get_one_message_and_leave_nothing(run: Run, arguments: list[str], words: str, tmp_path: Path) -> None:
    code, out, err = (
        run("flowtrain", *SMALL, *arguments) if "data=array" not in arguments else run("flowtrain", *arguments)
    )
    assert code == 2
    assert out == ""
    assert re.search(words, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    ["data=array", "data.path=table.csv", "data.columns=[nope]"],
    ["data=array", "data.path=table.csv", "data.label=nope"],
    ["data=array", "data.path=damaged.npy"],
    ["data=array", "data.path=folder"],
    ["from=nowhere"],
    ["from=damaged.npy"],
    ["resume=folder"],
    ["objective=reflow"],
    ["trust=[nope]"],
    ["logger=[jsonl,nope]", "hydra.run.dir=a/b/c"],
    ["logger=[jsonl,tensorboard]", "trainer.lr=-1"],
    ["hydra.run.dir=folder/run", "trainer.lr=-1"],
    ["hydra.run.dir=folder", "trainer.lr=-1"],
    ["-m", "trainer.lr=-1,-2"],
    ["-m", "trainer.lr=-1,-2", "hydra.sweep.dir=folder"],
    ["-m", "trainer.lr=-1,-2", "hydra.sweep.dir=folder/a/b"],
    ["-m", "data=array", "data.path=table.csv,folder", "data.columns=[nope]"],
    ["-m", "seed=1,2", "hydra.sweep.subdir=."],
    ["--cfg", "nope"],
    ["outputs"],
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_refused_commands_leave_what_was_there(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    there = [tmp_path / "folder" / name for name in ("kept.txt", ".hydra/config.yaml", "flowtrain.log")]
    for path in there:
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    (tmp_path / "damaged.npy").write_bytes(b"no array")
    (tmp_path / "table.csv").write_text("a,b\n" + "".join(f"{i / 7},{i % 5 / 3}\n" for i in range(40)))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("flowtrain", *arguments)
    assert code == (1 if arguments[-1] == "hydra.sweep.dir=folder" else 2)
    assert "Traceback" not in err
    kept = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    # a sweep in an existing directory keeps its table
    assert all(path.is_relative_to(tmp_path / "folder") for path in kept)
    assert kept == [] or arguments[-1] == "hydra.sweep.dir=folder"
    assert [path.read_text() for path in there] == ["kept"] * 3


def test_interrupt_before_the_first_step_leaves_no_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build_flow", interrupted)
    for sweep in ([], ["-m"]):
        assert run("flowtrain", *SMALL, *sweep)[0] == 130
        assert list(tmp_path.iterdir()) == []


def test_started_run_is_kept_after_an_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed step the last checkpoint is kept. After a bug the files for a report are kept."""

    def failing(*_: object) -> None:
        raise SolverError("no step is small enough")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", failing)
        assert run("flowtrain", *SMALL, "model=affine", "hydra.run.dir=a b")[0] == 1
        for name in ("checkpoints/last.pt", "flowtrain.log", ".hydra/config.yaml"):
            assert (tmp_path / "a b" / name).is_file()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(build, "build_flow", broken)
    with pytest.raises(ZeroDivisionError):
        run("flowtrain", *SMALL, "hydra.run.dir=bug")
    assert (tmp_path / "bug/.hydra/config.yaml").is_file()


def test_a_refused_resume_leaves_the_run_as_it_was(run: Run, tmp_path: Path) -> None:
    assert run("flowtrain", *SMALL, "model=affine", "hydra.run.dir=r")[0] == 0
    (tmp_path / "r/flowtrain.log").unlink()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    for mistake in ("data=rings", "trainer.lr=-1", "nope=1", "device=cuda:9", "logger=[nope]", "trust=[nope]"):
        assert run("flowtrain", "resume=r", mistake)[0] == 2
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_realnvp_refuses_one_column(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.random.default_rng(0).standard_normal(100))
    code, _, err = run("flowtrain", "model=realnvp", "data=array", "data.path=one.npy")
    assert code == 2
    assert "at least 2 columns" in err


BAD_OTHERS = [
    ("floweval", ["split=test"], "ckpt=RUN_DIR_OR_FILE"),
    ("floweval", ["ckpt=nowhere"], "no such file"),
    ("floweval", ["ckpt={run}", "split=train"], "val, test"),
    ("floweval", ["ckpt={run}", "solver.tol=1"], "no key solver.tol; did you mean solver.[ar]tol.* method, rtol"),
    ("floweval", ["ckpt={run}", "frobnicate=1"], "no key frobnicate.*ckpt, split, out"),
    ("floweval", ["ckpt={run}", "model=realnvp"], "model=realnvp"),
    ("floweval", ["ckpt={run}", "trainer.lr=77"], "trainer.lr: .*ckpt.* keys of model, data, solver"),
    ("floweval", ["ckpt={run}", "objective=hybrid"], "objective: "),
    ("floweval", ["ckpt={run}", "solver.rtol=1e-3,1e-4"], "flowtrain -m"),
    ("floweval", ["ckpt={run}", "batch_size=true"], "batch_size=True"),
    ("flowtrain", ["resume={run}", "data=rings"], "start a new run"),
    ("flowtrain", ["resume={run}", "model.activation=swish"], "start a new run"),
    ("floweval", ["ckpt={run}", "batch_size=0"], "batch_size=0"),
    ("floweval", ["{run}", "ckpt={run}"], "one run"),
    ("floweval", ["{run}", "{run}"], "one run"),
    ("floweval", ["{run}/nowhere"], "nowhere: no such run"),
    ("floweval", ["{run}", "report"], "report=..."),
    ("floweval", ["{run}", "splt=val"], "did you mean split"),
    ("flowsample", ["{run}", "--foo"], "--foo"),
    ("flowsample", ["{run}", "+frobnicate=1"], "no key frobnicate"),
    ("flowsample", ["{run}", "~solver"], "~solver"),
    ("flowsample", ["{run}", "trust=[nope]"], "trust=nope"),
    ("floweval", ["ckpt={run}/flowtrain.log"], "not a flowtrain checkpoint|complete"),
    ("floweval", ["ckpt={run}", "data=gas"], "data=gas: .*target$"),
    ("flowsample", ["ckpt={run}", "n=0"], "n=0"),
    ("flowsample", ["ckpt={run}", "n=many"], "n=many"),
    ("flowsample", ["ckpt={run}", "temperature=-1"], "temperature=-1"),
    ("flowsample", ["ckpt={run}", "out=s.xlsx"], ".parquet"),
]


def test_mistakes_of_the_other_commands_get_one_message(run: Run) -> None:
    _, out, _ = run("flowtrain", *SMALL, *TINY)
    run_dir = out.splitlines()[-1]
    for command, arguments, words in BAD_OTHERS:
        code, out, err = run(command, *(a.format(run=run_dir) for a in arguments))
        assert (code, out) == (2, ""), (arguments, err)
        assert re.search(words, err), err
        assert len(err.strip().splitlines()) == 1, err


def test_a_run_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    keys = ["model=affine", *SMALL, "hydra.run.dir=here"]
    assert run("flowtrain", *keys)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    code, _, err = run("flowtrain", *keys, "seed=5")
    assert code == 2
    assert "resume=" in err
    assert {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()} == before


def test_unwritable_directory_gets_one_message(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("flowtrain", *SMALL, "model=affine")
    (tmp_path / "file").touch()
    for command, key in (("flowtrain", "hydra.run.dir"), ("floweval", "out"), ("flowsample", "out")):
        rest = SMALL if command == "flowtrain" else [f"ckpt={out.splitlines()[-1]}"]
        code, _, err = run(command, *rest, f"{key}=file/x.npy")
        assert code == 1
        assert "file" in err
        assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("override", ["plots.format.x=1", "logger.tensorboard=true", "+logger.x=1"])
def test_a_key_below_a_list_gives_one_message(run: Run, override: str) -> None:
    code, out, err = run("flowtrain", "model=affine", override)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert override in err
