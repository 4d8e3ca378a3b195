"""Flows over images of whole numbers: bits per dimension by hand, dequantization, labels, training, the commands."""

import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Run, stop_at
from test_images import write_set
from torch import Tensor, nn

import flowtrain
from flowtrain.bijections.affine import Affine
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.coupling import AffineCoupling
from flowtrain.bijections.logit import Logit, dequantize
from flowtrain.bijections.scale import ActNorm, BatchNorm
from flowtrain.bijections.squeeze import squeeze, unsqueeze
from flowtrain.build import build_data, build_flow, build_objective, build_settings, load
from flowtrain.cli.messages import compose_defaults
from flowtrain.data.base import Dataset
from flowtrain.errors import ConfigError, DataError, FlowtrainError
from flowtrain.evaluation import evaluate
from flowtrain.flow import Flow
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.paths import config_dir
from flowtrain.precision import narrowed
from flowtrain.scores import log_probs
from flowtrain.training import checkpoint
from flowtrain.training.loop import Trainer

SHAPE = (1, 4, 4)


class Bytes(Dataset):
    """Images whose pixels are 0 half of the time, labelled by their first pixel."""

    discrete, levels, classes = True, 256, 2

    def __init__(self, shape: tuple[int, ...] = SHAPE, n: int = 40) -> None:
        self.event_shape = shape
        self.val, self.test = self.train_batch(0, n, 1), self.train_batch(0, n, 2)
        self.val_labels, self.test_labels = ((x.flatten(1)[:, 0] > 0).long() for x in (self.val, self.test))

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randint(0, 512, (batch_size, *self.event_shape), generator=generator)
        return torch.where(x < 256, x, 0).to(torch.uint8)


def discrete(bijection: Bijection, shape: tuple[int, ...] = SHAPE, **rest: Any) -> Flow:
    return Flow(shape, bijection, discrete=True, levels=256, **rest).eval()


# Bits per dimension


def test_bits_per_dim_of_a_case_computed_by_hand() -> None:
    """One pixel of 0 dequantized to 0.5, logit with alpha = 0.05, standard normal: every step in plain arithmetic."""
    flow = discrete(Logit(256, 0.05), (1, 1, 1))
    p = 0.05 + 0.9 * 0.5 / 256
    z = math.log(p / (1 - p))
    log_p = -0.5 * z * z - 0.5 * math.log(2 * math.pi) + math.log(0.9 / 256) - math.log(p) - math.log(1 - p)
    found = flow.log_prob(torch.full((1, 1, 1, 1), 0.5))
    assert found.item() == pytest.approx(log_p, abs=1e-12)
    assert flow.bits_per_nat == pytest.approx(1 / math.log(2))
    assert -flow.bits_per_nat * found.item() == pytest.approx(11.229193, abs=1e-6)


