"""The divergence tr dv/dx of a velocity field: exact, or Hutchinson's estimate.

Both values are w sum_j <e_j, J e_j> with J = dv/dx. For the exact divergence, e_j are the d basis vectors, d is the
number of elements of an event, and w = 1. For Hutchinson's estimate (Hutchinson 1989; FFJORD, Grathwohl et al. 2019,
eq. 8), e_j are k random vectors with E[e e^T] = I, and w = 1/k.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowtrain.nn.velocity_field import Field, field_jvp
from flowtrain.utils.arguments import one_of, whole
from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.row_noise import first_row, gaussian_of, rademacher_of, random_bits


def rademacher(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draws -1 or 1 with equal probability, with the dtype and on the device of `like`."""
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype).mul_(2).sub_(1)


def gaussian(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draws standard normal numbers, with the dtype and on the device of `like`.

    The numbers are drawn in float32, so that flows in float32 and float64 get the same numbers.
    """
    return torch.randn(shape, dtype=torch.float32, device=like.device).to(like.dtype)


NOISES = {"rademacher": rademacher, "gaussian": gaussian}
# the same distributions, from the bits of `random_bits`
OF_BITS = {"rademacher": rademacher_of, "gaussian": gaussian_of}
TRACES = ("auto", "exact", "hutchinson")


@dataclass(frozen=True)
class Probes:
    """The tangents e of one solve. They are drawn once per solve and shared by all its nodes.

    If they were drawn at every evaluation, the integrand would be a different function at each stage. An adaptive
    solver would then see an error that no step size reduces, and would reject steps forever.

    Attributes:
        tangents: random tangents (k, B, *event), or the basis (d, 1, *event) for events of d elements.
        weight: w, which is 1 for the basis and 1/k for random tangents.
        noisy: whether the tangents are random and the divergence is an estimate.
        is_basis: whether the tangents are the basis.
    """

    tangents: Tensor
    weight: float
    noisy: bool = False
    is_basis: bool = False

    @property
    def event_dims(self) -> int:
        """The number of dimensions of an event: 1 for vectors, 3 for images."""
        return self.tangents.dim() - 2

    def contract(self, products: Tensor) -> Tensor:
        """Returns w times the sum over the tangents and the elements of an event: (k, ..., *event) -> (...)."""
        return self.weight * products.sum((0, *range(-self.event_dims, 0)))

    def divergence(self, e: Tensor, je: Tensor) -> Tensor:
        """Returns the divergence w sum_j <e_j, J e_j>, (*nodes, B), for e and J e as in `probe_jvps`."""
        if not self.is_basis or self.event_dims != 1 or torch.is_grad_enabled():
            return self.contract(e * je)
        # for the basis, the off-diagonal elements of J have a factor of 0
        return je.diagonal(dim1=0, dim2=-1).sum(-1)

    def of_rows(self, index: Tensor) -> "Probes":
        """Returns the probes of the rows at the positions `index` (n,)."""
        return replace(self, tangents=self.tangents[:, index]) if self.noisy else self

    @staticmethod
    def exact(x: Tensor) -> "Probes":
        """Returns the basis vectors for x (B, *event)."""
        event = x.shape[1:]
        return Probes(torch.eye(event.numel(), dtype=x.dtype, device=x.device).view(-1, 1, *event), 1.0, is_basis=True)

    @staticmethod
    def hutchinson(x: Tensor, noise: str, samples: int) -> "Probes":
        """Draws `samples` random tangents for each row of x (B, *event), with the global generator of x's device."""
        return Probes(NOISES[noise]((samples, *x.shape), x), 1 / samples, noisy=True)

    @staticmethod
    def of_numbered_rows(x: Tensor, noise: str, samples: int) -> "Probes":
        """Draws `samples` random tangents for each row of x (B, *event), that do not depend on the other rows.

        They depend on the number of the row, see `rows_from`, and on a key, which is drawn with the CPU's global
        generator.
        """
        key = int(torch.randint(2**62, ()))
        bits = random_bits(key, first_row(), len(x), samples * x.shape[1:].numel(), x.device)
        tangents = OF_BITS[noise](bits).to(x.dtype).view(len(x), samples, *x.shape[1:]).transpose(0, 1).contiguous()
        return Probes(tangents, 1 / samples, noisy=True)


def divergence(field: nn.Module, t: Tensor, x: Tensor, probes: Probes) -> tuple[Tensor, Tensor]:
    """Returns v and tr dv/dx, or its estimate.

    This function is for users and tests. A solve calls `probe_jvps`, because regularizers need J e too.

    Args:
        field: the velocity field.
        t: broadcasts against (*nodes, B).
        x: (*nodes, B, *event).
        probes: the tangents.

    Returns:
        v (*nodes, B, *event) and the divergence (*nodes, B).

    Raises:
        ConfigError: x are images and the field is for vectors, or the reverse.

    Example:
        >>> class Shear(nn.Module):
        ...     def forward(self, t, x):
        ...         return x @ torch.tensor([[3.0, 1.0], [0.0, -1.0]])
        >>> x = torch.ones(1, 2)
        >>> divergence(Shear(), torch.tensor(0.0), x, Probes.exact(x))[1]
        tensor([2.])
    """
    v, e, je = probe_jvps(field, t, x, probes)
    return v, probes.divergence(e, je)


def probe_jvps(field: nn.Module, t: Tensor, x: Tensor, probes: Probes) -> tuple[Tensor, Tensor, Tensor]:
    """Returns v, the tangents e and J e. `divergence` has the same arguments.

    e broadcasts against (k, *nodes, B, *event), which is the shape of J e.

    Raises:
        ConfigError: x are images and the field is for vectors, or the reverse.
    """
    event_dims = probes.event_dims
    if isinstance(field, Field) and field.event_dims != event_dims:
        raise ConfigError(
            f"{type(field).__name__} needs samples with {field.event_dims} dimension(s), not the shape "
            f"{tuple(x.shape[-event_dims:])}: use a field for this shape, or reshape the samples"
        )
    nodes = x.dim() - event_dims - 1
    k, *rest = probes.tangents.shape
    e = probes.tangents.view(k, *(1,) * nodes, *rest)
    v, je = field_jvp(field, t, x, e, event_dims)
    return v, e, je


@dataclass(frozen=True)
class TraceRule:
    """The choice between the exact trace and Hutchinson's estimate, in training mode and in evaluation mode.

    `auto` is exact for samples of up to 8 elements in training and up to 128 at evaluation, else Hutchinson.

    Attributes:
        train, evaluate: auto | exact | hutchinson.
        noise: rademacher | gaussian, the distribution of the random tangents.
        noise_samples: k, the number of random tangents.

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
        """Returns the probes for a solve that starts at x (B, *event).

        At evaluation, the probes of a row depend on its number and not on the other rows. Inside the transforms of
        `torch.func` they are drawn for the batch, as in training.

        Raises:
            ConfigError: x has no batch dimension or no event dimension.
        """
        if x.dim() < 2:
            raise ConfigError(
                f"a continuous flow needs a batch of vectors (B, d) or images (B, C, H, W), not the shape "
                f"{tuple(x.shape)}: give one sample per row"
            )
        if self.is_exact(x.shape[1:].numel(), training):
            return Probes.exact(x)
        if training or transforms_active() or torch.compiler.is_exporting():
            return Probes.hutchinson(x, self.noise, self.noise_samples)
        return Probes.of_numbered_rows(x, self.noise, self.noise_samples)
