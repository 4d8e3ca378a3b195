"""The options of figures on the command line and in Python, and all figures of a run drawn again."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Run, Train
from helpers.files import written
from matplotlib.figure import Figure

import flowtrain
from flowtrain.plotting import style
from flowtrain.plotting.options import PlotOptions
from flowtrain.training import checkpoint
from flowtrain.utils.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden/1/realnvp_table"
SMALL = ["model=affine", "trainer.steps=4", "trainer.batch_size=16", "data.n_val=32", "data.n_test=32"]


def figures(run_dir: str | Path) -> set[str]:
    return {path.name for path in Path(run_dir, "plots").iterdir()}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).normal(size=(300, 4))
    return written(tmp_path / "table.csv", "age,height,weight,wealth", rows)


def test_a_run_writes_its_figures_in_each_format(run: Run, tmp_path: Path) -> None:
    more = ["plots.format=[svg,pdf]", "plots.title=false", "trainer.plot_every=2"]
    code, _, err = run("flowtrain", *SMALL, "hydra.run.dir=r", *more)
    assert code == 0, err
    names = ("calibration", "curves", "samples", "samples_000002")
    assert {f"{name}.{kind}" for name in names for kind in ("pdf", "svg")} <= figures("r")
    assert not any(name.endswith(".png") for name in figures("r"))
    saved = checkpoint.load(tmp_path / "r/checkpoints/best.pt")["config"]["plots"]
    assert saved == {"format": ["svg", "pdf"], "title": False, "columns": None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plots.format=jpg"], "png, pdf, svg"),
        (["plots.format=[png,jpg]"], "png, pdf, svg"),
        (["plots.title=no"], "plots.title"),
        (["plots.columns=[0]"], "plots.columns"),
        (["plots=true"], "plots.format"),
        (["plots.formats=png"], "plots.format"),
    ],
)
def test_invalid_options_are_refused_before_training(
    run: Run, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, out, err = run("flowtrain", *SMALL, "hydra.run.dir=r", *arguments)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert not Path("r").exists()


def test_columns_of_the_table_are_known_before_training(run: Run, table: Path) -> None:
    arguments = ["model=affine", "data=array", f"data.path={table}", "trainer.steps=4", "hydra.run.dir=r"]
    code, _, err = run("flowtrain", *arguments, "plots.columns=[wight]")
    assert code == 2
    assert "'weight'" in err
    assert run("flowtrain", *arguments, "plots.columns=[weight,0:2]")[0] == 0


@pytest.mark.usefixtures("without_figures")
def test_tensorboard_gets_no_figures_other_than_png(run: Run) -> None:
    pytest.importorskip("tensorboard")
    code, _, err = run("flowtrain", *SMALL, "hydra.run.dir=r", "plots.format=pdf", "logger=[jsonl,tensorboard]")
    assert code == 0
    assert "TensorBoard" in err


def test_a_fit_from_python_takes_the_options(tmp_path: Path, run: Run) -> None:
    x = torch.randn(200, 2)
    given = {"model": "affine", "steps": 4, "progress": False}
    flowtrain.fit(x, **given, run_dir=tmp_path / "r", overrides=["plots.format=[pdf]"])  # type: ignore[arg-type]
    assert {"samples.pdf", "curves.pdf"} <= figures(tmp_path / "r")
    with pytest.raises(ConfigError, match="png, pdf, svg"):
        flowtrain.fit(x, **given, overrides={"plots.format": "jpg"})  # type: ignore[arg-type]


def test_a_run_of_an_older_version_has_the_defaults_and_can_change_them(run: Run, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    data = f"data.path={GOLDEN.parents[1] / 'data' / expected['data']}"
    for name in ("a", "b"):
        with tarfile.open(GOLDEN / "run.tar.xz") as archive:
            archive.extractall(tmp_path / name, filter="data")
    assert "plots" not in checkpoint.load(tmp_path / "a/checkpoints/last.pt")["config"]
    assert run("floweval", "a", data, "plots.format=svg")[0] == 0
    assert any(name.endswith(".svg") for name in figures("a"))
    code, _, err = run("flowtrain", "resume=a", data)
    assert code == 0, err
    assert {"samples.png", "curves.png"} <= figures("a")
    code, _, err = run("flowtrain", "resume=b", data, "plots.format=pdf")
    assert code == 0, err
    assert "samples.pdf" in figures("b")
    assert checkpoint.load(tmp_path / "b/checkpoints/last.pt")["config"]["plots"]["format"] == "pdf"


def test_a_search_and_its_candidates_keep_the_options(run: Run, table: Path) -> None:
    search = ["model=auto", "model.candidates=[affine]", "trainer.steps=4", "data=array", f"data.path={table}"]
    code, _, err = run("flowtrain", *search, "plots.format=pdf", "hydra.run.dir=r")
    assert code == 0, err
    assert {"samples.pdf", "curves.pdf"} <= figures("r")
    assert checkpoint.load(Path("r/checkpoints/best.pt"))["config"]["plots"]["format"] == "pdf"
    assert run("floweval", "r", "plots=true", "plots.format=svg")[0] == 0
    assert {"samples.svg", "curves.svg", "calibration.svg"} <= figures("r")


def test_floweval_draws_the_figures_of_a_run_again(run: Run, trained: Train) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40")
    before = figures(run_dir)
    assert run("floweval", run_dir, "ood=circles", "plots.format=pdf")[0] == 0
    assert figures(run_dir) - before == {"calibration.pdf", "ood.pdf"}
    code, out, _ = run("floweval", run_dir, "ood=circles", "plots=true", "plots.format=svg", "plots.title=false")
    assert code == 0
    drawn = {name for name in figures(run_dir) if name.endswith(".svg")}
    assert drawn == {name.replace(".png", ".svg") for name in before if "samples_" not in name} | {"ood.svg"}
    assert all(name in out for name in drawn)
    # figures of the validation set, and of other data, for which no curves are drawn
    assert run("floweval", run_dir, "split=val", "plots=true")[0] == 0
    assert {"samples-val.png", "curves-val.png"} <= figures(run_dir)
    written(Path("new.csv"), "x,y", np.zeros((30, 2)))
    assert run("floweval", run_dir, "data.path=new.csv", "plots=true")[0] == 0
    assert "samples-new.png" in figures(run_dir)
    assert "curves-new.png" not in figures(run_dir)
    assert run("floweval", run_dir, "plots=true", "out=o/e.json")[0] == 0
    assert {"e_samples.png", "e_curves.png", "e_calibration.png"} <= {path.name for path in Path("o").iterdir()}


def test_a_checkpoint_elsewhere_is_drawn_without_curves(run: Run, trained: Train) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40")
    Path("else").mkdir()
    Path("else/flow.pt").write_bytes(Path(run_dir, "checkpoints/best.pt").read_bytes())
    code, _, err = run("floweval", "else/flow.pt", "plots=true", "dtype=float64")
    assert (code, err) == (0, "")
    assert {"samples.png", "calibration.png"} <= figures("else")
    assert "curves.png" not in figures("else")


@pytest.mark.slow
def test_figures_of_an_ensemble_and_of_a_conditional_flow(run: Run, table: Path) -> None:
    code, _, err = run("flowtrain", "-m", *SMALL, "seed=0,1", "hydra.sweep.dir=s")
    assert code == 0, err
    assert run("floweval", "s", "plots=true")[0] == 0
    assert {"samples.png", "curves.png", "calibration.png"} <= figures("s")
    rows = np.random.default_rng(0).normal(size=(300, 3))
    rows[:, 2] = np.arange(300) % 2
    written(Path("classes.csv"), "age,height,class", rows)
    conditional = ["model=realnvp", "model.conditional=true", "model.hidden=[8]", "data=array", "data.path=classes.csv"]
    code, _, err = run("flowtrain", *conditional, "data.label=class", "trainer.steps=2", "hydra.run.dir=c")
    assert code == 0, err
    assert run("floweval", "c", "plots=true", "plots.format=svg")[0] == 0
    assert {"samples.svg", "curves.svg", "calibration.svg", "paths.svg"} <= figures("c")


@pytest.mark.parametrize("name", ["curves", "samples", "calibration"])
def test_a_figure_that_fails_is_a_warning_and_the_others_are_drawn(
    run: Run, trained: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40")
    expected = {file.replace(".png", ".pdf") for file in figures(run_dir)}
    save = style.save

    def fails(figure: Figure, path: Path, options: PlotOptions) -> None:
        if path.stem == name:
            raise ZeroDivisionError("a mistake")
        save(figure, path, options)

    monkeypatch.setattr(style, "save", fails)
    code, out, err = run("floweval", run_dir, "plots=true", "plots.format=pdf")
    assert code == 0
    assert len(err.strip().splitlines()) == 1
    assert name in err
    assert "a mistake" in err
    assert {file for file in figures(run_dir) if file.endswith(".pdf")} == expected - {f"{name}.pdf"}
    assert f"{name}.pdf" not in out
    assert json.loads(Path(run_dir, "eval.json").read_text())["n"] == 60


def test_flowsample_takes_the_options(run: Run, trained: Train) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40")
    code, out, err = run("flowsample", run_dir, "n=50", "plots.format=[png,pdf]", "plots.title=false")
    assert (code, err) == (0, "")
    assert "samples.pdf" in out
    assert {"samples.npy", "samples.png", "samples.pdf"} <= {path.name for path in Path(run_dir).iterdir()}
    for arguments in (["plots.format=jpg"], ["plots=true"], ["plots.columns=[0]"]):
        code, _, err = run("flowsample", run_dir, "n=50", *arguments)
        assert code == 2, arguments
        assert len(err.strip().splitlines()) == 1


def test_flowsample_draws_chosen_columns_of_a_table(run: Run, trained: Train, table: Path) -> None:
    run_dir = trained("data=array", f"data.path={table}")
    assert run("flowsample", run_dir, "n=50")[0] == 0
    assert not Path(run_dir, "samples.png").exists()
    assert run("flowsample", run_dir, "n=50", "plots.columns=[weight,0]")[0] == 0
    assert Path(run_dir, "samples.png").exists()
    code, _, err = run("flowsample", run_dir, "n=50", "plots.columns=[wight]")
    assert code == 2
    assert "'weight'" in err


def test_the_report_says_how_a_run_was_trained(run: Run, trained: Train) -> None:
    run_dir = trained("data=moons", "data.n_test=60", "data.n_val=40", "seed=3")
    assert run("floweval", run_dir, "report=true", "plots.format=svg", "seed=5")[0] == 0
    for name in ("report.md", "report.html"):
        text = Path(run_dir, name).read_text()
        for words in ("trainer.steps=4", "seed=3", "plots.format=svg", torch.__version__, "cpu"):
            assert words in text, (name, words)
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", text)
    # the run's own figures are PNG
    assert "[calibration](<plots/calibration.svg>)" in Path(run_dir, "report.md").read_text()
    assert "[samples](<plots/samples.png>)" in Path(run_dir, "report.md").read_text()
