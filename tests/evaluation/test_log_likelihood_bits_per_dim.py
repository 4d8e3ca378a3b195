"""Bits per dimension of integers equal hand computations. Also tests of dequantization and of the range of values."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.linear import Affine
from flowtrain.bijections.logit import Logit, dequantize
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Dataset
from flowtrain.evaluation import evaluate
from flowtrain.evaluation.log_likelihood import dequantized_parts, log_probs
from flowtrain.flow import Flow
from flowtrain.runs.build import build_flow
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.row_noise import uniform_rows

SHAPE = (1, 4, 4)


class Bytes(Dataset):
    """Images in which half of the pixels are 0, labelled by their first pixel."""

    integer_valued, levels, classes = True, 256, 2

    def __init__(self, shape: tuple[int, ...] = SHAPE, n: int = 40) -> None:
        self.event_shape = shape
        self.val, self.test = self.train_batch(0, n, 1), self.train_batch(0, n, 2)
        self.val_labels, self.test_labels = ((x.flatten(1)[:, 0] > 0).long() for x in (self.val, self.test))

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randint(0, 512, (batch_size, *self.event_shape), generator=generator)
        return torch.where(x < 256, x, 0).to(torch.uint8)


def integer_flow(bijection: Bijection, shape: tuple[int, ...] = SHAPE, **rest: Any) -> Flow:
    return Flow(shape, bijection, integer_valued=True, levels=256, **rest).eval()


# Bits per dimension


def test_bits_per_dim_of_one_pixel_equals_a_hand_computation() -> None:
    """A pixel of value 0 is dequantized to 0.5 and mapped by a logit with alpha = 0.05 to a standard normal base."""
    flow = integer_flow(Logit(256, 0.05), (1, 1, 1))
    p = 0.05 + 0.9 * 0.5 / 256
    z = math.log(p / (1 - p))
    log_p = -0.5 * z * z - 0.5 * math.log(2 * math.pi) + math.log(0.9 / 256) - math.log(p) - math.log(1 - p)
    found = flow.log_prob(torch.full((1, 1, 1, 1), 0.5))
    assert found.item() == pytest.approx(log_p, abs=1e-12)
    assert flow.bits_per_nat == pytest.approx(1 / math.log(2))
    assert -flow.bits_per_nat * found.item() == pytest.approx(11.229193, abs=1e-6)


def test_uniform_image_costs_eight_bits_per_dim() -> None:
    """x + u is uniform on [0, 256), so its density is 1/256, or 8 bits per pixel. The base is logistic."""

    class ToLogistic(Bijection):
        """Maps a standard normal to a standard logistic through their distribution functions."""

        def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            raise NotImplementedError

        def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z = math.sqrt(2) * torch.erfinv(2 * torch.sigmoid(x) - 1)
            logistic = -x - 2 * nn.functional.softplus(-x)
            return z, (logistic + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    flow = integer_flow(Chain([ToLogistic(), Affine(16), Logit(256, 1e-9)]))
    x = torch.randint(20, 235, (50, *SHAPE))
    bits = -flow.bits_per_nat * flow.log_prob(x)  # type: ignore[operator]
    torch.testing.assert_close(bits, torch.full((50,), 8.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", ["realnvp", "glow", "ffjord"])
def test_untrained_bits_per_dim_match_an_independent_calculation(model: str) -> None:
    """Untrained flows without data-dependent scales map the logits of the data to a standard normal base."""
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
    # Glow's initial rotation of the channels leaves a standard normal unchanged
    assert result.bits_per_dim == pytest.approx(-log_p.mean() / np.log(2), rel=1e-6)
    assert result.nll == pytest.approx(-log_p.sum((1, 2, 3)).mean(), rel=1e-6)


def test_affine_flow_on_logits_equals_the_gaussian_density() -> None:
    data = Bytes()
    flow = integer_flow(Chain([Affine(16), Logit(256, 1e-3)]))
    flow.bijection.initialize(dequantize(data.train_batch(0, 2000, 3), torch.zeros(())))
    x = dequantize(data.test, torch.zeros(()))
    p = 1e-3 + (1 - 2e-3) * x.flatten(1) / 256
    affine = flow.bijection.bijections[0]  # type: ignore[index]
    gaussian = torch.distributions.MultivariateNormal(affine.mean, scale_tril=affine.factor())
    slope = (1 - 2e-3) / 256 / (p * (1 - p))
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(torch.logit(p)) + slope.log().sum(1))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.05, 0.4])
def test_logit_is_accurate_in_float32(alpha: float) -> None:
    x = torch.cat([torch.linspace(0, 256, 400), torch.tensor([1e-6, 1e-3, 255.999])]).float().double().view(-1, 1, 1, 1)
    wide, narrow = Logit(256, alpha).inverse(x), Logit(256, alpha).inverse(x.float())
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    back, log_det = Logit(256, alpha).forward(wide[0].float())
    torch.testing.assert_close(back.double(), x, rtol=3e-6, atol=1e-4)
    torch.testing.assert_close(log_det.double(), -wide[1], rtol=3e-6, atol=3e-6)


# Integers


@pytest.mark.parametrize("alpha", [1e-6, 1e-2])
def test_logit_of_far_latents_is_finite_in_float32(alpha: float) -> None:
    """In float32 a distant latent maps to the edge of the range, whose inverse must be finite."""
    torch.set_default_dtype(torch.float32)
    logit = Logit(256, alpha).eval()
    far = torch.tensor([[-200.0, -60.0, -30.0, 30.0, 60.0, 200.0]])
    z, log_det = logit.inverse(logit.forward(far)[0])
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    assert (z.sign() == far.sign()).all()


def test_only_integers_are_dequantized() -> None:
    flow = integer_flow(Logit(256, 0.05))
    x = Bytes().test
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))
    noisy = flow.dequantized(x)
    assert torch.equal(flow.dequantized(noisy), noisy)
    assert torch.equal(noisy.floor(), x.double())
    assert torch.equal(flow.quantized(noisy), x)
    u = noisy - x
    assert abs(u.mean() - 0.5) < 5 * (12 * u.numel()) ** -0.5
    # a flow without integer_valued treats integers as real numbers
    plain = Flow((2,), Affine(2))
    whole = torch.tensor([[1, 2]])
    assert torch.equal(plain.log_prob(whole), plain.log_prob(whole.double()))


def test_dequantization_noise_never_rounds_up_to_the_next_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, largest))
    x = torch.tensor([-300, -1, 0, 1, 16, 255, 60_000])
    assert torch.equal(dequantize(x, torch.zeros((), dtype=torch.float32)).floor().long(), x)


def test_quantized_samples_are_clamped_to_the_levels() -> None:
    flow = integer_flow(Logit(256, 0.05))
    x = torch.tensor([-3.0, -0.1, 0.0, 0.99, 255.5, 256.0, 300.0]).view(-1, 1, 1, 1)
    assert flow.quantized(x).flatten().tolist() == [0, 0, 0, 0, 255, 255, 255]
    assert flow.quantized(x).dtype == torch.uint8
    counts = Flow((1,), Affine(1), integer_valued=True)
    assert counts.quantized(torch.tensor([-1.5, 300.2])).tolist() == [-2, 300]


def test_more_dequantization_samples_tighten_the_nll_bound() -> None:
    """log 1/K sum p(x + u_k) agrees with its definition, and its mean rises towards log P(x)."""
    data = Bytes((1, 1, 1), n=400)
    flow = integer_flow(Logit(256, 1e-4), (1, 1, 1))
    means = []
    for draws in (1, 4, 64):
        result = evaluate(flow, data, dequantization_samples=draws)
        assert result.dequantization_samples == draws
        means.append(result.nll)
    assert means[0] > means[1] > means[2]
    # P(x) is the integral of the density over the unit interval of the pixel
    edges = 1e-4 + (1 - 2e-4) * torch.arange(257, dtype=torch.float64) / 256
    cdf = torch.special.ndtr(torch.logit(edges))
    exact = -(cdf[1:] - cdf[:-1])[data.test.long()].log().mean().item()
    assert exact < means[2] < exact + 0.1 * (means[0] - exact)
    [noise] = uniform_rows([len(data.test)], flow.event_shape, flow.data_like.dtype, seed=0, draws=4)
    each = torch.stack([flow.log_prob(flow.dequantized(data.test, u)) for u in noise])
    torch.testing.assert_close(log_probs(flow, data.test, draws=4), each.exp().mean(0).log())


@pytest.mark.parametrize("draws", [1, 3])
def test_log_p_of_an_image_depends_only_on_its_number(draws: int) -> None:
    flow, x = integer_flow(Chain([Affine(16), Logit(256)])), Bytes().test
    expected = log_probs(flow, x, draws=draws, seed=2)
    for size in (1, 7):
        torch.testing.assert_close(log_probs(flow, x, batch_size=size, draws=draws, seed=2), expected)
    torch.testing.assert_close(log_probs(flow, x[11:], draws=draws, seed=2, first=11), expected[11:])
    assert not torch.isclose(log_probs(flow, x[11:], draws=draws, seed=2), expected[11:]).any()
    assert not torch.isclose(log_probs(flow, x, draws=draws, seed=3), expected).any()
    points = [torch.cat(one) for one in zip(*dequantized_parts(flow, x, 9, draws, seed=2), strict=True)]
    each = torch.stack([flow.log_prob(one) for one in points])
    torch.testing.assert_close(each.double().exp().mean(0).log(), expected)


def test_evaluation_refuses_mismatched_integer_data() -> None:
    flow = Flow(SHAPE, Affine(16)).eval()
    with pytest.raises(DataError, match="0 to 255"):
        evaluate(flow, Bytes())
    data = Bytes()
    data.test = data.test.double()
    data.integer_valued, data.levels = False, None  # type: ignore[misc, assignment]
    with pytest.raises(ConfigError, match="dequantization_samples=2"):
        evaluate(flow, data, dequantization_samples=2)
