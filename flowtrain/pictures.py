"""What a flow looks like beside its data: which samples and grids go into which figure."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flowtrain import plots
from flowtrain.data.base import Dataset
from flowtrain.errors import FlowtrainError
from flowtrain.evaluation import Evaluation
from flowtrain.flow import Flow
from flowtrain.scores import marginal
from flowtrain.seeding import seeded

log = logging.getLogger("flowtrain")

POINTS = 10_000
IMAGES = 100
# a picture shows nothing of an error this small, and a tight solve of its whole grid would cost more than it shows
TOLERANCE = 1e-4
TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0)
# images in a row of the data, in one of samples, and pairs that are interpolated
ROW, SAMPLED, PAIRS = 10, 16, 6


@contextmanager
def spared(what: str) -> Iterator[None]:
    """What came before it is not lost for a picture: one that cannot be drawn or written gives a warning."""
    try:
        yield
    except (FlowtrainError, OSError) as e:
        log.warning("no picture %s: %s", what, e)


def draw(
    flow: Flow, data: Dataset, path: Path, title: str, samples: Tensor | None = None, label: int | None = None
) -> None:
    """Data beside samples: with the density for 2-D, a corner plot of a few columns beyond, grids of images.

    No randomness is left behind. Images of a conditional flow are of the labels of the data beside them; with `label`,
    the class of `samples`, both are of that one.
    """
    with _drawing(flow):
        if len(flow.event_shape) == 3:
            _draw_images(flow, data, path, title, samples, label)
        else:
            _draw_vectors(flow, data, path, title, samples)


def draw_more(flow: Flow, data: Dataset, place: Callable[[str], Path], title: str) -> list[Path]:
    """What else images have to show, one figure each: reconstructions, interpolations, temperatures and classes.

    Args:
        place: where a figure of some name goes.

    Returns:
        The files.
    """
    if len(flow.event_shape) != 3:
        return []
    show = Shown(flow, data)
    figures: dict[str, Callable[[Flow, Dataset], Rows]] = {
        "reconstructions": reconstructions,
        "interpolation": interpolations,
        "temperature": temperatures,
    }
    if flow.classes is not None:
        figures["classes"] = classes
    files = []
    for name, rows in figures.items():
        with spared(name), _drawing(flow):
            drawn = [(words, show(images)) for words, images in rows(flow, data)]
            # no two test images of one class, and there is nothing to interpolate
            if drawn:
                plots.draw_rows(place(name), rows=drawn, levels=1, title=f"{title}: {name}")
                files.append(place(name))
    return files


class Shown:
    """Images as they are drawn, from 0 (black) to 1: levels by their number, others by the range of the test data."""

    def __init__(self, flow: Flow, data: Dataset) -> None:
        self.flow = flow
        self.low, self.high = value_range(flow, data)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        # what is not finite is for the figure to show
        x = torch.where(x.isfinite(), self.flow.quantized(x).float(), x)
        return (x - self.low) / (self.high - self.low or 1.0)


def value_range(flow: Flow, data: Dataset) -> tuple[float, float]:
    """The values that are drawn black and white."""
    if flow.levels is not None:
        return 0.0, flow.levels - 1.0
    return float(data.test.min()), float(data.test.max())


Rows = list[tuple[str, Tensor]]


def reconstructions(flow: Flow, data: Dataset) -> Rows:
    """Test images, what comes back of them through the latents, and the difference, which is not to be seen."""
    x, label = _first(flow, data, ROW)
    x = flow.dequantized(x)
    back = flow(flow.inverse(x, label), label)
    grey = sum(value_range(flow, data)) / 2
    return [("data", x), ("round trip", back), ("difference", grey + x - back)]


def interpolations(flow: Flow, data: Dataset) -> Rows:
    """From one test image to another along the great circle between their latents, of one class where there are any."""
    x, label = _first(flow, data, 20 * PAIRS)
    first, second = pairs(label, len(x))
    z = flow.inverse(x, label)
    t = torch.linspace(0, 1, ROW, device=z.device)
    rows = []
    for i, j in zip(first, second, strict=True):
        labels = None if label is None else label[i].expand(ROW)
        rows.append(("" if label is None else str(int(label[i])), flow(slerp(z[i], z[j], t), labels)))
    return rows


def pairs(label: Tensor | None, n: int) -> tuple[list[int], list[int]]:
    """Up to PAIRS pairs of rows below n, each of one class and no row twice."""
    waiting: dict[int, int] = {}
    first, second = [], []
    for i in range(n):
        key = 0 if label is None else int(label[i])
        if key in waiting:
            first.append(waiting.pop(key))
            second.append(i)
        else:
            waiting[key] = i
    return first[:PAIRS], second[:PAIRS]


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(sin((1 - t) w) a + sin(t w) b) / sin w, w the angle between a and b: latents as long as those of data.

    Shapes: a and b (*event), t (n,), result (n, *event). (Shoemake 1985, Animating rotation, section 3.3.)
    """
    t = t.view(-1, *(1,) * a.dim())
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(1e-4, torch.pi - 1e-4)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def temperatures(flow: Flow, data: Dataset) -> Rows:
    """The same latents at several temperatures."""
    z, label = _latents(flow, SAMPLED)
    return [(f"T = {t}", flow(t * z, label)) for t in TEMPERATURES]


