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
from flowtrain.plotting.drawing import (
    as_drawn,
    draw_latents,
    drawing,
    evaluate_inside_range,
    first_test_samples,
    warn_if_plotting_fails,
)
from flowtrain.plotting.image_pictures import UnitRange
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.plotting.trajectory import Moment, Trajectory
from flowtrain.plotting.transport_figures import draw_paths, draw_transport
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.status import status

# solver tolerance of transport.png and of animations: smaller errors cannot be seen
TOLERANCE = 1e-3
# transport.png: the number of moments side by side
PANEL_MOMENTS = 5
# paths.png: the number of particles, and of moments on each path
PARTICLES, PATH_MOMENTS = 110, 25
# paths.png of a flow of discrete steps: its paths have corners, and more than 15 paths cannot be told apart
STEP_PARTICLES = 15
# animations: the number of moments, and the default and largest numbers of particles and of images
FRAMES, DOTS, IMAGES = 49, 2000, 60
MOST_DOTS, MOST_IMAGES = 100_000, 200
# the number of rows of the data
POINTS = 10_000


def draw_transport_pictures(
    flow: Flow, data: Dataset, path_of: Callable[[str], Path], title: str, options: PlotOptions = DEFAULT
) -> list[Path]:
    """Draws transport.png and paths.png of a flow of two columns. For a conditional flow, they show its first class.

    Returns:
        The files that were written.
    """
    label = None if flow.classes is None else flow.seen[0]
    words = title if label is None else f"{title}, class {label}"
    files = []
    with warn_if_plotting_fails("transport"), drawing(flow, TOLERANCE) as flow:
        _draw_transport(_Transport(flow, data, PANEL_MOMENTS, label), path_of("transport"), words, options)
        files += options.files(path_of("transport"))
    # densities along a path are drawn as lines, on which errors of TOLERANCE can be seen
    with warn_if_plotting_fails("paths"), drawing(flow) as flow:
        _draw_paths(_Transport(flow, data, PATH_MOMENTS, label), path_of("paths"), words, options)
        files += options.files(path_of("paths"))
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
        label: the class of a conditional flow. None: images cycle through all classes with training rows, and points of
            two columns have the first of these classes.

    Raises:
        ConfigError: the samples are neither images nor of two columns, n is too large, or a file of this kind cannot be
            written.
        NonFiniteError: a sample is not finite; nothing is written.
    """
    check_animated(flow, n)
    data = as_drawn(data)
    with drawing(flow, TOLERANCE, seed) as flow:
        if len(flow.event_shape) == 3:
            _animate_images(flow, data, paths, title, draw_latents(flow, n or IMAGES, temperature), label, options)
            return
        label = flow.seen[0] if label is None and flow.classes is not None else label
        transport = _Transport(flow, data, FRAMES, label)
        with status("moving samples"):
            states = transport.states(draw_latents(flow, n or DOTS, temperature, label))
        check_samples(states[-1])
        animate_flow_2d(
            paths,
            data=transport.every_class,
            names=transport.names,
            log_density=transport.log_density,
            states=states,
            title=title,
            columns=transport.columns,
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


class _Transport:
    """The states, densities and velocities of a flow of two columns at the moments that a picture shows.

    The arguments of the methods may be on the CPU.
    """

    def __init__(self, flow: Flow, data: Dataset, moments: int, label: int | None) -> None:
        self.flow, self.label = flow, label
        self.trajectory = Trajectory(flow, moments)
        self.shown = self.trajectory.exact(moments)
        self.data = flow.dequantized(first_test_samples(flow, data, POINTS, label)[0])
        # figures start at the base, which is as wide as all classes together. So their limits use rows of all classes
        self.every_class = self.data if label is None else flow.dequantized(first_test_samples(flow, data, POINTS)[0])
        self.columns = tuple(data.columns) or default_names(range(2))

    @property
    def names(self) -> list[str]:
        return [self.trajectory.name(moment) for moment in self.shown]

    def states(self, z: Tensor) -> Tensor:
        """Returns the positions (K, P, 2) that base points z (P, 2) have at the K moments."""
        z = z.to(self.flow.like)
        every = dict(zip(self.trajectory.moments, self.trajectory.states(z, self._labels(z)), strict=True))
        return torch.stack([every[moment] for moment in self.shown])

    def log_density(self, x: Tensor) -> Tensor:
        """Returns log p (K, G) at x (G, 2). It is -inf outside the range of the flow."""
        found = []
        with status("densities", total=len(self.shown), unit="moment") as progress:
            for moment in self.shown:
                found.append(evaluate_inside_range(self.flow, x, partial(self._density, moment=moment), -torch.inf))
                progress.advance()
        return torch.stack(found)

    def _density(self, x: Tensor, moment: Moment) -> Tensor:
        return self.trajectory.log_density(x, moment, self._labels(x))

    def velocity(self, x: Tensor) -> Tensor:
        """Returns the velocities (K, G, 2) at x (G, 2)."""
        return torch.stack(
            [evaluate_inside_range(self.flow, x, partial(self._velocity, moment=m), 0.0, 2) for m in self.shown]
        )

    def _velocity(self, x: Tensor, moment: Moment) -> Tensor:
        v = self.trajectory.velocity(x, moment, self._labels(x))
        assert v is not None
        return v

    def _labels(self, x: Tensor) -> Tensor | None:
        return self.flow.labels(self.label, x)


def _draw_transport(transport: _Transport, path: Path, title: str, options: PlotOptions) -> None:
    draw_transport(
        path,
        data=transport.every_class,
        names=transport.names,
        log_density=transport.log_density,
        velocity=transport.velocity if transport.trajectory.is_continuous else None,
        forward=transport.states,
        title=title,
        columns=transport.columns,
        options=options,
    )


def _draw_paths(transport: _Transport, path: Path, title: str, options: PlotOptions) -> None:
    particles = PARTICLES if transport.trajectory.is_continuous else min(STEP_PARTICLES, PARTICLES)
    states = transport.states(draw_latents(transport.flow, particles, label=transport.label))
    labels = transport.flow.labels(transport.label, states[0])
    along = [transport.trajectory.log_density(x, m, labels) for x, m in zip(states, transport.shown, strict=True)]
    draw_paths(
        path,
        data=transport.data,
        states=states,
        log_densities=torch.stack(along),
        at=[sum(moment) for moment in transport.shown],
        axis=transport.trajectory.axis,
        title=title,
        columns=transport.columns,
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
    trajectory, show = Trajectory(flow, FRAMES), UnitRange(flow, data)
    with status("moving samples"):
        states = trajectory.states(z, labels)
    check_samples(states[-1])
    frames = torch.stack([show(x) for x in states])
    names = [trajectory.name(moment) for moment in trajectory.moments]
    animate_images(paths, names=names, frames=frames, levels=1, title=title, options=options)