def test_a_uniform_image_costs_the_bits_of_its_levels() -> None:
    """x + u uniform on [0, 256): its density is 1/256 and so 8 bits a pixel; here through the logistic base."""

    class ToLogistic(Bijection):
        """From a standard normal to a standard logistic, by their distribution functions."""

        def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            raise NotImplementedError

        def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z = math.sqrt(2) * torch.erfinv(2 * torch.sigmoid(x) - 1)
            logistic = -x - 2 * nn.functional.softplus(-x)
            return z, (logistic + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    flow = discrete(Chain([ToLogistic(), Affine(16), Logit(256, 1e-9)]))
    x = torch.randint(20, 235, (50, *SHAPE))
    bits = -flow.bits_per_nat * flow.log_prob(x)  # type: ignore[operator]
    torch.testing.assert_close(bits, torch.full((50,), 8.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", ["realnvp", "glow", "ffjord"])
def test_untrained_bits_per_dim_match_an_independent_calculation(model: str) -> None:
    """Untrained flows without data-dependent scales carry the logit of the data to a standard normal base."""
    data = Bytes()
    own = {"realnvp": ["model.actnorm=false"], "glow": ["model.scales=1"], "ffjord": []}
    keys = [f"model={model}", "model.hidden=[4]", *own[model]]
    flow = build_flow(compose_defaults(keys), data.samples).double().eval()
    result = evaluate(flow, data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = (data.test.double() + torch.rand(data.test.shape)).numpy()
    p = data.alpha + (1 - 2 * data.alpha) * noisy / 256
    z, slope = np.log(p) - np.log1p(-p), (1 - 2 * data.alpha) / 256 / (p * (1 - p))
    log_p = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) + np.log(slope)
    # a rotation of the channels, which Glow begins with, leaves a standard normal as it is
    assert result.bits_per_dim == pytest.approx(-log_p.mean() / np.log(2), rel=1e-6)
    assert result.nll == pytest.approx(-log_p.sum((1, 2, 3)).mean(), rel=1e-6)


def test_bits_per_dim_of_an_affine_flow_match_the_gaussian_of_the_logits() -> None:
    data = Bytes()
    flow = discrete(Chain([Affine(16), Logit(256, 1e-3)]))
    flow.bijection.initialize(dequantize(data.train_batch(0, 2000, 3), torch.zeros(())))
    x = dequantize(data.test, torch.zeros(()))
    p = 1e-3 + (1 - 2e-3) * x.flatten(1) / 256
    affine = flow.bijection.bijections[0]  # type: ignore[index]
    gaussian = torch.distributions.MultivariateNormal(affine.mean, scale_tril=affine.factor())
    slope = (1 - 2e-3) / 256 / (p * (1 - p))
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(torch.logit(p)) + slope.log().sum(1))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.05, 0.4])
def test_the_logit_keeps_its_digits_in_float32(alpha: float) -> None:
    x = torch.cat([torch.linspace(0, 256, 400), torch.tensor([1e-6, 1e-3, 255.999])]).float().double().view(-1, 1, 1, 1)
    wide, narrow = Logit(256, alpha).inverse(x), Logit(256, alpha).inverse(x.float())
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    back, log_det = Logit(256, alpha).forward(wide[0].float())
    torch.testing.assert_close(back.double(), x, rtol=3e-6, atol=1e-4)
    torch.testing.assert_close(log_det.double(), -wide[1], rtol=3e-6, atol=3e-6)


# Whole numbers


@pytest.mark.parametrize("alpha", [1e-6, 1e-2])
def test_the_edge_of_the_tails_is_still_inside(alpha: float) -> None:
    """Rounded to float32, a far latent is the edge itself, and nothing beyond it may be made of that."""
    torch.set_default_dtype(torch.float32)
    logit = Logit(256, alpha).eval()
    far = torch.tensor([[-200.0, -60.0, -30.0, 30.0, 60.0, 200.0]])
    z, log_det = logit.inverse(logit.forward(far)[0])
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    assert (z.sign() == far.sign()).all()


def test_integers_are_dequantized_anew_and_real_numbers_taken_as_they_are() -> None:
    flow = discrete(Logit(256, 0.05))
    x = Bytes().test
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))
    noisy = flow.dequantized(x)
    assert torch.equal(flow.dequantized(noisy), noisy)
    assert torch.equal(noisy.floor(), x.double())
    assert torch.equal(flow.quantized(noisy), x)
    u = noisy - x
    assert abs(u.mean() - 0.5) < 5 * (12 * u.numel()) ** -0.5
    # integers that no flow was told of are numbers like any other
    plain = Flow((2,), Affine(2))
    whole = torch.tensor([[1, 2]])
    assert torch.equal(plain.log_prob(whole), plain.log_prob(whole.double()))


def test_noise_never_reaches_the_next_number(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, largest))
    x = torch.tensor([-300, -1, 0, 1, 16, 255, 60_000])
    assert torch.equal(dequantize(x, torch.zeros((), dtype=torch.float32)).floor().long(), x)


def test_samples_are_quantized_into_their_range() -> None:
    flow = discrete(Logit(256, 0.05))
    x = torch.tensor([-3.0, -0.1, 0.0, 0.99, 255.5, 256.0, 300.0]).view(-1, 1, 1, 1)
    assert flow.quantized(x).flatten().tolist() == [0, 0, 0, 0, 255, 255, 255]
    assert flow.quantized(x).dtype == torch.uint8
    counts = Flow((1,), Affine(1), discrete=True)
    assert counts.quantized(torch.tensor([-1.5, 300.2])).tolist() == [-2, 300]


