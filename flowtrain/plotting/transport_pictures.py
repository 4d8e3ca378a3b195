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
from flowtrain.plotting.context_pictures import context_words, rows_near, typical_context
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
    flow: Flow,
    data: Dataset,
    path_of: Callable[[str], Path],
    title: str,
    options: PlotOptions = DEFAULT,
    name: str = "data",
) -> list[Path]:
    """Draws transport.png and paths.png of a flow of two columns, for a conditional flow at its `typical_context`.

    Args:
        name: the name of the data in the legend.

    Returns:
        The files that were written.
    """
    context, words, files = None, title, list[Path]()
    if flow.conditional:
        with warn_if_plotting_fails("transport and paths"):
            context = typical_context(flow, data)
            words = f"{title}, {context_words(flow, context)}"
        if context is None:
            return []
    with warn_if_plotting_fails("transport"), drawing(flow, TOLERANCE) as flow:
        _draw_transport(_Transport(flow, data, PANEL_MOMENTS, context), path_of("transport"), words, options)
        files += options.files(path_of("transport"))
    # densities along a path are drawn as lines, on which errors of TOLERANCE can be seen
    with warn_if_plotting_fails("paths"), drawing(flow) as flow:
        _draw_paths(_Transport(flow, data, PATH_MOMENTS, context), path_of("paths"), words, options, name)
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
    context: Tensor | None = None,
) -> None:
    """Writes an animation of n particles or images on their way from the base to the data.

    Args:
        paths: the files to write, .gif or .mp4.
        n: the number of particles or images; None: DOTS or IMAGES.
        label: the class of a conditional flow. None: images cycle through all classes with training rows, and points of
            two columns have the first of these classes.
        context: the context (1, k) of a flow with context columns. None: its `typical_context`.

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
        if flow.classes is not None and label is not None:
            context = flow.labels(label, flow.like.new_empty(1, 0))
        elif flow.conditional and context is None:
            context = typical_context(flow, data)
            title = f"{title}, {context_words(flow, context)}"
        transport = _Transport(flow, data, FRAMES, context)
        with status("moving samples"):
            states = transport.states(transport.latents(n or DOTS, temperature))
        check_samples(states[-1])
        animate_flow_2d(
            paths,
            data=transport.every_row,
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

    Args:
        context: for a conditional flow, one context (1, k) or label (1,).
    """

    def __init__(self, flow: Flow, data: Dataset, moments: int, context: Tensor | None) -> None:
        self.flow = flow
        self.context = None if context is None else flow.features(context.to(flow.like.device))
        self.trajectory = Trajectory(flow, moments)
        self.shown = self.trajectory.exact(moments)
        # the limits use the rows of all contexts, because figures start at the base, which is as wide as these rows
        self.every_row = flow.dequantized(first_test_samples(flow, data, POINTS)[0])
        self.data = self.every_row
        if context is not None:
            near = rows_near(flow, data, context.flatten()) if flow.context else _of_class(flow, data, int(context))
            self.data = flow.dequantized(near)
        self.columns = tuple(data.columns) or default_names(range(2))

    @property
    def names(self) -> list[str]:
        return [self.trajectory.name(moment) for moment in self.shown]

    def states(self, z: Tensor) -> Tensor:
        """Returns the positions (K, P, 2) that base points z (P, 2) have at the K moments."""
        z = z.to(self.flow.like)
        every = dict(zip(self.trajectory.moments, self.trajectory.states(z, self.features(z)), strict=True))
        return torch.stack([every[moment] for moment in self.shown])

    def latents(self, n: int, temperature: float = 1.0) -> Tensor:
        """Draws samples of the base, (n, 2)."""
        given = self.features(self.flow.like.new_empty(n, 0))
        return self.flow.base.given(given).sample(n, temperature=temperature, like=self.flow.like)

    def log_density(self, x: Tensor) -> Tensor:
        """Returns log p (K, G) at x (G, 2). It is -inf outside the range of the flow."""
        found = []
        with status("densities", total=len(self.shown), unit="moment") as progress:
            for moment in self.shown:
                found.append(evaluate_inside_range(self.flow, x, partial(self._density, moment=moment), -torch.inf))
                progress.advance()
        return torch.stack(found)

    def _density(self, x: Tensor, moment: Moment) -> Tensor:
        return self.trajectory.log_density(x, moment, self.features(x))

    def velocity(self, x: Tensor) -> Tensor:
        """Returns the velocities (K, G, 2) at x (G, 2)."""
        return torch.stack(
            [evaluate_inside_range(self.flow, x, partial(self._velocity, moment=m), 0.0, 2) for m in self.shown]
        )

    def _velocity(self, x: Tensor, moment: Moment) -> Tensor:
        v = self.trajectory.velocity(x, moment, self.features(x))
        assert v is not None
        return v

    def features(self, x: Tensor) -> Tensor | None:
        """Returns what the bijections receive for the context of each row of x (B, ...), see `Flow.features`."""
        return None if self.context is None else self.context.expand(len(x), *self.context.shape[1:])


def _of_class(flow: Flow, data: Dataset, label: int) -> Tensor:
    return first_test_samples(flow, data, POINTS, label)[0]


def _draw_transport(transport: _Transport, path: Path, title: str, options: PlotOptions) -> None:
    draw_transport(
        path,
        data=transport.every_row,
        names=transport.names,
        log_density=transport.log_density,
        velocity=transport.velocity if transport.trajectory.is_continuous else None,
        forward=transport.states,
        title=title,
        columns=transport.columns,
        options=options,
    )


def _draw_paths(transport: _Transport, path: Path, title: str, options: PlotOptions, name: str) -> None:
    particles = PARTICLES if transport.trajectory.is_continuous else min(STEP_PARTICLES, PARTICLES)
    z = transport.latents(particles).to(transport.flow.like)
    states, along = transport.trajectory.paths(z, transport.shown, transport.features(z))
    draw_paths(
        path,
        data=transport.data,
        states=states,
        log_densities=along,
        at=[sum(moment) for moment in transport.shown],
        axis=transport.trajectory.axis,
        title=title,
        columns=transport.columns,
        options=options,
        name=name,
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
    labels = flow.cycled_labels(len(z)) if flow.classes is not None and label is None else flow.labels(label, z)
    trajectory, show = Trajectory(flow, FRAMES), UnitRange(flow, data)
    with status("moving samples"):
        states = trajectory.states(z, labels)
    check_samples(states[-1])
    frames = torch.stack([show(x) for x in states])
    names = [trajectory.name(moment) for moment in trajectory.moments]
    animate_images(paths, names=names, frames=frames, levels=1, title=title, options=options)
