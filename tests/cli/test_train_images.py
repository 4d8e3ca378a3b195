"""The commands on images: training, evaluation, samples, and settings that a checkpoint keeps."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Run
from helpers.files import write_set
from helpers.flows import IMAGE_MODELS

import flowtrain
from flowtrain.runs.load import load
from flowtrain.training import checkpoint


@pytest.mark.parametrize("name", ["realnvp", "glow", "ffjord"])
@pytest.mark.parametrize("conditional", [False, True])
def test_train_evaluate_and_sample_by_the_commands(run: Run, tmp_path: Path, name: str, conditional: bool) -> None:
    root = write_set(tmp_path / "data" / "mnist").parent
    labels = ["model.conditional=true"] if conditional else []
    keys = ["data=mnist", "data.root=data", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=2"]
    code, out, err = run("flowtrain", *keys, "recipe=none", *IMAGE_MODELS[name], *labels)
    assert code == 0, err
    run_dir = tmp_path / out.splitlines()[-1]
    pictures = {"samples", "curves", "calibration", "reconstructions", "interpolation", "temperature"}
    pictures |= {"classes"} if conditional else set()
    assert {p.stem for p in (run_dir / "plots").glob("*.png")} == pictures
    result = json.loads((run_dir / "result.json").read_text())
    assert result["bits_per_dim"] == pytest.approx(result["nll"] / (24 * math.log(2)))
    assert (result["n"], result["dequantization_samples"], result["entropy"]) == (20, 1, None)

    # from another working directory, the data are found by their absolute path
    os.chdir("/")
    ckpt = f"ckpt={run_dir}"
    code, out, err = run("floweval", ckpt, "dequantization_samples=3")
    assert code == 0, err
    assert "bits/dim" in out
    evaluated = json.loads((run_dir / "eval.json").read_text())
    assert evaluated["dequantization_samples"] == 3
    assert evaluated["nll"] < result["nll"]

    os.chdir(tmp_path)
    label = ["label=7"] if conditional else []
    code, out, err = run("flowsample", ckpt, "n=12", "out=s.npy", *label)
    assert code == 0, err
    samples = np.load(tmp_path / "s.npy")
    assert (samples.shape, samples.dtype) == ((12, 1, 4, 6), np.uint8)
    assert (tmp_path / "s.png").exists()
    code, _, err = run("flowsample", ckpt, "n=2", "label=10" if conditional else "label=1")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert ("0 to 9" if conditional else "not conditional") in err
    flow = flowtrain.load(run_dir)
    x = flow.sample(6)
    given = (flow.cycled_labels(6),) if conditional else ()
    torch.testing.assert_close(flow(flow.inverse(x, *given), *given), x, atol=0.05, rtol=1e-3)
    assert root.exists()


@pytest.mark.usefixtures("without_figures")
def test_images_of_a_table_train_as_images(run: Run, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 17, (60, 25))
    values[:, 24] = np.arange(60) % 4
    np.savetxt(tmp_path / "t.tra", values, "%d", ",")
    keys = ["data=array", "data.path=t.tra", "data.label=24", "data.event_shape=[1,4,6]", "data.levels=17"]
    small = ["trainer.batch_size=8", "trainer.steps=2"]
    for model in ("realnvp", "glow", "ffjord"):
        code, out, err = run("flowtrain", *keys, *small, *IMAGE_MODELS[model], "model.conditional=true")
        assert code == 0, err
        result = json.loads((Path(out.splitlines()[-1]) / "result.json").read_text())
        assert result["bits_per_dim"] == pytest.approx(result["nll"] / (24 * math.log(2)))
    code, _, err = run("flowtrain", *keys[:2], "model=realnvp", "model.conditional=true", "data.dequantize=true")
    assert code == 2
    assert "conditional" in err


@pytest.mark.usefixtures("without_figures")
def test_an_old_checkpoint_of_dequantized_counts_still_loads(run: Run, tmp_path: Path) -> None:
    """The checkpoint has no description of its samples, as in early versions."""
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 9, (60, 3)))
    keys = [
        "data=array",
        "data.path=t.npy",
        "data.dequantize=true",
        "data.gaussian_start=false",
        "trainer.steps=2",
        "model=realnvp",
    ]
    _, out, _ = run("flowtrain", *keys)
    path = tmp_path / out.splitlines()[-1] / "checkpoints/best.pt"
    saved = checkpoint.load(path)
    expected = load(path)
    del saved["samples"]
    saved["config"]["data"]["standardize"] = True
    checkpoint.save(tmp_path / "old.pt", saved)
    flow = load(tmp_path / "old.pt")
    assert flow.integer_valued
    x = torch.randn(5, 3)
    assert torch.equal(flow.log_prob(x), expected.log_prob(x))


@pytest.mark.usefixtures("without_figures")
def test_checkpoint_keeps_the_data_settings_of_its_weights(run: Run, tmp_path: Path) -> None:
    """With other settings, the score would belong to a density that was not trained."""
    write_set(tmp_path / "data" / "mnist")
    keys = ["data=mnist", "data.root=data", "data.n_val=10", "trainer.steps=1", "trainer.batch_size=4", "recipe=none"]
    code, out, err = run("flowtrain", *keys, *IMAGE_MODELS["realnvp"])
    assert code == 0, err
    ckpt = f"ckpt={out.splitlines()[-1]}"
    for override in ("model.cap=7", "model.activation=tanh", "data.alpha=0.1"):
        code, _, err = run("floweval", ckpt, override)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert override.split("=")[0] in err
    (tmp_path / "kept.npy").write_bytes(b"kept")
    code, _, err = run("flowsample", ckpt, "n=2", "data=moons", "out=kept.npy")
    assert code == 2
    assert "(1, 4, 6)" in err
    assert (tmp_path / "kept.npy").read_bytes() == b"kept"
    larger = {f"{kind}_images": np.zeros((n, 6, 6), np.uint8) for kind, n in (("train", 50), ("t10k", 20))}
    write_set(tmp_path / "other" / "mnist", **larger)
    code, _, err = run("flowtrain", ckpt.replace("ckpt", "resume"), "data.root=other", "trainer.steps=2")
    assert code == 2
    assert re.search(r"1, 4, 6.*1, 6, 6", err)


def test_one_test_image_is_enough_to_finish(run: Run, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "mnist")
    keys = ["data=mnist", "data.root=data", "data.n_val=10", "data.n_test=1", "trainer.steps=1", "recipe=none"]
    code, out, err = run("flowtrain", *keys, *IMAGE_MODELS["realnvp"])
    assert code == 0, err
    plots = Path(out.splitlines()[-1]) / "plots"
    assert {p.stem for p in plots.glob("*.png")} == {
        "samples",
        "curves",
        "calibration",
        "reconstructions",
        "temperature",
    }