def test_more_dequantization_samples_tighten_the_bound() -> None:
    """log 1/K sum p(x + u_k) against its definition, and its mean rising towards log P(x)."""
    data = Bytes((1, 1, 1), n=400)
    flow = discrete(Logit(256, 1e-4), (1, 1, 1))
    means = []
    for draws in (1, 4, 64):
        result = evaluate(flow, data, dequantization_samples=draws)
        assert result.dequantization_samples == draws
        means.append(result.nll)
    assert means[0] > means[1] > means[2]
    # P(x) is the integral of the density over the pixel's unit interval
    edges = 1e-4 + (1 - 2e-4) * torch.arange(257, dtype=torch.float64) / 256
    cdf = torch.special.ndtr(torch.logit(edges))
    exact = -(cdf[1:] - cdf[:-1])[data.test.long()].log().mean().item()
    assert exact < means[2] < exact + 0.1 * (means[0] - exact)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        each = torch.stack([flow.log_prob(data.test) for _ in range(4)])
    torch.testing.assert_close(log_probs(flow, data.test, draws=4), each.exp().mean(0).log())


def test_evaluation_refuses_data_of_another_kind() -> None:
    flow = Flow(SHAPE, Affine(16)).eval()
    with pytest.raises(DataError, match="trained on real numbers; this data has whole numbers from 0 to 255"):
        evaluate(flow, Bytes())
    data = Bytes()
    data.test = data.test.double()
    data.discrete, data.levels = False, None  # type: ignore[misc, assignment]
    with pytest.raises(ConfigError, match="dequantization_samples=2: this flow is over real numbers"):
        evaluate(flow, data, dequantization_samples=2)


# Shapes and scales


