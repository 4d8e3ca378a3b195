"""The divergence of a field, tr dv/dx: exact with basis tangents, or Hutchinson's estimate with random ones.

Both are sum_j w <e_j, J e_j>. Exact: the d basis vectors, d the elements of an event, w = 1. Hutchinson
(1989), used for flows in FFJORD (Grathwohl et al. 2019, eq. 8): k random e with E[e e^T] = I, w = 1/k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtrain.nn.velocity_field import Field, field_jvp
from flowtrain.utils.arguments import one_of, whole
from flowtrain.utils.errors import ConfigError


def rademacher(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """-1 or 1 with equal probability, of that shape, with the dtype and on the device of `like`."""
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype).mul_(2).sub_(1)


def gaussian(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal, likewise; drawn in float32, so that a flow in float64 has the same as one in float32."""
    return torch.randn(shape, dtype=torch.float32, device=like.device).to(like.dtype)


NOISES = {"rademacher": rademacher, "gaussian": gaussian}
TRACES = ("auto", "exact", "hutchinson")


@dataclass(frozen=True)
class Probes:
    """The tangents of one solve, drawn ONCE for it and shared by all its nodes.

    Redrawn at every evaluation they would make the integrand a different function at each stage: an adaptive
    solver then sees an error that no step size cures, and rejects for ever.

    Attributes:
        tangents: (k, B, *event), or (d, 1, *event) for the basis, d the elements of an event.
        weight: 1, or 1/k.
        noisy: whether they are random, and the divergence an estimate.
    """

    tangents: Tensor
    weight: float
    noisy: bool = False

    @property
    def event_dims(self) -> int:
        """How many dimensions an event has: 1 for vectors, 3 for images."""
        return self.tangents.dim() - 2

    def contract(self, products: Tensor) -> Tensor:
        """w sum_j over the tangents, and over the elements of an event: (k, ..., *event) -> (...)."""
        return self.weight * products.sum((0, *range(-self.event_dims, 0)))

    @staticmethod
    def exact(x: Tensor) -> "Probes":
        """The basis, for x (B, *event)."""
        event = x.shape[1:]
        return Probes(torch.eye(event.numel(), dtype=x.dtype, device=x.device).view(-1, 1, *event), 1.0)

    @staticmethod
    def hutchinson(x: Tensor, noise: str, samples: int) -> "Probes":
        """`samples` random tangents for each row of x (B, *event), from the global generator of x's device."""
        return Probes(NOISES[noise]((samples, *x.shape), x), 1 / samples, noisy=True)


def divergence(field: nn.Module, t: Tensor, x: Tensor, probes: Probes) -> tuple[Tensor, Tensor]:
    """(v, tr dv/dx or its estimate); x (*nodes, B, *event) with t broadcasting against (*nodes, B).

    For users who look at a field, and for tests: a solve takes `probe_jvps`, of which penalties on J e have need too.

    Raises:
        ConfigError: a field of vectors was given images, or the reverse.

    Example:
        >>> class Shear(nn.Module):
        ...     def forward(self, t, x):
        ...         return x @ torch.tensor([[3.0, 1.0], [0.0, -1.0]])
        >>> x = torch.ones(1, 2)
        >>> divergence(Shear(), torch.tensor(0.0), x, Probes.exact(x))[1]
        tensor([2.])
    """
    v, e, je = probe_jvps(field, t, x, probes)
    return v, probes.contract(e * je)


def probe_jvps(field: nn.Module, t: Tensor, x: Tensor, probes: Probes) -> tuple[Tensor, Tensor, Tensor]:
    """(v, e, J e) for the probes e, shaped (k, *nodes, B, *event) or so as to broadcast; shapes as in `divergence`.

    Raises:
        ConfigError: a field of vectors was given images, or the reverse.
    """
    event_dims = probes.event_dims
    if isinstance(field, Field) and field.event_dims != event_dims:
        raise ConfigError(
            f"{type(field).__name__} takes samples of {field.event_dims} dimension(s); it was given samples of shape "
            f"{tuple(x.shape[-event_dims:])}: use a field for such samples, or reshape them"
        )
    nodes = x.dim() - event_dims - 1
    k, *rest = probes.tangents.shape
    e = probes.tangents.view(k, *(1,) * nodes, *rest)
    v, je = field_jvp(field, t, x, e, event_dims)
    return v, e, je


@dataclass(frozen=True)
class TraceRule:
    """Which probes a solve uses: `train` while the module trains, `evaluate` otherwise.

    `auto` is exact up to d = 8 elements of a sample in training and up to d = 128 at evaluation, else Hutchinson.

    Attributes:
        train, evaluate: auto | exact | hutchinson.
        noise: rademacher | gaussian, of Hutchinson's estimate.
        noise_samples: k, how many tangents it takes.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> rule = TraceRule(train="hutchinson", noise_samples=4)
        >>> rule.draw(torch.zeros(5, 3), training=True).tangents.shape
        torch.Size([4, 5, 3])
        >>> rule.draw(torch.zeros(5, 3), training=False).tangents.shape  # exact: the basis
        torch.Size([3, 1, 3])
    """

    train: str = "auto"
    evaluate: str = "auto"
    noise: str = "rademacher"
    noise_samples: int = 1

    def __post_init__(self) -> None:
        one_of("model.trace", self.train, TRACES)
        one_of("model.eval_trace", self.evaluate, TRACES)
        one_of("model.noise", self.noise, NOISES)
        whole("model.noise_samples", self.noise_samples)

    def is_exact(self, d: int, training: bool) -> bool:
        """Whether the divergence is exact for samples of d elements."""
        rule = self.train if training else self.evaluate
        return rule == "exact" or (rule == "auto" and d <= (8 if training else 128))

    def draw(self, x: Tensor, training: bool) -> Probes:
        """The probes of one solve that starts at x (B, *event).

        Raises:
            ConfigError: x has no batch dimension or no event dimension.
        """
        if x.dim() < 2:
            raise ConfigError(
                f"a continuous flow takes a batch of vectors (B, d) or images (B, C, H, W); it was given "
                f"{tuple(x.shape)}: give one row a sample"
            )
        if self.is_exact(x.shape[1:].numel(), training):
            return Probes.exact(x)
        return Probes.hutchinson(x, self.noise, self.noise_samples)
