"""`floweval`: out-of-distribution detection and reports."""

import gzip
import html.parser
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evaluate, Run, Train
from helpers.files import written
from sklearn.metrics import roc_auc_score

import flowtrain


def idx(path: Path, images: np.ndarray) -> Path:
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes()))
    return path


@pytest.mark.usefixtures("full_size")
@pytest.mark.slow
def test_images_are_told_apart_from_arrays_idx_files_and_tables(
    run: Run, tmp_path: Path, trained: Train, evaluated: Evaluate
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 8, (200, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "train.npy", images.reshape(200, 16))
    run_dir = trained("data=array", "data.path=train.npy", "data.event_shape=[1,4,4]", "data.levels=8")
    dark = rng.integers(0, 3, (80, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "flat.npy", dark.reshape(80, 16))
    np.save(tmp_path / "square.npy", dark)
    np.save(tmp_path / "deep.npy", dark[:, None])
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", dark)
    found = [
        evaluated(run_dir, f"ood={name}")["ood"]
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
        # the earlier lines warn about the training file
        assert re.search(words, err.splitlines()[-1]), err
        assert "Traceback" not in err


def test_conditional_flows_tell_sets_apart_by_all_classes(trained: Train, evaluated: Evaluate, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    rows = np.column_stack([rng.normal(4 * label, 1.0), rng.normal(0, 1, 300), label])
    written(tmp_path / "train.csv", "a,b,label", rows)
    run_dir = trained(
        "data=array", "data.path=train.csv", "data.label=label", "model=realnvp", "model.conditional=true"
    )
    written(tmp_path / "far.csv", "a,b", rng.normal(30, 1, (40, 2)))
    found = evaluated(run_dir, "ood=far.csv", "scores=s.npy")
    assert found["ood"]["auroc"] == 1.0
    far = torch.from_numpy(np.loadtxt(tmp_path / "far.csv", delimiter=",", skiprows=1)).float()
    flow = flowtrain.load(run_dir)
    # classes are weighted by their frequencies in training
    weights = torch.tensor(flow.class_counts) / sum(flow.class_counts)
    both = torch.stack([flow.log_prob(far, y) + weights[y].log() for y in (0, 1)]).logsumexp(0).detach()
    np.testing.assert_allclose(np.load(tmp_path / "s_ood.npy"), both.numpy(), rtol=1e-5)
    # with labels, new rows are scored as p(x | label)
    evaluated(run_dir, "data.path=train.csv", "scores=all.npy", name="eval-train.json")
    x, y = torch.from_numpy(rows[:, :2]).float(), torch.from_numpy(label)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), flow.log_prob(x, y).detach().numpy(), rtol=1e-4)
    assert "mass" in found["checks"]


def test_auroc_of_optdigits_against_noise_matches_scikit_learn(
    real: Callable[..., list[str]], trained: Train, evaluated: Evaluate, tmp_path: Path
) -> None:
    train, test = real("optdigits/optdigits.tra", "optdigits/optdigits.tes")
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 17, (1000, 64)))
    run_dir = trained(
        "data=array", f"data.path={train}", f"data.test_path={test}", "data.label=64", "data.levels=17",
        "trainer.steps=50",
    )  # fmt: skip
    found = evaluated(run_dir, "ood=noise.npy", "scores=s.npy")["ood"]
    evaluated(run_dir, "split=val", "scores=val.npy", name="eval-val.json")
    inside, outside, val = (np.load(tmp_path / f"{name}.npy") for name in ("s", "s_ood", "val"))
    assert (len(inside), len(outside)) == (1797, 1000)
    novel = np.repeat([0, 1], [len(inside), len(outside)])
    scores = np.concatenate([inside, outside])
    assert found["auroc"] == pytest.approx(roc_auc_score(novel, -scores), abs=1e-12)
    assert found["typicality_auroc"] == pytest.approx(roc_auc_score(novel, abs(scores - val.mean())), abs=1e-12)
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


def test_report_has_the_numbers_of_the_json_and_its_figures_inside(
    trained: Train, evaluated: Evaluate, tmp_path: Path
) -> None:
    run_dir = trained("data=circles", "data.n_test=80", "data.n_val=40")
    found = evaluated(run_dir, "report=true", "ood=moons")
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
    # with out=, all files have the name that out= gives
    evaluated(run_dir, f"out={tmp_path}/r/a.json", "report=true")
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"a.json", "a_calibration.png", "a.md", "a.html"}


def test_headline_is_rounded_to_its_error(run: Run, trained: Train) -> None:
    run_dir = trained("data=circles", "data.n_test=400", "data.n_val=40")
    code, out, _ = run("floweval", f"ckpt={run_dir}")
    assert code == 0
    found = json.loads(Path(run_dir, "eval.json").read_text())
    shown = re.match(r"NLL (\d\.\d+) \+- (0\.\d+) nats \(log-det exact\)$", found["headline"])
    assert shown is not None
    assert float(shown[2]) == pytest.approx(found["budget"]["total"], rel=0.3)
    assert len(shown[1]) == len(shown[2])
    assert found["headline"].removeprefix("NLL ") in out
    assert found["budget"]["interval"][0] < found["nll"] < found["budget"]["interval"][1]