def test_squeeze_puts_the_colours_of_a_checkerboard_apart() -> None:
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    y = squeeze(x)
    assert y.shape == (1, 8, 2, 3)
    assert torch.equal(unsqueeze(y), x)
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    even = (row + column) % 2 == 0
    assert set(y[:, :4].flatten().tolist()) == set(x[:, :, even].flatten().tolist())
    # pixel (1, 0) of channel 1 is the lower left of its square
    assert y[0, 7, 0, 0] == x[0, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: realnvp((1, 28, 28), scales=3), r"model.scales=3: images of 28x28 can be halved 2 times"),
        (lambda: realnvp((1, 8, 8), hidden=[8, 4]), r"model.hidden=\[8, 4\]: the blocks"),
        (lambda: realnvp((1, 8, 8), conditional=True), "no labels to condition on"),
        (lambda: glow((1, 7, 7)), "these images of 7x7 have one"),
        (lambda: glow((1,)), "at least 2 columns"),
        (lambda: glow((1, 8, 8), hidden=[]), "model.hidden"),
        (lambda: glow((2,), steps=0), "model.steps=0"),
    ],
)
def test_models_refuse(make: Callable[[], Flow], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize("model", ["realnvp", "glow"])
def test_initialization_standardises_the_latents_of_the_data(model: str) -> None:
    """Every ActNorm on the way starts from what reaches it, through squeezes and at every scale."""
    flow = (realnvp if model == "realnvp" else glow)((1, 16, 16), hidden=[4])
    x = 5 + 3 * torch.randn(300, 1, 16, 16).cumsum(-1)
    z = flow.bijection.initialize(x)
    norms = [m for m in flow.modules() if isinstance(m, ActNorm)]
    assert len(norms) > 10
    assert all(norm.shift.any() or norm.log_scale.any() for norm in norms)
    torch.testing.assert_close(z, flow.bijection.map_inverse(x))
    assert z.mean().abs() < 1e-6
    # what Glow factors out was standardised and then rotated
    assert z.std() == pytest.approx(1, abs=1e-3 if model == "realnvp" else 0.1)


def test_batch_norm_takes_the_batch_in_training_and_its_running_mean_elsewhere() -> None:
    norm = BatchNorm(2, momentum=0.25)
    x = 3 + 2 * torch.randn(50, 2, 4, 4)
    z, log_det = norm.train().inverse(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-12, rtol=0)
    variance = x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(log_det, (-16 * (variance + norm.eps).log().sum() / 2).expand(50))
    torch.testing.assert_close(norm.mean, 0.25 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.variance, 0.75 + 0.25 * variance)
    before = norm.mean.clone()
    norm.eval().inverse(x)
    assert torch.equal(norm.mean, before)


# Labels


def test_labels_are_checked() -> None:
    flow = realnvp((1, 4, 4), layers=1, hidden=[4], conditional=True, classes=3).eval()
    x = torch.randn(5, 1, 4, 4)
    for label, words in (
        (None, "conditional: give a label for each sample, 0 to 2"),
        (3, "label=3: the labels of this flow are 0 to 2"),
        (torch.tensor([0, 1, 2, -1, 0]), "label=-1"),
        (torch.tensor([0, 1]), "one for each of the 5 samples"),
        (0.5, "one whole number"),
    ):
        with pytest.raises(FlowtrainError, match=words):
            flow.log_prob(x, label)  # type: ignore[arg-type]
    with pytest.raises(FlowtrainError, match="not conditional"):
        realnvp((1, 4, 4), hidden=[4]).log_prob(x, 1)
    assert torch.equal(flow.log_prob(x, 2), flow.log_prob(x, torch.full((5,), 2)))
    torch.manual_seed(0)
    in_turn = flow.sample(4)
    torch.manual_seed(0)
    torch.testing.assert_close(flow.sample(4, label=torch.tensor([0, 1, 2, 0])), in_turn)


def config_of(root: Path, *overrides: str) -> dict[str, Any]:
    small = ["data=mnist", f"data.root={root}", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=4"]
    small += ["trainer.val_every=2", "trainer.log_every=1", "trainer.plot_every=null", "recipe=none"]
    return compose_defaults([*small, *overrides])


TINY = {
    "realnvp": ["model=realnvp", "model.hidden=[4]", "model.layers=1"],
    "realnvp batchnorm": ["model=realnvp", "model.hidden=[4]", "model.layers=1", "model.batch_norm=true"],
    "glow": ["model=glow", "model.hidden=[4]", "model.steps=1", "model.scales=1"],
    "ffjord": ["model=ffjord", "model.hidden=[4]", "solver.rtol=1e-3"],
    "affine": ["model=affine"],
}


def trained(config: dict[str, Any], run_dir: Path, stop: int | None = None, **saved: Any) -> Trainer:
    data = build_data(config)
    torch.manual_seed(config["seed"])
    flow = build_flow(config, data.samples)
    run = Trainer(build_objective(config, flow), flow, data, build_settings(config), run_dir, config, **saved)
    if stop is not None:
        stop_at(run, stop)
    run.fit()
    return run


# Precision


def nets_seen(flow: Flow, x: Tensor, name: str) -> tuple[Tensor, set[torch.dtype]]:
    """log p(x) in training with that precision, and the dtypes that the couplings' networks answered in."""
    seen: set[torch.dtype] = set()
    nets = [m.conditioner for m in flow.modules() if isinstance(m, AffineCoupling)]
    hooks = [net.register_forward_hook(lambda m, args, y: seen.add(y.dtype)) for net in nets]
    flow.train()
    with narrowed(name, x.device):
        log_p = flow.log_prob(x)
    for hook in hooks:
        hook.remove()
    return log_p, seen


@pytest.mark.parametrize("model", ["realnvp", "glow"])
def test_bfloat16_networks_keep_the_likelihood(model: str) -> None:
    """Only networks are narrow, so that the log-determinant is still that of the map; evaluation is never narrow."""
    torch.set_default_dtype(torch.float32)
    flow = (realnvp if model == "realnvp" else glow)((1, 8, 8), hidden=[16, 16])
    x = torch.randn(64, 1, 8, 8)
    flow.bijection.initialize(x)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.03 * torch.randn_like(p))
    plain, seen = nets_seen(flow, x, "float32")
    narrow, narrow_seen = nets_seen(flow, x, "bfloat16")
    assert (seen, narrow_seen) == ({torch.float32}, {torch.bfloat16})
    assert narrow.dtype == torch.float32
    gap = (narrow - plain).abs().max() / (64 * math.log(2))
    assert 0 < gap < 0.02, "bits per dimension"
    # in training too the map is inverted to the digits of float32: the log-determinant belongs to the map there is
    with narrowed("bfloat16", x.device), torch.no_grad():
        z, log_det = flow.bijection.inverse(x)
        back, back_log_det = flow.bijection.forward(z)
    torch.testing.assert_close(log_det, -back_log_det, rtol=1e-2, atol=0.3)
    flow.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flow.log_prob(x), plain, rtol=1e-5, atol=1e-4)
    assert (back - x).abs().median() < 1e-2


