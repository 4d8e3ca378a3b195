"""Training on images: bitwise resume, accumulated gradients, averaged weights and precision."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Compose, MakeTrainer
from helpers.files import write_set
from helpers.flows import IMAGE_MODELS, perturbed

from flowtrain.evaluation.log_likelihood import log_probs
from flowtrain.ode import SolveOptions
from flowtrain.runs.build import build_data, build_flow, build_objective, build_settings
from flowtrain.runs.load import load
from flowtrain.training import checkpoint
from flowtrain.training.batches import Batch
from flowtrain.training.trainer import Trainer
from flowtrain.utils.errors import ConfigError


@pytest.fixture(scope="session")
def fitted(stop_at: Callable[[Trainer, int], None]) -> Callable[..., Trainer]:
    """Returns a function that trains a config, up to step `stop` if given."""

    def fit(config: dict[str, Any], run_dir: Path, stop: int | None = None, **saved: Any) -> Trainer:
        data = build_data(config)
        torch.manual_seed(config["seed"])
        flow = build_flow(config, data.samples)
        run = Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, **saved)
        if stop is not None:
            stop_at(run, stop)
        run.fit()
        return run

    return fit


@pytest.mark.parametrize("name", ["realnvp", "glow", "ffjord"])
def test_bfloat16_gradient_is_close_to_float32(
    name: str, tmp_path: Path, image_config: Compose, fitted: MakeTrainer
) -> None:
    torch.set_default_dtype(torch.float32)
    root, gradients = write_set(tmp_path / "data"), {}
    for chosen in ("float32", "bfloat16"):
        config = image_config(
            root, *IMAGE_MODELS[name], f"trainer.precision={chosen}", "trainer.steps=1", "trainer.batch_size=32"
        )
        if name == "ffjord" and chosen != "float32":
            with pytest.raises(ConfigError, match="ODEs are solved in float32"):
                fitted(config, tmp_path / chosen)
            return
        run = fitted(config, tmp_path / chosen)
        gradients[chosen] = torch.cat([p.grad.flatten() for p in run.flow.parameters() if p.grad is not None])
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in run.flow.parameters())
    cosine = torch.cosine_similarity(gradients["float32"], gradients["bfloat16"], 0)
    assert cosine > 0.999
    assert not torch.equal(gradients["float32"], gradients["bfloat16"])


@pytest.mark.parametrize("name", list(IMAGE_MODELS))
@pytest.mark.parametrize("conditional", [False, True])
def test_resume_is_bitwise_exact(
    name: str, conditional: bool, tmp_path: Path, image_config: Compose, fitted: MakeTrainer
) -> None:
    if conditional and name == "affine":
        pytest.skip("an affine flow has no network that could use a label")
    torch.set_default_dtype(torch.float32)
    labels = ["model.conditional=true"] if conditional else []
    config = image_config(write_set(tmp_path / "data"), *IMAGE_MODELS[name], *labels, "data.crop=1")
    whole = fitted(config, tmp_path / "whole")
    fitted(config, tmp_path / "parts", stop=2)
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    second = fitted(config, tmp_path / "parts", saved=saved)
    for key, value in whole.flow.state_dict().items():
        assert torch.equal(value, second.flow.state_dict()[key]), key
    loaded = load(tmp_path / "parts")
    assert loaded.classes == (10 if conditional else None)
    assert (loaded.integer_valued, loaded.levels) == (True, 256)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (24 * math.log(2)))
    assert all(row["step_seconds"] > 0 for row in rows if row["split"] == "train")
    if name == "ffjord":
        assert all(row["nfe_forward"] > 0 and row["rtol"] > 0 for row in rows if row["split"] == "train")


def test_accumulated_gradients_equal_whole_batch_gradients(tmp_path: Path, image_config: Compose) -> None:
    """In float64 with fixed noise, only rounding differs."""
    root = write_set(tmp_path / "data")
    config = image_config(root, *IMAGE_MODELS["realnvp"], "trainer.batch_size=7")
    data = build_data(config)
    flow = build_flow(config, data.samples).double()
    x = flow.dequantized(data.train_batch(0, 7, 0))
    found = []
    for parts in (1, 3, 7):
        settings = build_settings({**config, "trainer": {**config["trainer"], "accumulate": parts}})
        run = Trainer(
            build_objective(config, flow), flow, data, settings, tmp_path / str(parts), config,
            saved={"weights": flow.state_dict(), "optimizer": torch.optim.Adam(flow.parameters()).state_dict(),
                   "lr": {"scale": 1.0, "stale": 0}, "ema": None, "step": 0, "seconds": 0.0, "stale": 0,
                   "best": None, "val_nll": 0.0, "config": config},
        )  # fmt: skip
        flow.zero_grad()
        loss = run.update.backward(Batch(x, None, None, 0), SolveOptions())
        found.append([loss, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_accumulation_does_not_sum_the_nfe_of_its_parts(
    tmp_path: Path, image_config: Compose, fitted: MakeTrainer
) -> None:
    root, seen = write_set(tmp_path / "data"), []
    for parts in (1, 4):
        keys = [*IMAGE_MODELS["ffjord"], "trainer.steps=2", "trainer.guard_every=1", f"trainer.accumulate={parts}"]
        run = fitted(image_config(root, *keys), tmp_path / str(parts))
        seen.append([row["nfe_forward"] for row in run.metrics.rows if row["split"] == "train"])
    assert all(b < 2 * a for a, b in zip(*seen, strict=True))


def test_ema_averages_running_statistics(tmp_path: Path, image_config: Compose, fitted: MakeTrainer) -> None:
    """Detects batch norms that validate averaged weights with the statistics of the last weights."""
    config = image_config(write_set(tmp_path / "data"), *IMAGE_MODELS["realnvp batchnorm"], "trainer.ema=0.9")
    run = fitted(config, tmp_path / "run")
    assert run.train_state.ema is not None
    for name, value in run.flow.named_buffers():
        if name.endswith(("running_mean", "variance")):
            assert not torch.equal(run.train_state.ema.shadow[name], value), name
    saved = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    loaded = load(tmp_path / "run").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in saved["ema"].items() if k != "updates")


def test_conditional_fields_are_not_compiled(tmp_path: Path, image_config: Compose, fitted: MakeTrainer) -> None:
    keys = [*IMAGE_MODELS["ffjord"], "model.conditional=true", "trainer.compile=true"]
    with pytest.raises(ConfigError, match="conditional flow are not compiled"):
        fitted(image_config(write_set(tmp_path / "data"), *keys), tmp_path / "run")


def test_val_size_limits_the_validation_rows(tmp_path: Path, image_config: Compose, fitted: MakeTrainer) -> None:
    config = image_config(
        write_set(tmp_path / "data"), *IMAGE_MODELS["affine"], "trainer.val_size=3", "trainer.steps=2"
    )
    run = fitted(config, tmp_path / "run")
    with run.train_state.ema.applied() if run.train_state.ema is not None else nullcontext():
        expected = -log_probs(run.flow, run.data.val[:3]).mean().item()
    assert run.progress.val_nll == pytest.approx(expected)


@pytest.mark.parametrize("model", ["affine", "ffjord"])
def test_validation_noise_does_not_depend_on_the_number_of_ranks(
    model: str, tmp_path: Path, image_config: Compose, fitted: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels have noise, and the trace of ffjord is estimated."""
    keys = [*IMAGE_MODELS[model], "trainer.steps=2"]
    keys += ["model.eval_trace=hutchinson"] if model == "ffjord" else []
    run = fitted(image_config(write_set(tmp_path / "data"), *keys), tmp_path / "run")
    run.train_state.ema = None
    perturbed(run.flow.eval().bijection, 0.1)
    run.validation.nll()
    every = run.validation.scored
    monkeypatch.setattr("flowtrain.training.validation.ranks.share", lambda n: slice(n // 2, n))
    run.validation.nll()
    torch.testing.assert_close(run.validation.scored, every[len(every) // 2 :])
