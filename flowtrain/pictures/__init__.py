"""What a flow looks like beside its data: which samples, grids and moments go into which figure."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.flow import Flow
from flowtrain.pictures import images, vectors
from flowtrain.pictures.evaluation import draw_evaluation
from flowtrain.pictures.passage import animate, check_animated, draw_way
from flowtrain.pictures.shared import drawing, spared

__all__ = ["animate", "check_animated", "draw", "draw_evaluation", "draw_more", "spared"]


def draw(
    flow: Flow,
    data: Dataset,
    path: Path,
    title: str,
    samples: Tensor | None = None,
    label: int | None = None,
    log_scale: bool = False,
) -> None:
    """Data beside samples: with the density for 2-D, a corner plot of a few columns beyond, grids of images.

    No randomness is left behind. Images of a conditional flow are of the labels of the data beside them; with `label`,
    the class of `samples`, both are of that one.

    Args:
        log_scale: 2-D densities by their logarithm, which shows the tails.
    """
    with drawing(flow):
        if len(flow.event_shape) == 3:
            images.draw(flow, data, path, title, samples, label)
        else:
            vectors.draw(flow, data, path, title, samples, log_scale)


def draw_more(flow: Flow, data: Dataset, place: Callable[[str], Path], title: str) -> list[Path]:
    """What else there is to show, one figure each.

    Of images reconstructions, interpolations, temperatures and classes; of two columns the way from base to data.

    Args:
        place: where a figure of some name goes.

    Returns:
        The files.
    """
    if len(flow.event_shape) == 3:
        return images.draw_more(flow, data, place, title)
    return draw_way(flow, data, place, title) if flow.event_shape == (2,) else []