@pytest.mark.parametrize("name", ["realnvp", "glow", "ffjord"])
def test_a_step_in_bfloat16_has_much_the_gradient_of_one_in_float32(name: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    root, gradients = write_set(tmp_path / "data"), {}
    for chosen in ("float32", "bfloat16"):
        config = config_of(root, *TINY[name], f"trainer.precision={chosen}", "trainer.steps=1", "trainer.batch_size=32")
        if name == "ffjord" and chosen != "float32":
            with pytest.raises(ConfigError, match="ODEs are solved in float32"):
                trained(config, tmp_path / chosen)
            return
        run = trained(config, tmp_path / chosen)
        gradients[chosen] = torch.cat([p.grad.flatten() for p in run.flow.parameters() if p.grad is not None])
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in run.flow.parameters())
    cosine = torch.cosine_similarity(gradients["float32"], gradients["bfloat16"], 0)
    assert cosine > 0.999
    assert not torch.equal(gradients["float32"], gradients["bfloat16"])


# Training and the commands


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("conditional", [False, True])
def test_resume_is_exact_to_the_bit(name: str, conditional: bool, tmp_path: Path) -> None:
    if conditional and name == "affine":
        pytest.skip("a Gaussian has no networks to tell of a label")
    torch.set_default_dtype(torch.float32)
    labels = ["model.conditional=true"] if conditional else []
    config = config_of(write_set(tmp_path / "data"), *TINY[name], *labels, "data.crop=1")
    whole = trained(config, tmp_path / "whole")
    trained(config, tmp_path / "parts", stop=2)
    saved = checkpoint.load(tmp_path / "parts/checkpoints/last.pt")
    second = trained(config, tmp_path / "parts", saved=saved)
    for key, value in whole.flow.state_dict().items():
        assert torch.equal(value, second.flow.state_dict()[key]), key
    loaded = load(tmp_path / "parts")
    assert loaded.classes == (10 if conditional else None)
    assert (loaded.discrete, loaded.levels) == (True, 256)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (24 * math.log(2)))
    assert all(row["step_seconds"] > 0 for row in rows if row["split"] == "train")
    if name == "ffjord":
        assert all(row["nfe_forward"] > 0 and row["rtol"] > 0 for row in rows if row["split"] == "train")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """In float64 with fixed noise: what is left of a difference is rounding."""
    root = write_set(tmp_path / "data")
    config = config_of(root, *TINY["realnvp"], "trainer.batch_size=7")
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
        loss = run.backward(x, None)
        found.append([loss, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_nfe_of_an_accumulated_batch_is_that_of_its_parts(tmp_path: Path) -> None:
    root, seen = write_set(tmp_path / "data"), []
    for parts in (1, 4):
        keys = [*TINY["ffjord"], "trainer.steps=2", "trainer.guard_every=1", f"trainer.accumulate={parts}"]
        run = trained(config_of(root, *keys), tmp_path / str(parts))
        seen.append([row["nfe_forward"] for row in run.metrics.rows if row["split"] == "train"])
    assert all(b < 2 * a for a, b in zip(*seen, strict=True))


def test_an_average_of_weights_has_an_average_of_running_statistics(tmp_path: Path) -> None:
    """Fails when batch norms validate averaged weights with the statistics of the last ones."""
    config = config_of(write_set(tmp_path / "data"), *TINY["realnvp batchnorm"], "trainer.ema=0.9")
    run = trained(config, tmp_path / "run")
    assert run.ema is not None
    for name, value in run.flow.named_buffers():
        if name.endswith(("running_mean", "variance")):
            assert not torch.equal(run.ema.shadow[name], value), name
    saved = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    loaded = load(tmp_path / "run").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in saved["ema"].items() if k != "updates")


def test_conditional_fields_are_not_compiled(tmp_path: Path) -> None:
    keys = [*TINY["ffjord"], "model.conditional=true", "trainer.compile=true"]
    with pytest.raises(ConfigError, match="conditional flow are not compiled"):
        trained(config_of(write_set(tmp_path / "data"), *keys), tmp_path / "run")


def test_validation_can_take_a_part_of_its_set(tmp_path: Path) -> None:
    config = config_of(write_set(tmp_path / "data"), *TINY["affine"], "trainer.val_size=3", "trainer.steps=2")
    run = trained(config, tmp_path / "run")
    with run.ema.applied() if run.ema is not None else nullcontext():
        expected = -log_probs(run.flow, run.data.val[:3]).mean().item()
    assert run.val_nll == pytest.approx(expected)


@pytest.mark.parametrize("name", ["realnvp", "glow", "ffjord"])
@pytest.mark.parametrize("conditional", [False, True])
def test_train_evaluate_and_sample_by_the_commands(run: Run, tmp_path: Path, name: str, conditional: bool) -> None:
    root = write_set(tmp_path / "data" / "mnist").parent
    labels = ["model.conditional=true"] if conditional else []
    keys = ["data=mnist", "data.root=data", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=2"]
    code, out, err = run("flowtrain", *keys, "recipe=none", *TINY[name], *labels)
    assert code == 0, err
    run_dir = tmp_path / out.splitlines()[-1]
    pictures = {"samples", "curves", "calibration", "reconstructions", "interpolation", "temperature"}
    pictures |= {"classes"} if conditional else set()
    assert {p.stem for p in (run_dir / "plots").glob("*.png")} == pictures
    result = json.loads((run_dir / "result.json").read_text())
    assert result["bits_per_dim"] == pytest.approx(result["nll"] / (24 * math.log(2)))
    assert (result["n"], result["dequantization_samples"], result["entropy"]) == (20, 1, None)

    # from another working directory: the data are found by the absolute path
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
    given = (flow.in_turn(6),) if conditional else ()
    torch.testing.assert_close(flow(flow.inverse(x, *given), *given), x, atol=0.05, rtol=1e-3)
    assert root.exists()


def test_images_of_a_table_train_as_images(run: Run, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 17, (60, 25))
    values[:, 24] = np.arange(60) % 4
    np.savetxt(tmp_path / "t.tra", values, "%d", ",")
    keys = ["data=array", "data.path=t.tra", "data.label=24", "data.event_shape=[1,4,6]", "data.levels=17"]
    small = ["trainer.batch_size=8", "trainer.steps=2"]
    for model in ("realnvp", "glow", "ffjord"):
        code, out, err = run("flowtrain", *keys, *small, *TINY[model], "model.conditional=true")
        assert code == 0, err
        result = json.loads((Path(out.splitlines()[-1]) / "result.json").read_text())
        assert result["bits_per_dim"] == pytest.approx(result["nll"] / (24 * math.log(2)))
    code, _, err = run("flowtrain", *keys[:2], "model=realnvp", "model.conditional=true", "data.dequantize=true")
    assert code == 2
    assert "no labels to condition on" in err


def test_an_old_checkpoint_of_dequantized_counts_still_loads(run: Run, tmp_path: Path) -> None:
    """Of the time before checkpoints described their samples."""
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 9, (60, 3)))
    keys = ["data=array", "data.path=t.npy", "data.dequantize=true", "trainer.steps=2", "model=realnvp"]
    _, out, _ = run("flowtrain", *keys)
    path = tmp_path / out.splitlines()[-1] / "checkpoints/best.pt"
    saved = checkpoint.load(path)
    expected = load(path)
    del saved["samples"]
    saved["config"]["data"]["standardize"] = True
    checkpoint.save(tmp_path / "old.pt", saved)
    flow = load(tmp_path / "old.pt")
    assert flow.discrete
    x = torch.randn(5, 3)
    assert torch.equal(flow.log_prob(x), expected.log_prob(x))


