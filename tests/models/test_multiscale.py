"""Image models: squeezes, scales, labels, reduced precision and refused settings."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Compose
from helpers.files import write_set
from helpers.flows import IMAGE_MODELS
from torch import Tensor

from flowtrain.bijections.coupling import AffineCoupling
from flowtrain.bijections.scale import ActNorm, BatchNorm
from flowtrain.bijections.squeeze import squeeze, unsqueeze
from flowtrain.flow import Flow
from flowtrain.models.glow import glow
from flowtrain.models.realnvp import realnvp
from flowtrain.runs.build import build_data, build_flow
from flowtrain.utils.errors import ConfigError, FlowtrainError
from flowtrain.utils.precision import narrowed

# Shapes and scales


def test_squeeze_puts_the_colours_of_a_checkerboard_apart() -> None:
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    y = squeeze(x)
    assert y.shape == (1, 8, 2, 3)
    assert torch.equal(unsqueeze(y), x)
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    even = (row + column) % 2 == 0
    assert set(y[:, :4].flatten().tolist()) == set(x[:, :, even].flatten().tolist())
    # pixel (1, 0) of channel 1 is the lower left pixel of its square
    assert y[0, 7, 0, 0] == x[0, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: realnvp((1, 28, 28), scales=3), r"model.scales=3: images of 28x28 can be halved 2 times"),
        (lambda: realnvp((1, 8, 8), hidden=[8, 4]), r"model.hidden=\[8, 4\]: all blocks"),
        (lambda: realnvp((1, 8, 8), conditional=True), "conditional=true"),
        (lambda: glow((1, 7, 7)), "these images of 7x7 have one"),
        (lambda: glow((1,)), "at least 2 columns"),
        (lambda: glow((1, 8, 8), hidden=[]), "model.hidden"),
        (lambda: glow((2,), steps=0), "model.steps=0"),
        (lambda: glow((1, 8, 8), coupling="cubic"), "model.coupling=cubic"),
        (lambda: glow((1, 8, 8), coupling="spline", bins=1), "model.bins=1"),
        (lambda: glow((1, 8, 8), coupling="spline", bound=0), "model.bound=0"),
    ],
)
def test_invalid_model_options_are_refused(make: Callable[[], Flow], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize("model", ["realnvp", "glow"])
def test_initialization_standardises_the_latents_of_the_data(model: str) -> None:
    """Every ActNorm is initialized from its own input, through squeezes and at every scale."""
    flow = (realnvp if model == "realnvp" else glow)((1, 16, 16), hidden=[4])
    x = 5 + 3 * torch.randn(300, 1, 16, 16).cumsum(-1)
    z = flow.bijection.initialize(x)
    norms = [m for m in flow.modules() if isinstance(m, ActNorm)]
    assert len(norms) > 10
    assert all(norm.shift.any() or norm.log_scale.any() for norm in norms)
    torch.testing.assert_close(z, flow.bijection.map_inverse(x))
    assert z.mean().abs() < 1e-6
    # Glow standardizes and then rotates the factored-out latents
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


# Precision


def nets_seen(flow: Flow, x: Tensor, name: str) -> tuple[Tensor, set[torch.dtype]]:
    """Returns log p(x) in training mode at that precision, and the output dtypes of the couplings' networks."""
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
    """Only networks use bfloat16, so the log-determinant still belongs to the map. Evaluation never uses bfloat16."""
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
    # in training too, the inverse is accurate to float32, so the log-determinants of both directions agree
    with narrowed("bfloat16", x.device), torch.no_grad():
        z, log_det = flow.bijection.inverse(x)
        back, back_log_det = flow.bijection.forward(z)
    torch.testing.assert_close(log_det, -back_log_det, rtol=1e-2, atol=0.3)
    flow.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flow.log_prob(x), plain, rtol=1e-5, atol=1e-4)
    assert (back - x).abs().median() < 1e-2


# Refusals


@pytest.mark.parametrize("model", ["realnvp", "glow", "ffjord"])
def test_invalid_pixel_values_are_refused(model: str, tmp_path: Path, image_config: Compose) -> None:
    config = image_config(write_set(tmp_path / "data"), *IMAGE_MODELS[model])
    flow = build_flow(config, build_data(config).samples).eval()
    x = torch.randint(0, 256, (3, 1, 4, 6))
    for bad in (x + 200, x - 200, x + 256.5, -x - 0.5):
        with pytest.raises(FlowtrainError, match="x has values from"):
            flow.log_prob(bad)
    assert flow.log_prob(x[:0]).shape == (0,)
    for wrong in (x.to(torch.complex64), x.to(torch.complex64).numpy()):
        with pytest.raises(FlowtrainError, match="real numbers"):
            flow.log_prob(wrong)
