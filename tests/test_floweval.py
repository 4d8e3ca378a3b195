"""`floweval` as a user runs it: scores, new data, two sets told apart, reports, and one message for every mistake."""

import gzip
import html.parser
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_data import real
from runs import Run
from sklearn.metrics import roc_auc_score

import flowtrain

FAST = ["model=affine", "trainer.steps=4", "trainer.batch_size=64", "trainer.plot_every=null"]


def trained(run: Run, *arguments: str) -> str:
    code, out, err = run("flowtrain", *FAST, *arguments)
    assert code == 0, err
    return str(Path(out.splitlines()[-1]).absolute())


def evaluated(run: Run, run_dir: str, *arguments: str, name: str = "eval.json") -> dict[str, Any]:
    code, _, err = run("floweval", f"ckpt={run_dir}", *arguments)
    assert code == 0, err
    content: dict[str, Any] = json.loads((Path(run_dir) / name).read_text())
    return content


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).normal([3.0, -1.0, 8.0], [1.0, 5.0, 0.1], (300, 3))
    path = tmp_path / "train.csv"
    np.savetxt(path, rows, delimiter=",", header="height,weight,age", comments="")
    return path


def written(path: Path, header: str, rows: np.ndarray) -> Path:
    np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.9g")
    return path


def test_scores_are_log_p_of_every_row_in_order(run: Run, tmp_path: Path, table: Path) -> None:
    run_dir = trained(run, "data=array", f"data.path={table}")
    new = np.random.default_rng(1).normal([3.0, -1.0, 8.0], 1.0, (2500, 3)).astype(np.float32)
    np.save(tmp_path / "new.npy", new)
    found = evaluated(run, run_dir, "data.path=new.npy", "scores=out/s.npy", "batch_size=700")
    scores = np.load(tmp_path / "out/s.npy")
    expected = flowtrain.load(run_dir).log_prob(torch.from_numpy(new)).detach().numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.dtype == np.float64
    assert (found["split"], found["n"]) == ("all", 2500)
    assert found["nll"] == pytest.approx(-scores.mean())
    # the training file's own test split, and all of its rows
    assert evaluated(run, run_dir)["n"] == 30
    assert evaluated(run, run_dir, "split=all")["n"] == 300
    assert evaluated(run, run_dir, f"data.path={table}", "split=test")["n"] == 30


def test_new_data_are_read_by_the_names_of_the_columns(run: Run, tmp_path: Path, table: Path) -> None:
    run_dir = trained(run, "data=array", f"data.path={table}")
    rows = np.random.default_rng(1).normal([3.0, -1.0, 8.0], 1.0, (50, 3))
    same = written(tmp_path / "same.csv", "height,weight,age", rows)
    mixed = written(tmp_path / "mixed.csv", "age,id,height,weight", rows[:, [2, 0, 0, 1]])
    for i, path in enumerate((same, mixed)):
        evaluated(run, run_dir, f"data.path={path}", f"scores=s{i}.npy")
    np.testing.assert_allclose(np.load(tmp_path / "s0.npy"), np.load(tmp_path / "s1.npy"), rtol=1e-6)
    other = written(tmp_path / "other.csv", "height,weight,wealth", rows)
    code, out, err = run("floweval", f"ckpt={run_dir}", f"data.path={other}")
    assert (code, out) == (2, "")
    assert "no column 'age'" in err


def test_a_flow_of_a_toy_scores_points_of_a_file(run: Run, tmp_path: Path) -> None:
    run_dir = trained(run, "data=moons", "data.n_test=60", "data.n_val=40")
    written(tmp_path / "points.csv", "x,y", np.zeros((1, 2)))
    found = evaluated(run, run_dir, "data.path=points.csv")
    assert (found["n"], found["kl"], found["nll_stderr"], found["budget"]["total"]) == (1, None, None, None)
    # its own test set has not become another
    assert evaluated(run, run_dir)["n"] == 60


def idx(path: Path, images: np.ndarray) -> Path:
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes()))
    return path