def test_what_the_weights_were_trained_with_is_kept(run: Run, tmp_path: Path) -> None:
    """A density that is not that of the training would be scored, or a run go on, without a word."""
    write_set(tmp_path / "data" / "mnist")
    keys = ["data=mnist", "data.root=data", "data.n_val=10", "trainer.steps=1", "trainer.batch_size=4", "recipe=none"]
    code, out, err = run("flowtrain", *keys, *TINY["realnvp"])
    assert code == 0, err
    ckpt = f"ckpt={out.splitlines()[-1]}"
    for override in ("model.cap=7", "model.activation=tanh", "data.alpha=0.1"):
        code, _, err = run("floweval", ckpt, override)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert override.split("=")[0] in err
    (tmp_path / "kept.npy").write_bytes(b"kept")
    code, _, err = run("flowsample", ckpt, "n=2", "data=moons", "out=kept.npy")
    assert code == 2
    assert "trained on samples of shape (1, 4, 6)" in err
    assert (tmp_path / "kept.npy").read_bytes() == b"kept"
    larger = {f"{kind}_images": np.zeros((n, 6, 6), np.uint8) for kind, n in (("train", 50), ("t10k", 20))}
    write_set(tmp_path / "other" / "mnist", **larger)
    code, _, err = run("flowtrain", ckpt.replace("ckpt", "resume"), "data.root=other", "trainer.steps=2")
    assert code == 2
    assert "event_shape is (1, 4, 6), and that of the data now is (1, 6, 6)" in err


