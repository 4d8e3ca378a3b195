"""FFJORD: continuous flows with free-form fields (Grathwohl et al. 2019).

Example:
    >>> import torch
    >>> flow = ffjord(2, hidden=[16])
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # a standard normal before training
    -1.8379
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flowtrain.bases import NormalUniform
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.circular import WrapAngles
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.scale import ActNorm
from flowtrain.bijections.squeeze import FactorOut, Squeeze
from flowtrain.flow import Flow
from flowtrain.models.multiscale import Size, conditioned, from_data, halved, of_images, over_images
from flowtrain.nn.conv_field import ConvField
from flowtrain.nn.divergence import TraceRule
from flowtrain.nn.mlp_field import MLPField
from flowtrain.nn.periodic_field import PeriodicField
from flowtrain.nn.velocity_field import Field
from flowtrain.ode import Solver, ode_solver
from flowtrain.utils.arguments import flag, shape_of, whole
from flowtrain.utils.circle import circular_indices
from flowtrain.utils.errors import ConfigError


def ffjord(
    event_shape: int | Sequence[int],
    *,
    solver: Solver | None = None,
    field: str = "concatsquash",
    hidden: Sequence[int] = (64, 64, 64),
    activation: str = "tanh",
    init_scale: float | None = 1.0,
    flows: int = 1,
    scales: int | None = None,
    full_size: bool = True,
    positional_bias: bool = False,
    actnorm: bool = True,
    conditional: bool = False,
    classes: int | None = None,
    context: int | None = None,
    trace: str = "auto",
    eval_trace: str = "auto",
    noise: str = "rademacher",
    noise_samples: int = 1,
    circular: Sequence[int] = (),
) -> Flow:
    """FFJORD (Grathwohl et al. 2019): continuous flows with MLP fields for vectors or convolutional fields for images.

    Args:
        event_shape: d, (d,) or (C, H, W).
        solver: the ODE solver of all continuous bijections, from `flowtrain.ode.ode_solver`. None: an adaptive
            Dormand-Prince 5(4) with the defaults of `ode_solver`.
        field: concatsquash | concat | time_embedding, the way in which the velocity field depends on t.
        hidden: for vectors, the widths of the MLP. For images, the channels of the hidden 3x3 convolutions.
        activation: the activation of the fields, see `MLPField`.
        init_scale: for vectors, the scale of the initial weights of the first layer, see `MLPField`. None: the default
            of torch.
        flows: the number of continuous bijections. For images, this number at each size and number of channels.
        scales: the number of times that images are halved. None: images are halved while both sides are
            even and at least 8.
        full_size: for images, whether there are also flows at the full size, before the first squeeze.
        positional_bias: for images, whether the fields have a bias for each pixel.
        actnorm: for images, whether there is an ActNorm of each pixel at the data end, and an ActNorm of each channel
            after each flow.
        conditional: whether the flow is p(x | label). The label is then an input of the fields.
        classes: the number of labels 0 .. classes - 1. It has an effect only if `conditional`.
        context: the number of real features c of a flow p(x | c), in place of labels. None: no context.
        trace, eval_trace, noise, noise_samples: exact or estimated divergence, see `flowtrain.nn.TraceRule`.
        circular: for vectors, the indices of columns that are angles in radians. The fields are periodic in them, see
            `PeriodicField`. Their base is uniform on [-pi, pi), and samples are wrapped to [-pi, pi).

    Returns:
        An untrained flow in training mode. `flowtrain.train` trains it.

    Raises:
        ConfigError: `solver` is not a Solver, `conditional` without `classes` or together with `context`, circular
            columns of images, or a setting out of range.
    """
    event_shape = shape_of(event_shape)
    if not isinstance(solver, Solver | None):
        raise ConfigError(f"solver={solver!r}: give a solver, such as flowtrain.ode.ode_solver('tsit5')")
    size, kind = conditioned("ffjord", flag("model.conditional", conditional), classes, context)
    made = Flows(
        solver=ode_solver() if solver is None else solver,
        rule=TraceRule(trace, eval_trace, noise, noise_samples),
        field=field,
        hidden=hidden,
        activation=activation,
        flows=whole("model.flows", flows),
        full_size=flag("model.full_size", full_size),
        positional_bias=flag("model.positional_bias", positional_bias),
        actnorm=flag("model.actnorm", actnorm),
        classes=size,
    )
    if of_images("ffjord", event_shape, least=1):
        if circular:
            raise ConfigError(f"model.circular={circular}: only vectors have circular columns, but these are images")
        return over_images(event_shape, made.scale, scales, made.actnorm, kind)
    d = event_shape[0]
    settings = hidden, field, activation, made.classes, init_scale
    if not circular:
        return Flow(event_shape, Chain(made.flow(MLPField(d, *settings)) for _ in range(flows)), **kind)
    angles = circular_indices(circular, d, "model.circular")
    stack = (made.flow(PeriodicField(d, angles, *settings)) for _ in range(flows))
    # an ODE moves angles on the real line, so angles are wrapped on the side of the base and on the side of the data
    parts = [WrapAngles(d, angles), *stack, WrapAngles(d, angles)]
    return Flow(NormalUniform(d, angles), Chain(parts), **kind)


@dataclass(frozen=True)
class Flows:
    """The settings of the continuous bijections of a model. The methods build bijections for vectors and for images."""

    solver: Solver
    rule: TraceRule
    field: str
    hidden: Sequence[int]
    activation: str
    flows: int
    full_size: bool
    positional_bias: bool
    actnorm: bool
    classes: int | None

    def flow(self, field: Field) -> Continuous:
        """Builds a continuous flow with this field."""
        return Continuous(field, self.solver, self.rule)

    def at(self, channels: int, size: Size) -> list[Bijection]:
        """Builds the flows for images of `channels` and `size`, listed from data to base."""
        places = size if self.positional_bias else None
        parts: list[Bijection] = []
        for _ in range(self.flows):
            field = ConvField(channels, self.hidden, self.field, self.activation, classes=self.classes, size=places)
            parts += [self.flow(field), *([ActNorm(channels)] if self.actnorm else [])]
        return parts

    def scale(self, channels: int, size: Size, times: int, squeezed: bool = False) -> Bijection:
        """Builds one scale of images: flows, a squeeze, flows, and the next scale for half of the channels.

        The other half of the channels is factored out. The last scale has only flows (FFJORD, appendix B.1, and the
        multi-scale model of its code).

        Args:
            channels, size: of the images at this scale.
            times: the number of squeezes that follow.
            squeezed: whether this is not the first scale.
        """
        here = self.at(channels, size) if squeezed or self.full_size or not times else []
        if not times:
            return from_data(here)
        half = halved(size)
        rest = FactorOut(self.scale(2 * channels, half, times - 1, squeezed=True))
        return from_data([*here, Squeeze(from_data([*self.at(4 * channels, half), rest]))])