def classes(flow: Flow, data: Dataset) -> Rows:
    """Samples of each class, from the same latents."""
    assert flow.classes is not None
    z, _ = _latents(flow, SAMPLED)
    return [(str(label), flow(z, label)) for label in range(flow.classes)]


def _latents(flow: Flow, n: int) -> tuple[Tensor, Tensor | None]:
    like = flow.like
    z = torch.randn(n, *flow.event_shape, dtype=like.dtype, device=like.device)
    return z, None if flow.classes is None else flow.in_turn(n)


def _first(flow: Flow, data: Dataset, n: int, label: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The first test samples, of that class where one is given, and for a conditional flow their labels."""
    x, labels = data.test, data.test_labels
    if label is not None and labels is not None:
        x, labels = x[labels == label], labels[labels == label]
    device = flow.like.device
    return x[:n].to(device), None if flow.classes is None or labels is None else labels[:n].to(device)


@contextmanager
def _drawing(flow: Flow) -> Iterator[None]:
    """The flow in evaluation mode, no gradients, randomness of its own, and a tolerance that suits a picture."""
    flow.eval()
    with torch.no_grad(), seeded(0, flow.like.device):
        if flow.solver is None:
            yield
            return
        rtol = max(flow.solver.rtol, TOLERANCE)
        with flow.solver.using(rtol=rtol, atol=rtol):
            yield


def _draw_images(flow: Flow, data: Dataset, path: Path, title: str, samples: Tensor | None, label: int | None) -> None:
    show = Shown(flow, data)
    real, labels = _first(flow, data, IMAGES, label)
    if samples is None:
        samples = flow.sample(len(real), label=labels)
    plots.draw_panels(path, panels=[("data", show(real)), ("samples", show(samples))], levels=1, title=title)


def _draw_vectors(flow: Flow, data: Dataset, path: Path, title: str, samples: Tensor | None) -> None:
    if samples is None:
        samples = flow.sample(POINTS if flow.event_shape[0] <= 2 else 2000)
    plots.draw_flow(
        path,
        data=flow.dequantized(data.test[:POINTS]),
        samples=samples,
        log_density=lambda x: torch.cat([_log_density(flow, part) for part in torch.split(x, 2000)]),
        columns=data.columns,
        title=title,
    )


def _log_density(flow: Flow, x: Tensor) -> Tensor:
    """That of the flow, and -inf off the range that a logit maps from, into which a grid around the data leads."""
    if flow.levels is None:
        return marginal(flow, x)
    inside = ((x >= 0) & (x <= flow.levels)).all(dim=1)
    out = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    if inside.any():
        out[inside] = marginal(flow, x[inside]).to(out.dtype)
    return out


def draw_evaluation(result: Evaluation, title: str, data: str, place: Callable[[str], Path]) -> list[Path]:
    """Calibration, and of two sets how likelihood tells them apart.

    Args:
        data: the name of the data.
        place: where a figure of some name goes.

    Returns:
        The files.
    """
    drawn = []
    words = f"{title}, latents of {result.calibration.n:,} samples ({result.rows_words})"
    with spared("calibration"):
        plots.draw_calibration(place("calibration"), pit=result.pit, title=words)
        drawn.append(place("calibration"))
    if result.ood is None or result.sets is None:
        return drawn
    unit, scale = result.unit
    with spared("ood"):
        plots.draw_ood(
            place("ood"),
            names=(data, result.ood.name),
            log_p=(scale * result.sets[0], scale * result.sets[1]),
            entropy=scale * result.ood.entropy,
            auroc=result.ood.auroc,
            typicality_auroc=result.ood.typicality_auroc,
            unit=unit,
            title=f"{title}, beside {result.ood.name}",
        )
        drawn.append(place("ood"))
    return drawn