@pytest.mark.parametrize("model", ["realnvp", "glow", "ffjord"])
def test_values_out_of_range_and_no_values(model: str, tmp_path: Path) -> None:
    config = config_of(write_set(tmp_path / "data"), *TINY[model])
    flow = build_flow(config, build_data(config).samples).eval()
    x = torch.randint(0, 256, (3, 1, 4, 6))
    for bad in (x + 200, x - 200, x + 256.5, -x - 0.5):
        with pytest.raises(FlowtrainError, match="x goes from"):
            flow.log_prob(bad)
    assert flow.log_prob(x[:0]).shape == (0,)
    for wrong in (x.numpy(), x.to(torch.complex64)):
        with pytest.raises(FlowtrainError, match="tensor of real numbers"):
            flow.log_prob(wrong)


def test_one_test_image_is_enough_to_finish(run: Run, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "mnist")
    keys = ["data=mnist", "data.root=data", "data.n_val=10", "data.n_test=1", "trainer.steps=1", "recipe=none"]
    code, out, err = run("flowtrain", *keys, *TINY["realnvp"])
    assert code == 0, err
    plots = Path(out.splitlines()[-1]) / "plots"
    assert {p.stem for p in plots.glob("*.png")} == {
        "samples",
        "curves",
        "calibration",
        "reconstructions",
        "temperature",
    }


def test_experiments_take_the_recipe_of_their_model() -> None:
    for name in ("realnvp", "glow", "ffjord"):
        config = compose_defaults([f"experiment=mnist_{name}_small"])
        assert config["model"]["positions"]
        assert config["trainer"]["time_limit"] == 600


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (config_dir() / "experiment").glob("mnist_*.yaml")))
def test_every_experiment_on_images_trains(experiment: str, run: Run, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "mnist")
    small = ["data.n_val=10", "data.root=data", "trainer.batch_size=4", "trainer.steps=1", "model.hidden=[4]"]
    small += ["model.scales=1", "solver.rtol=1e-3"] + ["model.steps=2"] * ("glow" in experiment)
    code, out, err = run("flowtrain", f"experiment={experiment}", *small)
    assert code == 0, err
    assert json.loads((Path(out.splitlines()[-1]) / "result.json").read_text())["bits_per_dim"] > 0
