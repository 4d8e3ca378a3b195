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
    """Points on paths, with the velocity and its Jacobian-vector products.

    Attributes:
        field: v(t, x).
        t: times of the points, broadcasting against (*nodes, B).
        x, v: the points and their velocities, (*nodes, B, *event).
        je: dv/dx e for each probe e, (k, *nodes, B, *event).
        probes: the probes e of the trace, which are the basis or random tangents.
    """

    field: nn.Module
    t: Tensor
    x: Tensor
    v: Tensor
    je: Tensor
    probes: Probes

    def squared(self, y: Tensor) -> Tensor:
        """Returns |y|^2 for each point, (*nodes, B). y has the shape of x."""
        return y.square().sum(tuple(range(-self.probes.event_dims, 0)))


# Integral: the integrand q of a path integral, (*nodes, B). Penalty: a scalar function of a field
Integral = Callable[[PathPoint], Tensor]
Penalty = Callable[[nn.Module], Tensor]


def kinetic(at: PathPoint) -> Tensor:
    """Returns q = |v|^2, (*nodes, B)."""
    return at.squared(at.v)


def jacobian(at: PathPoint) -> Tensor:
    """Returns q = |dv/dx|_F^2, (*nodes, B), or its estimate. It is w times the sum of |dv/dx e|^2 over the probes."""
    return at.probes.contract(at.je.square())


def squared_acceleration(at: PathPoint) -> Tensor:
    """Returns q = |dv/dt + dv/dx v|^2, (*nodes, B)."""
    return at.squared(acceleration(at.field, at.t, at.x, at.v, at.probes.event_dims))


# the path integrals, by the names of their weights
PATHS: Mapping[str, Integral] = {"kinetic": kinetic, "jacobian": jacobian, "acceleration": squared_acceleration}


@dataclass(frozen=True)
class Regularizer:
    """Regularization of continuous flows. It adds sum_r w_r mean int_0^1 q_r dt + w sum_l s(W_l)^2 to the loss.

    The loss is in nats per sample. A subclass adds terms to `integrals` or `penalties`. Each term has the name of an
    attribute, which is its weight.

    Attributes:
        kinetic: weight of q = |v|^2, optimal transport (Finlay et al. 2020, How to train your neural ODE, eq. 5).
        jacobian: weight of q = |dv/dx|_F^2 (ibid., eq. 10). If the trace is estimated, q is estimated with its probes.
        acceleration: weight of q = |dv/dt + dv/dx v|^2, the squared second derivative of a path (Kelly et al. 2020,
            Learning differential equations that are easy to solve, eq. 1, K = 2). It is 0 for straight paths with
            constant speed.
        spectral: weight of s(W)^2, the squared largest singular value of each weight W of the field. The weight of a
            convolution is a matrix (n_out, n_in kh kw) (Yoshida and Miyato 2017, Spectral norm regularization, eq. 5).
        end_time: b in [0, 1). In training, paths end at T ~ U(1 - b, 1 + b) (Ghosh et al. 2020, STEER, eq. 6).

    Raises:
        ConfigError: a weight below 0, or an end_time outside of [0, 1).
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
            raise ConfigError(f"regularizer.end_time={self.end_time}: give a number of at least 0 and below 1")

    def integrals(self) -> Mapping[str, Integral]:
        """Returns the integrand q of each available path integral, by the name of its weight."""
        return PATHS

    def penalties(self) -> Mapping[str, Penalty]:
        """Returns each available penalty on a field, by the name of its weight."""
        return {"spectral": spectral}

    @property
    def active(self) -> bool:
        """Whether any weight or the end time is not zero."""
        return bool(self.paths or self.on_fields or self.end_time)

    @property
    def paths(self) -> dict[str, Integral]:
        """The path integrals with a nonzero weight."""
        return self._weighted(self.integrals())

    @property
    def on_fields(self) -> dict[str, Penalty]:
        """The penalties with a nonzero weight."""
        return self._weighted(self.penalties())

    def _weighted(self, terms: Mapping[str, Any]) -> dict[str, Any]:
        return {name: term for name, term in terms.items() if getattr(self, name)}

    def without_paths(self) -> "Regularizer":
        """Returns this regularizer without path integrals and end time, for losses that solve no ODE."""
        return replace(self, end_time=0.0, **dict.fromkeys(self.paths, 0.0))

    def options(self, options: SolveOptions) -> SolveOptions:
        """Returns `options` with the path integrals and the random end time, for a training pass."""
        return replace(options, integrals=self.paths, end_time=self.end_time) if self.active else options


def integrands(
    field: nn.Module, t: Tensor, x: Tensor, probes: Probes, paths: Mapping[str, Integral]
) -> tuple[Tensor, Tensor]:
    """Returns v and q (*nodes, B, 1 + len(paths)). q contains the divergence and the integrands of `paths`.

    Shapes: as in `flowtrain.nn.divergence.divergence`.
    """
    v, e, je = probe_jvps(field, t, x, probes)
    at = PathPoint(field, t, x, v, je, probes)
    return v, torch.stack([probes.divergence(e, je), *(q(at) for q in paths.values())], -1)


def acceleration(field: nn.Module, t: Tensor, x: Tensor, v: Tensor, event_dims: int) -> Tensor:
    """Returns dv/dt + dv/dx v, the derivative of v along its path. Shapes: as in `integrands`."""
    shape = x.shape
    if not isinstance(field, Field):
        # other modules need x (rows, *event)
        outer = shape[: x.dim() - event_dims]
        x, v = (y.reshape(-1, *shape[len(outer) :]) for y in (x, v))
        t = t.expand(outer).reshape(-1)
    along: Tensor = torch.func.jvp(field, (t, x), (torch.ones_like(t), v))[1]
    return along.reshape(shape)


def spectral(field: nn.Module) -> Tensor:
    """Returns the sum of the squared largest singular values of the field's weights, as matrices (n_out, ...)."""
    weights = [p for p in field.parameters() if p.dim() > 1 and p.requires_grad]
    return torch.stack([torch.linalg.matrix_norm(w.flatten(1), ord=2).square() for w in weights]).sum()