@pytest.mark.usefixtures("full_size")
def test_images_are_told_apart_from_arrays_idx_files_and_tables(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 8, (200, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "train.npy", images.reshape(200, 16))
    run_dir = trained(run, "data=array", "data.path=train.npy", "data.event_shape=[1,4,4]", "data.levels=8")
    dark = rng.integers(0, 3, (80, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "flat.npy", dark.reshape(80, 16))
    np.save(tmp_path / "square.npy", dark)
    np.save(tmp_path / "deep.npy", dark[:, None])
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", dark)
    found = [
        evaluated(run, run_dir, f"ood={name}")["ood"]
        for name in ("flat.npy", "square.npy", "deep.npy", "t10k-images-idx3-ubyte.gz")
    ]
    assert found[0]["name"] == "flat.npy"
    assert [{**each, "name": ""} for each in found] == [{**found[0], "name": ""}] * 4
    assert (Path(run_dir) / "plots/ood.png").stat().st_size > 10_000
    np.save(tmp_path / "wide.npy", rng.integers(0, 8, (5, 4, 5)))
    np.save(tmp_path / "bright.npy", dark.reshape(80, 16) + 6)
    for name, words in (
        ("wide.npy", r"shape \(5, 4, 5\).*or \(n, 1, 4, 4\)"),
        ("bright.npy", "outside 0 to 7"),
        ("nowhere.npy", "no file"),
        ("moons", r"\(1, 4, 4\).*\(2,\)"),
    ):
        code, out, err = run("floweval", f"ckpt={run_dir}", f"ood={name}")
        assert (code, out) == (2, ""), name
        # above it, what the training file held
        assert re.search(words, err.splitlines()[-1]), err
        assert "Traceback" not in err


def test_conditional_flows_tell_sets_apart_by_all_classes(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    rows = np.column_stack([rng.normal(4 * label, 1.0), rng.normal(0, 1, 300), label])
    written(tmp_path / "train.csv", "a,b,label", rows)
    run_dir = trained(
        run, "data=array", "data.path=train.csv", "data.label=label", "model=realnvp", "model.conditional=true"
    )
    written(tmp_path / "far.csv", "a,b", rng.normal(30, 1, (40, 2)))
    found = evaluated(run, run_dir, "ood=far.csv", "scores=s.npy")
    assert found["ood"]["auroc"] == 1.0
    far = torch.from_numpy(np.loadtxt(tmp_path / "far.csv", delimiter=",", skiprows=1)).float()
    flow = flowtrain.load(run_dir)
    both = torch.stack([flow.log_prob(far, y) for y in (0, 1)]).logsumexp(0).detach() - np.log(2)
    np.testing.assert_allclose(np.load(tmp_path / "s_ood.npy"), both.numpy(), rtol=1e-5)
    # with labels, new rows are scored as p(x | label)
    evaluated(run, run_dir, "data.path=train.csv", "scores=all.npy")
    x, y = torch.from_numpy(rows[:, :2]).float(), torch.from_numpy(label)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), flow.log_prob(x, y).detach().numpy(), rtol=1e-4)
    assert "mass" in found["checks"]


def test_auroc_of_optdigits_against_noise_is_scikit_learns(run: Run, tmp_path: Path) -> None:
    train, test = real("optdigits/optdigits.tra", "optdigits/optdigits.tes")
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 17, (1000, 64)))
    run_dir = trained(
        run, "data=array", f"data.path={train}", f"data.test_path={test}", "data.label=64", "data.levels=17",
        "trainer.steps=50",
    )  # fmt: skip
    found = evaluated(run, run_dir, "ood=noise.npy", "scores=s.npy")["ood"]
    inside, outside = np.load(tmp_path / "s.npy"), np.load(tmp_path / "s_ood.npy")
    assert (len(inside), len(outside)) == (1797, 1000)
    novel = np.repeat([0, 1], [len(inside), len(outside)])
    scores = np.concatenate([inside, outside])
    assert found["auroc"] == pytest.approx(roc_auc_score(novel, -scores), abs=1e-12)
    assert found["typicality_auroc"] == pytest.approx(roc_auc_score(novel, abs(scores - inside.mean())), abs=1e-12)
    assert found["auroc"] > 0.99


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_has_the_numbers_of_the_json_and_its_figures_inside(run: Run, tmp_path: Path) -> None:
    run_dir = trained(run, "data=circles", "data.n_test=80", "data.n_val=40")
    found = evaluated(run, run_dir, "report=true", "ood=moons")
    page, text = (Path(run_dir, name).read_text() for name in ("report.html", "report.md"))
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert len(parsed.images) == 4
    assert all(src.startswith("data:image/png;base64,") for src in parsed.images)
    for words in (found["headline"], *found["checks"]):
        assert words in text
        assert words in page
    links = re.findall(r"!\[\w+\]\(<(.*?)>\)", text)
    assert links == ["plots/calibration.png", "plots/ood.png", "plots/samples.png", "plots/curves.png"]
    assert all(Path(run_dir, link).is_file() for link in links)
    # with a name of its own, everything has it
    evaluated(run, run_dir, f"out={tmp_path}/r/a.json", "report=true")
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"a.json", "a_calibration.png", "a.md", "a.html"}


def test_headline_is_rounded_to_its_error(run: Run) -> None:
    run_dir = trained(run, "data=circles", "data.n_test=400", "data.n_val=40")
    code, out, _ = run("floweval", f"ckpt={run_dir}")
    assert code == 0
    found = json.loads(Path(run_dir, "eval.json").read_text())
    shown = re.match(r"NLL (\d\.\d+) \+- (0\.\d+) nats \(log-det exact\)$", found["headline"])
    assert shown is not None
    assert float(shown[2]) == pytest.approx(found["budget"]["total"], rel=0.3)
    assert len(shown[1]) == len(shown[2])
    assert found["headline"].removeprefix("NLL ") in out
    assert found["budget"]["interval"][0] < found["nll"] < found["budget"]["interval"][1]


