"""Samples of images beside data, and what else images have to show."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.bases import StandardNormal
from flowtrain.data.base import Dataset
from flowtrain.flow import Density, Flow
from flowtrain.plotting.drawing import drawing, first, latents, warn_if_plotting_fails
from flowtrain.plotting.image_grids import draw_panels, draw_rows
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.process import seeded

IMAGES = 100
TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0)
# images in a row of the data, in one of samples, and pairs that are interpolated
ROW, SAMPLED, PAIRS = 10, 16, 6


def draw(
    flow: Density,
    data: Dataset,
    path: Path,
    title: str,
    samples: Tensor | None,
    label: int | None,
    options: PlotOptions = DEFAULT,
) -> None:
    """See `flowtrain.plotting.pictures.draw`."""
    show = Shown(flow, data)
    real, labels = first(flow, data, IMAGES, label)
    if samples is None:
        samples = flow.sample(len(real), label=labels)
    draw_panels(path, panels=[("data", show(real)), ("samples", show(samples))], levels=1, title=title, options=options)


def draw_more(
    flow: Flow, data: Dataset, place: Callable[[str], Path], title: str, options: PlotOptions = DEFAULT
) -> list[Path]:
    """Reconstructions, interpolations, temperatures and classes; see `flowtrain.plotting.pictures.draw_more`."""
    show = Shown(flow, data)
    figures: dict[str, Callable[[Flow, Dataset], Rows]] = {
        "interpolation": interpolations,
        "temperature": temperatures,
    }
    if flow.classes is not None:
        figures["classes"] = classes
    files = []
    with warn_if_plotting_fails("reconstructions"):
        _draw_reconstructions(flow, data, show, place("reconstructions"), title, options)
        files += options.files(place("reconstructions"))
    for name, rows in figures.items():
        with warn_if_plotting_fails(name), drawing(flow) as flow:
            drawn = [(words, show(images)) for words, images in rows(flow, data)]
            # no two test images of one class, and there is nothing to interpolate
            if drawn:
                draw_rows(place(name), rows=drawn, levels=1, title=f"{title}: {name}", options=options)
                files += options.files(place(name))
    return files


def _draw_reconstructions(
    flow: Flow, data: Dataset, show: "Shown", path: Path, title: str, options: PlotOptions
) -> None:
    """Draws test images, their round trips through the latents, and the differences in a colour scale of their own."""
    # at the tolerance of an evaluation, because the figure states the size of the error
    with drawing(flow, tolerance=0.0) as flow:
        x, back = reconstructed(flow, data)
        draw_rows(
            path,
            rows=[("data", show(x)), ("round trip", show(back))],
            levels=1,
            title=f"{title}: reconstructions",
            signed=[("difference", x - back)],
            unit="in the units of the data" if flow.levels is None else "of a level",
            options=options,
        )


class Shown:
    """Images as they are drawn, from 0 (black) to 1: levels by their number, others by the range of the test data."""

    def __init__(self, flow: Density, data: Dataset) -> None:
        self.flow = flow
        self.low, self.high = value_range(flow, data)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        # what is not finite is for the figure to show
        x = torch.where(x.isfinite(), self.flow.quantized(x).float(), x)
        return (x - self.low) / (self.high - self.low or 1.0)


def value_range(flow: Density, data: Dataset) -> tuple[float, float]:
    """The values that are drawn black and white."""
    if flow.levels is not None:
        return 0.0, flow.levels - 1.0
    return float(data.test.min()), float(data.test.max())


Rows = list[tuple[str, Tensor]]


def reconstructed(flow: Flow, data: Dataset) -> tuple[Tensor, Tensor]:
    """Test images (dequantized if integer-valued) and their round trips through the latents, both (ROW, C, H, W)."""
    x, label = first(flow, data, ROW)
    x = flow.dequantized(x)
    return x, flow(flow.inverse(x, label), label)


def interpolations(flow: Flow, data: Dataset) -> Rows:
    """From one test image to another along the great circle between their latents, of one class where there are any.

    Raises:
        FlowtrainError: a base other than a standard normal one, whose latents do not lie near a sphere.
    """
    if not isinstance(flow.base, StandardNormal):
        raise FlowtrainError(
            f"images are interpolated on the sphere that standard normal latents lie near, and this flow has another "
            f"base, {type(flow.base).__name__}"
        )
    x, label = first(flow, data, 20 * PAIRS)
    ones, others = pairs(label, len(x))
    z = flow.inverse(x, label)
    t = torch.linspace(0, 1, ROW, device=z.device)
    rows = []
    for i, j in zip(ones, others, strict=True):
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
    """The same base noise at several temperatures."""
    label, rows = None if flow.classes is None else flow.in_turn(SAMPLED), []
    for t in TEMPERATURES:
        with seeded(0, flow.like.device):
            z = latents(flow, SAMPLED, t)
        rows.append((f"T = {t}", flow(z, label)))
    return rows


def classes(flow: Flow, data: Dataset) -> Rows:
    """Samples of each class that has training rows, from the same latents."""
    z = latents(flow, SAMPLED)
    return [(str(label), flow(z, label)) for label in flow.seen]
