"""Pictures and animations of the transport from the base to the data, for flows of two columns and of images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.data.base import Dataset
from flowtrain.data.tables.columns import default_names
from flowtrain.evaluation.log_likelihood import check_samples
from flowtrain.flow import Flow
from flowtrain.plotting.animation import animate_flow_2d, animate_images
from flowtrain.plotting.drawing import drawing, first, latents, warn_if_plotting_fails, where_inside
from flowtrain.plotting.image_pictures import Shown
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.trajectory import Moment, Trajectory
from flowtrain.plotting.transport_figures import draw_paths, draw_transport
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.status import status

# solver tolerance of transport.png and of animations: smaller errors cannot be seen
TOLERANCE = 1e-3
# moments side by side; particles, and the moments along their paths
COLUMNS, PARTICLES, ALONG = 5, 110, 25
# particles of a flow with steps: their paths have corners, and more of them cannot be told apart
STEP_PARTICLES = 15
# of an animation: its moments, and the numbers of particles and of images
FRAMES, DOTS, IMAGES = 49, 2000, 60
MOST_DOTS, MOST_IMAGES = 100_000, 200
POINTS = 10_000


def draw_transport_pictures(
    flow: Flow, data: Dataset, place: Callable[[str], Path], title: str, options: PlotOptions = DEFAULT
) -> list[Path]:
    """Draws transport.png and paths.png of a flow of two columns; for a conditional flow, of its first class.

    Returns:
        The files.
    """
    label = None if flow.classes is None else flow.seen[0]
    words = title if label is None else f"{title}, class {label}"
    files = []
    with warn_if_plotting_fails("transport"), drawing(flow, TOLERANCE) as flow:
        _draw_transport(_Way(flow, data, COLUMNS, label), place("transport"), words, options)
        files += options.files(place("transport"))
    # densities along a path are drawn as lines, on which errors of TOLERANCE can be seen
    with warn_if_plotting_fails("paths"), drawing(flow) as flow:
        _draw_paths(_Way(flow, data, ALONG, label), place("paths"), words, options)
        files += options.files(place("paths"))
    return files


def animate(
    flow: Flow,
    data: Dataset,
    paths: Sequence[Path],
    title: str,
    *,
    n: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    label: int | None = None,
    options: PlotOptions = DEFAULT,
) -> None:
    """Writes an animation of n particles or images on their way from the base to the data.

    Args:
        paths: the files to write, .gif or .mp4.
        n: the number of particles or images; None: DOTS or IMAGES.
        label: the class of a conditional flow. None: images cycle through all classes, and points of two columns have
            the first class. Classes without training rows are left out.

    Raises:
        ConfigError: the samples are neither images nor of two columns, n is too large, or a file of this kind cannot be
            written.
        NonFiniteError: a sample is not finite; nothing is written.
    """
    check_animated(flow, n)
    with drawing(flow, TOLERANCE, seed) as flow:
        if len(flow.event_shape) == 3:
            _animate_images(flow, data, paths, title, latents(flow, n or IMAGES, temperature), label, options)
            return
        label = flow.seen[0] if label is None and flow.classes is not None else label
        way = _Way(flow, data, FRAMES, label)
        with status("moving samples"):
            states = way.states(latents(flow, n or DOTS, temperature))
        check_samples(states[-1])
        animate_flow_2d(
            paths,
            data=way.every_class,
            names=way.names,
            log_density=way.log_density,
            states=states,
            title=title,
            columns=way.columns,
            options=options,
        )


def check_animated(flow: Flow, n: int | None = None) -> None:
    """Checks that samples of a flow can be animated.

    Raises:
        ConfigError: the samples are neither images nor of two columns, or n is too large.
    """
    most = MOST_IMAGES if len(flow.event_shape) == 3 else MOST_DOTS
    if n is not None and n > most:
        raise ConfigError(f"n={n}: an animation shows at most {most} of such samples")
    if len(flow.event_shape) != 3 and flow.event_shape != (2,):
        raise ConfigError(
            f"animate=true: animations show samples of two columns and images, and the samples of this flow have shape "
            f"{flow.event_shape}; leave animate out"
        )


class _Way:
    """A flow of two columns at the moments that a picture shows, as functions of points on the CPU."""

    def __init__(self, flow: Flow, data: Dataset, moments: int, label: int | None) -> None:
        self.flow, self.label = flow, label
        self.trajectory = Trajectory(flow, moments)
        self.shown = self.trajectory.exact(moments)
        self.data = flow.dequantized(first(flow, data, POINTS, label)[0])
        # of all classes, because the base is as wide as they are together
        self.every_class = self.data if label is None else flow.dequantized(first(flow, data, POINTS)[0])
        self.columns = tuple(data.columns) or default_names(range(2))

    @property
    def names(self) -> list[str]:
        return [self.trajectory.name(moment) for moment in self.shown]

    def states(self, z: Tensor) -> Tensor:
        """The positions (K, P, 2) of points z of the base (P, 2)."""
        z = z.to(self.flow.like)
        every = dict(zip(self.trajectory.moments, self.trajectory.states(z, self._labels(z)), strict=True))
        return torch.stack([every[moment] for moment in self.shown])

    def log_density(self, x: Tensor) -> Tensor:
        """log p (K, G) at x (G, 2); -inf outside the range of the flow."""
        found = []
        with status("densities", total=len(self.shown), unit="moment") as progress:
            for moment in self.shown:
                found.append(where_inside(self.flow, x, partial(self._density, moment=moment), -torch.inf))
                progress.advance()
        return torch.stack(found)

    def _density(self, x: Tensor, moment: Moment) -> Tensor:
        return self.trajectory.log_density(x, moment, self._labels(x))

    def velocity(self, x: Tensor) -> Tensor:
        """The velocities (K, G, 2) at x (G, 2)."""
        return torch.stack([where_inside(self.flow, x, partial(self._velocity, moment=m), 0.0, 2) for m in self.shown])

    def _velocity(self, x: Tensor, moment: Moment) -> Tensor:
        v = self.trajectory.velocity(x, moment, self._labels(x))
        assert v is not None
        return v

    def _labels(self, x: Tensor) -> Tensor | None:
        return self.flow.labels(self.label, x)


def _draw_transport(way: _Way, path: Path, title: str, options: PlotOptions) -> None:
    draw_transport(
        path,
        data=way.every_class,
        names=way.names,
        log_density=way.log_density,
        velocity=way.velocity if way.trajectory.is_continuous else None,
        forward=way.states,
        title=title,
        columns=way.columns,
        options=options,
    )


def _draw_paths(way: _Way, path: Path, title: str, options: PlotOptions) -> None:
    particles = PARTICLES if way.trajectory.is_continuous else min(STEP_PARTICLES, PARTICLES)
    states = way.states(latents(way.flow, particles))
    labels = way.flow.labels(way.label, states[0])
    along = [way.trajectory.log_density(x, m, labels) for x, m in zip(states, way.shown, strict=True)]
    draw_paths(
        path,
        data=way.data,
        states=states,
        log_densities=torch.stack(along),
        at=[sum(moment) for moment in way.shown],
        axis=way.trajectory.axis,
        title=title,
        columns=way.columns,
        options=options,
    )


def _animate_images(
    flow: Flow,
    data: Dataset,
    paths: Sequence[Path],
    title: str,
    z: Tensor,
    label: int | None,
    options: PlotOptions,
) -> None:
    labels = flow.in_turn(len(z)) if flow.classes is not None and label is None else flow.labels(label, z)
    trajectory, show = Trajectory(flow, FRAMES), Shown(flow, data)
    with status("moving samples"):
        states = trajectory.states(z, labels)
    check_samples(states[-1])
    frames = torch.stack([show(x) for x in states])
    names = [trajectory.name(moment) for moment in trajectory.moments]
    animate_images(paths, names=names, frames=frames, levels=1, title=title, options=options)
