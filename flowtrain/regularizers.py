"""Penalties that keep a continuous flow easy to solve: on its paths, on its layers, and a random end time."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from flowtrain.checks import number
from flowtrain.collecting import Collector
from flowtrain.divergence import Probes, pushed
from flowtrain.errors import ConfigError
from flowtrain.fields.base import Field

# the path integrals, by the names of their weights
PATHS = ("kinetic", "jacobian", "acceleration")


@dataclass(frozen=True)
class Regularizer:
    """What a training loss has added to its nats per sample: sum_r w_r mean int_0^1 q_r dt + w sum_l s(W_l)^2.

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

    @property
    def active(self) -> bool:
        return any(asdict(self).values())

    @property
    def paths(self) -> tuple[str, ...]:
        """The path integrals that are asked for."""
        return tuple(name for name in PATHS if getattr(self, name))

    def end(self) -> float:
        """Where time ends in one solve of training: 1, or drawn from the global generator of the CPU."""
        return 1.0 if not self.end_time else 1 + self.end_time * (2 * float(torch.rand(())) - 1)


def integrands(field: nn.Module, t: Tensor, x: Tensor, probes: Probes, paths: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(v, q) with q (*nodes, B, 1 + len(paths)): the divergence, and the integrand of each of `paths`.

    Shapes: as in `flowtrain.divergence.divergence`.
    """
    v, e, je = pushed(field, t, x, probes)
    event = tuple(range(-probes.event_dims, 0))
    columns = [probes.contract(e * je)]
    for name in paths:
        if name == "jacobian":
            columns.append(probes.contract(je.square()))
        else:
            along = v if name == "kinetic" else acceleration(field, t, x, v, probes.event_dims)
            columns.append(along.square().sum(event))
    return v, torch.stack(columns, -1)


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


# the path integrals (B, len(paths)) of every solve inside; only there are they taken at all
record_paths: Collector[Tensor] = Collector("paths")
