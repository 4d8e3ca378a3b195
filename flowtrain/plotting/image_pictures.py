"""Figures of images: samples beside data, reconstructions, interpolations, temperatures and classes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bases import StandardNormal
from flowtrain.data.base import Dataset
from flowtrain.flow import Density, Flow
from flowtrain.plotting import points
from flowtrain.plotting.drawing import draw_latents, drawing, first_test_samples, warn_if_plotting_fails
from flowtrain.plotting.image_grids import draw_panels, draw_rows
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.utils.errors import FlowtrainError
from flowtrain.utils.process import seeded

IMAGES = 100
TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0)
# images in a row of reconstructions, of interpolations and of samples
RECONSTRUCTED, WEIGHTS, SAMPLED = 10, 11, 16
# the number of pairs of images that are interpolated, and the number of test images that are searched for pairs
PAIRS, SEARCHED = 6, 120


def draw(
    flow: Density,
    data: Dataset,
    path: Path,
    title: str,
    samples: Tensor | None,
    label: int | None,
    options: PlotOptions = DEFAULT,
) -> None:
    """Draws samples beside data; see `flowtrain.plotting.pictures.draw`."""
    show = UnitRange(flow, data)
    real, context = first_test_samples(flow, data, IMAGES, label)
    of = "" if flow.classes is None else "same classes" if label is None else f"class {label}"
    if samples is None:
        samples = flow.sample(len(real), context=context)
        of = "same contexts" if flow.context else of
    panels = [("data", show(real)), (points.noted("samples", of), show(samples))]
    draw_panels(path, panels=panels, levels=1, title=title, options=options)


def draw_other_figures(
    flow: Flow, data: Dataset, path_of: Callable[[str], Path], title: str, options: PlotOptions = DEFAULT
) -> list[Path]:
    """Draws reconstructions, interpolations, temperatures and classes. See `pictures.draw_other_figures`."""
    show = UnitRange(flow, data)
    classes_of_columns = [] if flow.classes is None else [f"class {y}" for y in flow.cycled_labels(SAMPLED).tolist()]
    figures = {
        "interpolation": RowsFigure(
            interpolations,
            "interpolation between test images",
            "on the great circle between the latents; columns: weight of the image at the right end",
            [f"{weight:.1f}" for weight in torch.linspace(0, 1, WEIGHTS).tolist()],
        ),
        "temperature": RowsFigure(
            temperatures,
            "samples by temperature",
            "columns: the same base noise, multiplied by the temperature T",
            classes_of_columns,
        ),
        "classes": RowsFigure(classes, "samples by class", "columns: the same base noise"),
    }
    if flow.classes is None:
        del figures["classes"]
    if flow.context:
        # two images have different contexts, and there is no flow between them
        del figures["interpolation"]
    files = []
    with warn_if_plotting_fails("reconstructions"):
        _draw_reconstructions(flow, data, show, path_of("reconstructions"), title, options)
        files += options.files(path_of("reconstructions"))
    for name, figure in figures.items():
        with warn_if_plotting_fails(name), drawing(flow) as flow:
            rows = [(words, show(images)) for words, images in figure.rows(flow, data)]
            # interpolations have no rows if no two test images have the same class
            if rows:
                draw_rows(
                    path_of(name),
                    rows=rows,
                    levels=1,
                    title=f"{title}: {figure.title}",
                    note=figure.note,
                    heads=figure.heads,
                    options=options,
                )
                files += options.files(path_of(name))
    return files


def _draw_reconstructions(
    flow: Flow, data: Dataset, show: "UnitRange", path: Path, title: str, options: PlotOptions
) -> None:
    """Draws test images, their round trips through the latents, and the differences with a colour bar."""
    # tolerance=0.0 keeps the tolerance of an evaluation, because the figure states the size of the error
    with drawing(flow, tolerance=0.0) as flow:
        x, back = reconstructed(flow, data)
        draw_rows(
            path,
            rows=[("data", show(x)), ("round trip", show(back))],
            levels=1,
            title=f"{title}: reconstruction of test images",
            note="round trip: forward(inverse(x))",
            signed=[("difference", x - back)],
            unit="in the units of the data" if flow.levels is None else f"levels range from 0 to {flow.levels - 1}",
            options=options,
        )


class UnitRange:
    """Scales images to the range from 0 (black) to 1 (white).

    Integer values are divided by the largest level. Other values are scaled by the range of the test data.
    """

    def __init__(self, flow: Density, data: Dataset) -> None:
        self.flow = flow
        self.low, self.high = value_range(flow, data)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        # values that are not finite are kept, because the figure marks them
        x = torch.where(x.isfinite(), self.flow.quantized(x).float(), x)
        return (x - self.low) / (self.high - self.low or 1.0)


def value_range(flow: Density, data: Dataset) -> tuple[float, float]:
    """Returns the value that is drawn in black and the value that is drawn in white."""
    if flow.levels is not None:
        return 0.0, flow.levels - 1.0
    return float(data.test.min()), float(data.test.max())


Rows = list[tuple[str, Tensor]]


class RowsFigure(NamedTuple):
    """Named rows of images, with the title of the figure, a note, and the names of the columns."""

    rows: Callable[[Flow, Dataset], Rows]
    title: str
    note: str
    heads: Sequence[str] = ()


def reconstructed(flow: Flow, data: Dataset) -> tuple[Tensor, Tensor]:
    """Returns test images, dequantized if integer-valued, and their round trips, both (RECONSTRUCTED, C, H, W)."""
    x, context = first_test_samples(flow, data, RECONSTRUCTED)
    x = flow.dequantized(x)
    return x, flow(flow.inverse(x, context), context)


def interpolations(flow: Flow, data: Dataset) -> Rows:
    """Interpolates between pairs of test images along the great circle between their latents.

    The images of a pair have the same class if the flow is conditional. The name of a row contains the classes of its
    two test images, if they are known, and the positions of the images in the test set.

    Raises:
        FlowtrainError: the base is not a standard normal, so latents do not lie near a sphere.
    """
    if not isinstance(flow.base, StandardNormal):
        raise FlowtrainError(
            f"images are interpolated on the sphere near which standard normal latents lie, but the base of this flow "
            f"is {type(flow.base).__name__}"
        )
    x, label = first_test_samples(flow, data, SEARCHED)
    known = None if data.test_labels is None else data.test_labels[:SEARCHED].tolist()
    z = flow.inverse(x, label)
    t = torch.linspace(0, 1, WEIGHTS, device=z.device)
    rows = []
    for i, j in zip(*pairs(label, len(x)), strict=True):
        labels = None if label is None else label[i].expand(WEIGHTS)
        of = ""
        if known is not None:
            of = f"class {known[i]}\n" if known[i] == known[j] else f"class {known[i]} → {known[j]}\n"
        rows.append((f"{of}test {i} → {j}", flow(slerp(z[i], z[j], t), labels)))
    return rows


def pairs(label: Tensor | None, n: int) -> tuple[list[int], list[int]]:
    """Returns up to PAIRS pairs of rows below n, as two lists. A pair has one class, and no row occurs twice."""
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
    """Interpolates spherically: (sin((1 - t) w) a + sin(t w) b) / sin w, with w the angle between a and b.

    Unlike linear interpolation, spherical interpolation keeps the length of latents.

    Shapes: a and b (*event), t (n,), result (n, *event).

    Source: Shoemake 1985, Animating rotation with quaternion curves, section 3.3.
    """
    t = t.view(-1, *(1,) * a.dim())
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(1e-4, torch.pi - 1e-4)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def temperatures(flow: Flow, data: Dataset) -> Rows:
    """Draws samples from the same base noise at several temperatures, with the contexts of the first test images."""
    context, rows = None if flow.classes is None else flow.cycled_labels(SAMPLED), []
    if flow.context:
        _, context = first_test_samples(flow, data, SAMPLED)
    n = SAMPLED if context is None else len(context)
    for t in TEMPERATURES:
        with seeded(0, flow.like.device):
            z = draw_latents(flow, n, t)
        rows.append((f"T = {t}", flow(z, context)))
    return rows


def classes(flow: Flow, data: Dataset) -> Rows:
    """Draws samples of each class with training rows, from the same base noise."""
    z = draw_latents(flow, SAMPLED)
    return [(f"class {label}", flow(z, label)) for label in flow.classes_with_rows]
