"""`flowsample`: pictures, animations, and their titles."""

from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, TINY, Run
from helpers.figures import skip_figures
from helpers.files import gif_of, write_set
from helpers.flows import IMAGE_MODELS
from matplotlib.figure import Figure
from PIL import Image

from flowtrain.cli.load_run import known_test_nll
from flowtrain.plotting import animation, style, transport_pictures
from flowtrain.plotting.options import DEFAULT, PlotOptions

FRAMES = 7

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(animation, "RESOLUTION", 12)
    monkeypatch.setattr(animation, "AFTER", 1)
    monkeypatch.setattr(transport_pictures, "FRAMES", FRAMES)


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    made = style.new_figure

    def recorded(height: float, title: str, options: PlotOptions = DEFAULT) -> Figure:
        found.append(title)
        return made(height, title, options)

    monkeypatch.setattr(style, "new_figure", recorded)
    return found


def trained(run: Run, *arguments: str) -> None:
    """Returns a run in the directory r, without figures."""
    # data=array has no n_val and n_test
    small = [a for a in SMALL if "data=array" not in arguments or not a.startswith("data.")]
    with pytest.MonkeyPatch.context() as patched:
        skip_figures(patched)
        code, _, err = run("flowtrain", *small, "hydra.run.dir=r", *arguments)
    assert code == 0, err


@pytest.mark.slow
def test_two_columns_are_animated(run: Run, titles: list[str], tmp_path: Path) -> None:
    trained(run, *TINY)
    titles.clear()
    code, out, err = run("flowsample", "ckpt=r", "animate=true", "n=30")
    assert (code, out, err) == (0, f"written to {Path('r/animation.gif')}\n", "")
    first = (tmp_path / "r/animation.gif").read_bytes()
    assert gif_of(tmp_path / "r/animation.gif").n_frames == FRAMES
    assert titles[0].startswith("ffjord on moons, step 4, test NLL ")
    assert titles[0].endswith(" nats")
    run("flowsample", "ckpt=r", "animate=true", "n=30", "out=again.gif")
    assert (tmp_path / "again.gif").read_bytes() == first
    for changed in ("seed=1", "temperature=0.5", "n=20"):
        run("flowsample", "ckpt=r", "animate=true", *({"n": "n=30"} | {changed[0]: changed}).values(), "out=o.gif")
        assert (tmp_path / "o.gif").read_bytes() != first


def test_couplings_are_animated_in_steps(run: Run, tmp_path: Path) -> None:
    keys = ["model=realnvp", "model.layers=2", "model.hidden=[8]"]
    assert run("flowtrain", *SMALL, "hydra.run.dir=r", *keys)[0] == 0
    code, _, err = run("flowsample", "ckpt=r", "animate=true")
    assert (code, err) == (0, "")
    assert {p.name for p in (tmp_path / "r/plots").iterdir()} >= {"transport.png", "paths.png", "curves.png"}


MISTAKES = [
    (["animate=true", "out=a.npy"], ".gif or .mp4"),
    (["animate=true", "out=a.mp4"], "ffmpeg is not installed"),
    (["animate=yes"], "animate=yes"),
    (["animate=true", "quality=[1,2]"], "quality"),
    (["animate=true", "log_scale=true"], "log_scale=true"),
    (["animate=true", "label=1"], "not conditional"),
    (["animate=true", "n=0"], "n=0"),
    (["animate=true", "out=nowhere/../r"], ".gif or .mp4"),
    (["log_scale=1e"], "log_scale"),
    (["animate=true", "n=100001"], "at most 100000"),
    (["animate=true", "temperature=1e39"], "NaN or infinite: nothing was written"),
]


def test_mistakes_get_one_message(run: Run, tmp_path: Path) -> None:
    trained(run, "model=affine")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for arguments, says in MISTAKES:
        code, out, err = run("flowsample", "ckpt=r", *arguments)
        assert (code, out, len(err.splitlines())) == (1 if "infinite" in says else 2, "", 1), (arguments, err)
        assert says in err
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, arguments