def test_nothing_that_is_read_or_written_is_written_over(run: Run, tmp_path: Path) -> None:
    run_dir = trained(run, "data=circles", "data.n_test=50", "data.n_val=40")
    for name in ("v.npy", "v_ood.npy", "s_ood.npy"):
        np.save(tmp_path / name, np.zeros((5, 2)))
    (tmp_path / "link.npy").symlink_to(tmp_path / "v.npy")
    (tmp_path / "folder").mkdir()
    ckpt = f"{run_dir}/checkpoints/best.pt"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments in (
        ["data.path=v.npy", "scores=v.npy"],
        ["data.path=v.npy", "scores=link.npy"],
        ["data.path=v.npy", "out=v.npy"],
        ["ood=s_ood.npy", "scores=s.npy"],
        [f"out={ckpt}"],
        ["out=z.html", "report=true"],
        ["out=z.npy", "scores=z.npy"],
        ["out=folder"],
        ["out=folder", "scores=s.npy"],
    ):
        code, out, err = run("floweval", f"ckpt={ckpt}", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert len(err.strip().splitlines()) == 1, err
    np.save(tmp_path / "train.npy", np.random.default_rng(0).normal(size=(100, 2)))
    other = trained(run, "data=array", "data.path=train.npy")
    code, _, err = run("flowsample", f"ckpt={other}", "n=5", "out=train.npy")
    assert (code, np.load(tmp_path / "train.npy").shape) == (2, (100, 2)), err
    assert before.items() <= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()
    # a device is written to, and a link leads to its file
    assert run("floweval", f"ckpt={ckpt}", "out=/dev/null", "scores=/dev/null/x.npy")[0] != 0
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert run("floweval", f"ckpt={ckpt}", "out=link.json")[0] == 0
    assert json.loads((tmp_path / "real.json").read_text())["n"] == 50
    assert (tmp_path / "link.json").is_symlink()


def test_the_columns_that_are_asked_for_are_taken_or_refused(run: Run, tmp_path: Path, table: Path) -> None:
    run_dir = trained(run, "data=array", f"data.path={table}")
    rows = np.random.default_rng(1).normal([3.0, -1.0, 8.0], 1.0, (50, 3))
    mixed = written(tmp_path / "mixed.csv", "age,height,weight", rows[:, [2, 0, 1]])
    evaluated(run, run_dir, f"data.path={mixed}", "scores=a.npy")
    evaluated(run, run_dir, f"data.path={mixed}", "data.columns=[1,2,0]", "scores=b.npy")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    for arguments, words in (
        ([f"data.path={mixed}", "split=test"], "the flow was trained on height, weight, age"),
        ([f"data.path={mixed}", "data.columns=[nonsense]"], "no column 'nonsense'"),
        ([f"data.test_path={mixed}", "split=all"], "leave data.val_path and data.test_path out"),
        ([f"data.test_path={mixed}"], "columns in another order"),
    ):
        code, out, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert words in err
    same = written(tmp_path / "same.csv", "height,weight,age", rows)
    assert evaluated(run, run_dir, f"data.path={same}", f"data.test_path={same}")["n"] == 50


MISTAKES = [
    (["split=all"], "no file of rows"),
    (["scores=s.csv"], "scores=s.csv: this is written as .npy"),
    (["dtype=float16"], "choose one of float32, float64"),
    (["report=maybe"], "report=maybe: give true or false"),
    (["seed=-1"], "seed=-1"),
    (["data.path=5"], "data.path=5: give the path"),
    (["data.path=[a,b]"], "give the path"),
    (["ood=circles,moons"], "only flowtrain -m"),
    (["ood=../model/ffjord"], "ending"),
    (["ood=nowhere.npy"], "there is no file"),
    (["ood=three.npy"], "three.npy has 3 columns, and the flow was trained on samples of 2"),
    (["data.path=three.npy"], "three.npy has 3 columns"),
    (["data.path=nan.npy"], "nan"),
    (["data.path=empty.csv"], "empty"),
    (["ood=moons.txt"], "there is no file"),
]


def test_mistakes_get_one_message_and_leave_the_files(run: Run, tmp_path: Path) -> None:
    run_dir = trained(run, "data=circles", "data.n_test=50", "data.n_val=40")
    evaluated(run, run_dir)
    before = Path(run_dir, "eval.json").read_text()
    np.save(tmp_path / "three.npy", np.zeros((5, 3)))
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    (tmp_path / "empty.csv").touch()
    for arguments, words in MISTAKES:
        code, out, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert re.search(words, err), err
        assert len(err.strip().splitlines()) == 1, err
    assert Path(run_dir, "eval.json").read_text() == before
