"""Regularizers of a continuous flow: kinetic energy, Jacobian norm, acceleration, spectral norm, random end time."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowtrain.nn.divergence import Probes, probe_jvps
from flowtrain.nn.velocity_field import Field
from flowtrain.ode import SolveOptions
from flowtrain.utils.arguments import number
from flowtrain.utils.errors import ConfigError


class PathPoint(NamedTuple):
    """Points of paths, and what is known of the field there.

    Attributes:
        field: v(t, x).
        t: their times, broadcasting against (*nodes, B).
        x, v: the points and their velocities, (*nodes, B, *event).
        je: dv/dx e for each of the probes e, (k, *nodes, B, *event).
        probes: of the trace: the basis, or random tangents.
    """

    field: nn.Module
    t: Tensor
    x: Tensor
    v: Tensor
    je: Tensor
    probes: Probes

    def squared(self, y: Tensor) -> Tensor:
        """|y|^2 of each point, (*nodes, B), for y like x."""
        return y.square().sum(tuple(range(-self.probes.event_dims, 0)))


# q of a path integral, (*nodes, B), and a penalty on a field
Integral = Callable[[PathPoint], Tensor]
Penalty = Callable[[nn.Module], Tensor]


def kinetic(at: PathPoint) -> Tensor:
    """q = |v|^2, (*nodes, B)."""
    return at.squared(at.v)


def jacobian(at: PathPoint) -> Tensor:
    """q = |dv/dx|_F^2, (*nodes, B), or its estimate: the sum over the probes of w |dv/dx e|^2."""
    return at.probes.contract(at.je.square())


def bending(at: PathPoint) -> Tensor:
    """q = |dv/dt + dv/dx v|^2, (*nodes, B)."""
    return at.squared(acceleration(at.field, at.t, at.x, at.v, at.probes.event_dims))


# the path integrals, by the names of their weights
PATHS: Mapping[str, Integral] = {"kinetic": kinetic, "jacobian": jacobian, "acceleration": bending}


@dataclass(frozen=True)
class Regularizer:
    """What a training loss has added to its nats per sample: sum_r w_r mean int_0^1 q_r dt + w sum_l s(W_l)^2.

    A subclass adds terms of its own: to `integrals` or to `penalties`, by the name of the field that is their weight.

    Attributes:
        kinetic: weight of q = |v|^2 (Finlay et al. 2020, How to train your neural ODE, eq. 5: optimal transport).
        jacobian: of q = |dv/dx|_F^2 (ibid., eq. 10), estimated with the probes of the trace where that is.
        acceleration: of q = |dv/dt + dv/dx v|^2, the second derivative of a path (Kelly et al. 2020, Learning
            differential equations that are easy to solve, eq. 1, K = 2): 0 for straight lines of constant speed.
        spectral: of s(W)^2, the squared largest singular value of each weight of the field, of a convolution as the
            matrix (n_out, n_in kh kw) (Yoshida and Miyato 2017, Spectral norm regularization, eq. 5).
        end_time: b in [0, 1): paths of training end at T ~ U(1 - b, 1 + b) (Ghosh et al. 2020, STEER, eq. 6).

    Raises:
        ConfigError: a weight below 0, or an end time that is no such b.
    """

    kinetic: float = 0.0
    jacobian: float = 0.0
    acceleration: float = 0.0
    spectral: float = 0.0
    end_time: float = 0.0

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            number(f"regularizer.{key}", value, inclusive=True)
        if self.end_time >= 1:
            raise ConfigError(f"regularizer.end_time={self.end_time}: give a number below 1, so that time has an end")

    def integrals(self) -> Mapping[str, Integral]:
        """q of every path integral there is, by the name of its weight."""
        return PATHS

    def penalties(self) -> Mapping[str, Penalty]:
        """Every penalty on a field there is, by the name of its weight."""
        return {"spectral": spectral}

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.paths or self.on_fields or self.end_time)

    @property
    def paths(self) -> dict[str, Integral]:
        """The path integrals that are asked for."""
        return self._weighted(self.integrals())

    @property
    def on_fields(self) -> dict[str, Penalty]:
        """The penalties on fields that are asked for."""
        return self._weighted(self.penalties())

    def _weighted(self, terms: Mapping[str, Any]) -> dict[str, Any]:
        return {name: term for name, term in terms.items() if getattr(self, name)}

    def without_paths(self) -> "Regularizer":
        """What is left of it where no path is solved."""
        return replace(self, end_time=0.0, **dict.fromkeys(self.paths, 0.0))

    def options(self, options: SolveOptions) -> SolveOptions:
        """The options of a training pass that returns the path integrals and draws the end time."""
        return replace(options, integrals=self.paths, end_time=self.end_time) if self.active else options


def integrands(
    field: nn.Module, t: Tensor, x: Tensor, probes: Probes, paths: Mapping[str, Integral]
) -> tuple[Tensor, Tensor]:
    """(v, q) with q (*nodes, B, 1 + len(paths)): the divergence, and the integrand of each of `paths`.

    Shapes: as in `flowtrain.nn.divergence.divergence`.
    """
    v, e, je = probe_jvps(field, t, x, probes)
    at = PathPoint(field, t, x, v, je, probes)
    return v, torch.stack([probes.contract(e * je), *(q(at) for q in paths.values())], -1)


def acceleration(field: nn.Module, t: Tensor, x: Tensor, v: Tensor, event_dims: int) -> Tensor:
    """dv/dt + dv/dx v, the derivative of v along its own path; shapes as in `integrands`."""
    shape = x.shape
    if not isinstance(field, Field):
        # any other module takes rows
        outer = shape[: x.dim() - event_dims]
        x, v = (y.reshape(-1, *shape[len(outer) :]) for y in (x, v))
        t = t.expand(outer).reshape(-1)
    along: Tensor = torch.func.jvp(field, (t, x), (torch.ones_like(t), v))[1]
    return along.reshape(shape)


def spectral(field: nn.Module) -> Tensor:
    """The sum of squared largest singular values of the field's weights, each as a matrix of its outputs."""
    weights = [p for p in field.parameters() if p.dim() > 1 and p.requires_grad]
    return torch.stack([torch.linalg.matrix_norm(w.flatten(1), ord=2).square() for w in weights]).sum()
