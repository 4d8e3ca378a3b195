"""The commands with `data.context`: training, evaluation, sampling, ensembles, resume and refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import Run

import flowtrain
from flowtrain.runs.banner import next_commands

MODEL = ["model=realnvp", "model.layers=2", "model.hidden=[16]", "trainer.steps=5"]
# a Gaussian whose mean is linear in the context, which is the density of the rows
LINEAR = ["model=affine", "trainer.steps=60", "trainer.val_every=20"]
CONTEXT = "data.context=[mass,kind]"

pytestmark = pytest.mark.usefixtures("float32", "without_figures")


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns samples (n, 3), whose first column is about 2 mass, and their contexts (n, 2)."""
    rng = np.random.default_rng(seed)
    context = np.column_stack([rng.normal(5, 2, n), rng.integers(0, 3, n)])
    x = rng.normal(size=(n, 3)) * [0.3, 1, 2]
    x[:, 0] += 2 * context[:, 0]
    x[:, 1] += 3 * context[:, 1]
    return x, context


def write(path: Path, names: list[str], columns: np.ndarray) -> Path:
    np.savetxt(path, columns, delimiter=",", header=",".join(names), comments="")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a table in which the context columns are between the columns of the samples."""
    x, context = rows(400)
    columns = np.column_stack([context[:, 0], x[:, 0], context[:, 1], x[:, 1:]])
    return write(tmp_path_factory.mktemp("table") / "train.csv", ["mass", "a", "kind", "b", "c"], columns)


@pytest.fixture
def trained_run(run: Run, table: Path, tmp_path: Path) -> str:
    """Returns a run in the directory r, trained once and copied."""
    done = table.parent / "run"
    if not done.exists():
        keys = ["data=array", f"data.path={table}", CONTEXT, f"hydra.run.dir={done}"]
        code, _, err = run("flowtrain", *LINEAR, *keys)
        assert code == 0, err
    shutil.copytree(done, tmp_path / "r")
    return "ckpt=r"


def refused(run: Run, command: str, *arguments: str) -> str:
    code, _, err = run(command, *arguments)
    assert code == 2
    assert "Traceback" not in err
    return err


def test_a_run_with_context_is_evaluated_and_compared_with_a_linear_gaussian(trained_run: str) -> None:
    flow = flowtrain.load("r")
    assert [column.name for column in flow.context] == ["mass", "kind"]
    result = json.loads(Path("r/result.json").read_text())
    # the residuals of the regression are Gaussian, so no density can be better than this baseline by much
    entropy = 3 * 0.5 * np.log(2 * np.pi * np.e) + np.log(0.3 * 1 * 2)
    assert result["nll"] == pytest.approx(entropy, abs=0.5)
    assert result["baselines"].keys() == {"gaussian"}
    assert result["baselines"]["gaussian"]["nll"] == pytest.approx(entropy, abs=0.5)


def test_new_files_are_scored_by_the_names_of_their_columns(run: Run, trained_run: str, tmp_path: Path) -> None:
    x, context = rows(20, seed=1)
    write(
        tmp_path / "new.csv",
        ["kind", "c", "id", "mass", "b", "a"],
        np.column_stack([context[:, 1], x[:, 2], np.arange(20), context[:, 0], x[:, 1], x[:, 0]]),
    )
    code, _, err = run("floweval", trained_run, f"data.path={tmp_path}/new.csv", "scores=s.npy")
    assert code == 0, err
    flow = flowtrain.load("r")
    np.testing.assert_allclose(np.load("s.npy"), flow.log_prob(x.astype(np.float32), context), atol=1e-3)
    # positions are those of the training file
    full = np.column_stack([context[:, 0], x[:, 0], context[:, 1], x[:, 1:]])
    np.save(tmp_path / "new.npy", full)
    code, _, err = run(
        "floweval", trained_run, f"data.path={tmp_path}/new.npy", "data.context=[0,2]", "scores=p.npy", "out=e.json"
    )
    assert code == 0, err
    np.testing.assert_allclose(np.load("p.npy"), np.load("s.npy"), atol=1e-3)


def test_a_file_without_a_context_column_is_refused_by_name(run: Run, table: Path, tmp_path: Path) -> None:
    # the context is given by positions in the training file, which do not apply to another file with names
    code, _, err = run(
        "flowtrain", *LINEAR, "data=array", f"data.path={table}", "data.context=[0,2]", "hydra.run.dir=r"
    )
    assert code == 0, err
    x, context = rows(20, seed=1)
    write(tmp_path / "new.csv", ["mass", "a", "other", "b", "c"], np.column_stack([context[:, 0], x, context[:, 1]]))
    assert "'kind'" in refused(run, "floweval", "ckpt=r", f"data.path={tmp_path}/new.csv")


def test_samples_at_the_contexts_of_a_file(run: Run, trained_run: str, tmp_path: Path) -> None:
    contexts = np.array([[2.0, 0.0], [8.0, 2.0]])
    write(tmp_path / "c.csv", ["kind", "id", "mass"], np.column_stack([contexts[:, 1], [7, 8], contexts[:, 0]]))
    code, _, err = run("flowsample", trained_run, f"context={tmp_path}/c.csv", "n=50", "out=s.csv")
    assert code == 0, err
    assert Path("s.csv").read_text().splitlines()[0] == "mass,kind,a,b,c"
    found = np.genfromtxt("s.csv", delimiter=",", skip_header=1)
    assert found.shape == (100, 5)
    np.testing.assert_array_equal(found[:, :2], contexts.repeat(50, 0))
    # the mean of column a is twice the mass
    np.testing.assert_allclose(found[:, 2].reshape(2, 50).mean(1), 2 * contexts[:, 0], atol=0.3)
    np.testing.assert_allclose(found[:, 3].reshape(2, 50).mean(1), 3 * contexts[:, 1], atol=0.8)
    # by position, without names; by default, one sample for each row
    np.save(tmp_path / "c.npy", contexts)
    code, _, err = run("flowsample", trained_run, f"context={tmp_path}/c.npy", "out=s.npy")
    assert code == 0, err
    assert np.load("s.npy").shape == (2, 3)


def test_the_file_of_contexts_is_never_overwritten(run: Run, trained_run: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", ["mass", "kind"], rows(3)[1])
    before = path.read_bytes()
    assert "c.csv" in refused(run, "flowsample", trained_run, "context=c.csv", f"out={path}")
    assert path.read_bytes() == before


def test_samples_at_one_context(run: Run, trained_run: str) -> None:
    code, _, err = run("flowsample", trained_run, "context={mass: 2, kind: 1}", "n=5")
    assert code == 0, err
    assert np.load("r/samples.npy").shape == (5, 3)


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("n=5", "context={mass: "),
        ("context={mass: 1, kid: 1}", "kind"),
        ("context={mass: 1}", "kind"),
        ("context={mass: heavy, kind: 1}", "mass"),
        ("context=[1,2]", "context"),
        ("context=nowhere.csv", "nowhere.csv"),
        ("context=less.csv", "'kind'"),
        ("context=text.csv", "line 2"),
        ("label=1", "context={mass: "),
        ("quality=[1]", "context"),
    ],
)
def test_wrong_contexts_are_refused(option: str, word: str, run: Run, trained_run: str, tmp_path: Path) -> None:
    (tmp_path / "less.csv").write_text("mass,a\n1,2\n")
    (tmp_path / "text.csv").write_text("mass,kind\nheavy,2\n")
    extra = ["context={mass: 1, kind: 1}"] if option.startswith("quality") else []
    assert word in refused(run, "flowsample", trained_run, option, *extra)


def test_a_context_for_another_model_is_refused(run: Run, table: Path) -> None:
    assert run("flowtrain", *LINEAR, "data=array", f"data.path={table}", "hydra.run.dir=r", "trainer.steps=5")[0] == 0
    assert "data.context" in refused(run, "flowsample", "ckpt=r", "context={mass: 1}")


def test_labels_and_a_context_exclude_each_other(run: Run, table: Path) -> None:
    keys = ["data.context=[mass]", "data.label=kind", "model.conditional=true"]
    for model in (MODEL, ["model=auto", "trainer.steps=5"]):
        err = refused(run, "flowtrain", *model, "data=array", f"data.path={table}", *keys)
        assert "categorical" in err


def test_a_run_with_context_is_resumed_and_used_by_from(run: Run, trained_run: str, tmp_path: Path) -> None:
    code, _, err = run("flowtrain", "resume=r", "trainer.steps=80")
    assert code == 0, err
    context = flowtrain.load("r").context
    # other rows have another mean of the context, but the networks need the features of the run `from`
    x, more = rows(200, seed=4)
    more[:, 0] += 1
    write(tmp_path / "more.csv", ["mass", "kind", "a", "b", "c"], np.column_stack([more, x]))
    keys = [f"data.path={tmp_path}/more.csv", "hydra.run.dir=again", "trainer.steps=5"]
    code, _, err = run("flowtrain", "from=r", *keys)
    assert code == 0, err
    assert flowtrain.load("again").context == context
    code, _, err = run("flowtrain", "resume=again", "trainer.steps=8")
    assert code == 0, err
    (tmp_path / "less.csv").write_text("mass,a,b,c\n" + "1,2,3,4\n" * 50)
    assert "'kind'" in refused(run, "flowtrain", "from=r", f"data.path={tmp_path}/less.csv", "hydra.run.dir=other")


def test_runs_with_the_same_context_form_an_ensemble(run: Run, table: Path) -> None:
    data = ["data=array", f"data.path={table}"]
    for name, keys in {
        "a": [CONTEXT],
        "b": [CONTEXT, "seed=1"],
        "c": ["data.context=[mass]", "data.columns=[a,b,c]"],
    }.items():
        code, _, err = run("flowtrain", *LINEAR, *data, *keys, f"hydra.run.dir={name}", "trainer.steps=20")
        assert code == 0, err
    code, _, err = run("flowsample", "ckpt=[a,b]", "context={mass: 5, kind: 1}", "n=20", "out=s.npy")
    assert code == 0, err
    assert np.load("s.npy").shape == (20, 3)
    code, _, err = run("floweval", "ckpt=[a,b]", "out=e.json")
    assert code == 0, err
    assert len(json.loads(Path("e.json").read_text())["members"]) == 2
    assert "context" in refused(run, "floweval", "ckpt=[a,c]", "out=f.json")


@pytest.mark.parametrize("objective", ["likelihood", "flow_matching", "hybrid", "rectified"])
def test_every_objective_trains_with_context(objective: str, run: Run, table: Path) -> None:
    keys = ["model=ffjord", "model.hidden=[8]", "data=array", f"data.path={table}", CONTEXT, "trainer.steps=12"]
    if objective == "rectified":
        code, _, err = run("flowtrain", *keys, "objective=flow_matching", "hydra.run.dir=teacher")
        assert code == 0, err
        keys = ["from=teacher", "trainer.steps=12"]
    code, _, err = run("flowtrain", *keys, f"objective={objective}", "hydra.run.dir=r")
    assert code == 0, err
    assert np.isfinite(json.loads(Path("r/result.json").read_text())["nll"])


def test_a_search_with_context_fits_conditional_models(run: Run, table: Path) -> None:
    keys = ["trainer.steps=12", "trainer.time_limit=null", "model.candidates=[affine,realnvp]"]
    code, _, err = run("flowtrain", "model=auto", *keys, "data=array", f"data.path={table}", CONTEXT, "hydra.run.dir=r")
    assert code == 0, err
    flow = flowtrain.load("r")
    x, context = rows(50, seed=2)
    shifted = context + np.array([4.0, 0.0])
    # the first column is about 2 mass
    assert flow.log_prob(x, context).mean() > flow.log_prob(x, shifted).mean() + 1


def test_next_commands_name_a_context() -> None:
    flow = flowtrain.models.realnvp(3, context=2)
    assert "'context={c0: 0, c1: 0}'" in next_commands(Path("r"), flow)


def test_categories_are_given_by_name(run: Run, tmp_path: Path) -> None:
    x, context = rows(300)
    kinds = np.array(["red", "blue", "green"])[context[:, 1].astype(int)]
    lines = [f"{kind},{','.join(map(str, row))}" for kind, row in zip(kinds, x, strict=True)]
    (tmp_path / "x.csv").write_text("\n".join(["kind,a,b,c", *lines]) + "\n")
    code, _, err = run("flowtrain", *LINEAR, "data=array", "data.path=x.csv", "data.context=[kind]", "hydra.run.dir=r")
    assert code == 0, err
    code, _, err = run("flowsample", "ckpt=r", "context={kind: green}", "n=100", "out=s.csv")
    assert code == 0, err
    assert Path("s.csv").read_text().splitlines()[1].startswith("green,")
    (tmp_path / "c.csv").write_text("id,kind\n1,green\n2,red\n")
    code, _, err = run("flowsample", "ckpt=r", "context=c.csv", "n=100", "out=s.npy")
    assert code == 0, err
    # column b is about 3 times the number of the kind
    np.testing.assert_allclose(np.load("s.npy")[:, 1].reshape(2, 100).mean(1), [6, 0], atol=0.6)
    for option in ("context={kind: pink}", "context=pink.csv"):
        (tmp_path / "pink.csv").write_text("kind\npink\n")
        assert "pink" in refused(run, "flowsample", "ckpt=r", option)
    (tmp_path / "new.csv").write_text("a,kind,b,c\n1,pink,2,3\n")
    assert "pink" in refused(run, "floweval", "ckpt=r", "data.path=new.csv")


def test_names_and_files_with_special_characters(run: Run, tmp_path: Path) -> None:
    x, context = rows(100)
    path = write(tmp_path / "t.csv", ["a", "E (GeV)"], np.column_stack([x[:, 0], context[:, 0]]))
    keys = ["data=array", f"data.path={path}", "data.context=E (GeV)", "trainer.steps=5", "hydra.run.dir=r"]
    code, _, err = run("flowtrain", "model=affine", *keys)
    assert code == 0, err
    write(tmp_path / "energies (1), a.csv", ["E (GeV)"], np.array([[5.5]]))
    for given in ("{E (GeV): 5.5}", '{"E (GeV)": 5.5}', "energies (1), a.csv"):
        code, _, err = run("flowsample", "ckpt=r", f"context={given}", "n=2", "out=s.csv")
        assert code == 0, err
        assert np.genfromtxt("s.csv", delimiter=",", skip_header=1)[:, 0].tolist() == [5.5, 5.5]
    assert "E (GeV)" in refused(run, "flowsample", "ckpt=r", "context={E (MeV): 5.5}")
    assert "YAML" in refused(run, "flowsample", "ckpt=r", "context={E (GeV): 5.5")