def test_animation_and_log_scale_of_other_dimensions_are_refused(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 3)))
    trained(run, "model=affine", "data=array", "data.path=x.npy")
    code, _, err = run("flowsample", "ckpt=r", "animate=true")
    assert (code, "two columns and images" in err) == (2, True)
    code, _, err = run("flowsample", "ckpt=r", "log_scale=true")
    assert (code, "one or two columns" in err) == (2, True)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.usefixtures("full_size")
def test_logarithmic_scale_changes_the_picture(run: Run, tmp_path: Path, d: int) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(400, d)))
    trained(run, "model=affine", "data=array", "data.path=x.npy")
    pictures = []
    for given in ("log_scale=false", "log_scale=true"):
        code, _, err = run("flowsample", "ckpt=r", given, "n=500")
        assert (code, err) == (0, "")
        with Image.open(tmp_path / "r/samples.png") as image:
            pictures.append(np.asarray(image.convert("L"), dtype=float))
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).mean() > 1


def test_titles_tell_the_nll_of_the_checkpoint_and_of_no_other(run: Run, titles: list[str], tmp_path: Path) -> None:
    trained(run, "model=affine")
    titles.clear()
    run("flowsample", "ckpt=r", "n=500", "temperature=0.5")
    run("flowsample", "ckpt=r/checkpoints/last.pt", "n=500", "out=a.npy")
    run("flowsample", "ckpt=r", "n=500", "data=circles", "out=b.npy")
    (tmp_path / "r/result.json").write_text("{")
    run("flowsample", "ckpt=r", "n=500", "out=c.npy")
    assert titles[0].startswith("affine on moons, step 4, test NLL ")
    assert titles[0].endswith(" nats, 500 samples at temperature 0.5")
    assert titles[1:] == [
        "affine on moons, step 4, 500 samples",
        "affine on circles, step 4, 500 samples",
        "affine on moons, step 4, 500 samples",
    ]
    assert known_test_nll(tmp_path / "nowhere/checkpoints/best.pt", 4) == ""


@pytest.mark.parametrize("name", ["glow", "ffjord"])
@pytest.mark.parametrize("conditional", [False, True])
def test_images_are_animated(run: Run, tmp_path: Path, name: str, conditional: bool) -> None:
    write_set(tmp_path / "data" / "mnist")
    keys = ["data=mnist", "data.root=data", "data.n_val=4", "data.n_test=4", "trainer.batch_size=8", "recipe=none"]
    labels = ["model.conditional=true"] if conditional else []
    trained(run, *keys, "trainer.steps=2", *IMAGE_MODELS[name], *labels)
    label = ["label=7"] if conditional else []
    code, out, err = run("flowsample", "ckpt=r", "animate=true", "n=6", *label)
    assert (code, out, err) == (0, "written to r/animation.gif\n", "")
    assert gif_of(tmp_path / "r/animation.gif").n_frames == FRAMES


def test_pictures_at_one_context_have_it_in_their_titles(run: Run, titles: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mass = rng.normal(5, 2, 200)
    rows = np.column_stack([mass, mass + rng.normal(size=200), rng.normal(size=200)])
    np.savetxt(tmp_path / "x.csv", rows, delimiter=",", header="mass,a,b", comments="")
    data = ["data=array", f"data.path={tmp_path}/x.csv", "data.context=[mass]"]
    trained(run, "model=affine", "trainer.steps=5", *data)
    titles.clear()
    code, _, err = run("flowsample", "ckpt=r", "context={mass: 4}", "n=50")
    assert (code, err) == (0, "")
    assert "50 samples at mass = 4" in titles[0]
    assert (tmp_path / "r/samples.png").exists()
    titles.clear()
    assert run("flowsample", "ckpt=r", f"context={tmp_path}/x.csv")[0] == 0
    assert "200 samples at 200 contexts" in titles[0]
    titles.clear()
    assert run("flowsample", "ckpt=r", "animate=true", "n=20", "context={mass: 4}")[0] == 0
    assert "mass = 4" in titles[0]
    # a file has several contexts
    code, _, err = run("flowsample", "ckpt=r", "animate=true", f"context={tmp_path}/x.csv")
    assert code == 2
    assert "context" in err
