"""Velocity fields that are periodic in some columns, for angles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.nn.column_networks import is_hooked
from flowtrain.nn.mlp_field import MLPField, MLPRecorder
from flowtrain.nn.mlp_kernels import MLPTape
from flowtrain.utils.circle import circular_indices


class PeriodicField(MLPField):
    """A velocity field for vectors that has the period 2 pi in circular columns.

    The first layer receives y(x), which consists of the real columns, then the cosines and then the sines of the
    circular columns. The field moves angles on the real line. Its flow commutes with shifts by 2 pi, so it is
    also a flow of the circle (Falorsi 2021, Continuous normalizing flows on manifolds).

    Args:
        d: dimension of x.
        circular: the indices of the circular columns.
        hidden, layer, activation, classes, init_scale: see `MLPField`. The initial weights of the cosines and
            sines are twice as large, because their values lie in [-1, 1], and standardized values mostly in [-2, 2].

    Raises:
        ConfigError: an invalid index, or a setting that `MLPField` does not allow.

    Example:
        >>> field = PeriodicField(2, [1], hidden=[8])
        >>> x = torch.tensor([[0.3, 0.5], [0.3, 0.5 + 2 * torch.pi]])
        >>> v, je = field.jvp(torch.tensor(0.0), x, torch.eye(2).unsqueeze(1))
        >>> v.shape, je.shape
        (torch.Size([2, 2]), torch.Size([2, 2, 2]))
    """

    real: Tensor
    angles: Tensor

    def __init__(
        self,
        d: int,
        circular: Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        layer: str = "concatsquash",
        activation: str = "tanh",
        classes: int | None = None,
        init_scale: float | None = 1.0,
    ) -> None:
        angles = circular_indices(circular, d, "model.circular")
        super().__init__(d, hidden, layer, activation, classes, init_scale, n_in=d + len(angles))
        real = [i for i in range(d) if i not in angles]
        # the arguments determine the indices, so checkpoints do not need them
        self.register_buffer("real", torch.tensor(real, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("angles", torch.tensor(angles, dtype=torch.int64, device="cpu"), persistent=False)
        if init_scale is not None:
            with torch.no_grad():
                self.layers[0].linear.weight[:, len(real) :].mul_(2)

    def lifted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y(x) (..., n_in), and the cosines and sines of the circular columns."""
        angles = x[..., self.angles]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([x[..., self.real], cos, sin], -1), cos, sin

    def forward(self, t: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return super().forward(t, self.lifted(x)[0], shift)

    def jvp(self, t: Tensor, x: Tensor, tangents: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, cos, sin = self.lifted(x)
        along = tangents[..., self.angles]
        # d cos(x) = -sin(x) dx, and d sin(x) = cos(x) dx
        turned = torch.cat([-sin * along, cos * along], -1)
        straight = tangents[..., self.real]
        e = torch.cat([straight.expand(*turned.shape[:-1], straight.shape[-1]), turned], -1)
        return super().jvp(t, y, e, shift)

    def recorder(self, shift: Tensor | None = None) -> "PeriodicRecorder | None":
        # a subclass may compute another function
        own = type(self) is PeriodicField and self.has_known_layers() and not is_hooked(self)
        return PeriodicRecorder(self, shift) if own else None


class PeriodicRecorder(MLPRecorder):
    """Makes tapes of a periodic field; see `flowtrain.ode.tape.Recorder`."""

    field: PeriodicField

    def record(self, times: Tensor, keep: bool) -> "PeriodicTape":  # type: ignore[override]
        return PeriodicTape(self.field, super().record(times, keep))

    def gradients(self, tapes: Sequence["PeriodicTape"]) -> list[Tensor | None]:  # type: ignore[override]
        return super().gradients([tape.of_layers for tape in tapes])


class PeriodicTape:
    """Evaluations of a periodic field, one node at a time; see `flowtrain.ode.tape.Tape`.

    Args:
        field: the field.
        of_layers: a tape of the layers, which are a function of y(x).
    """

    def __init__(self, field: PeriodicField, of_layers: MLPTape) -> None:
        self.field, self.of_layers = field, of_layers
        # the cosines and sines of each node
        self.turns: dict[int, tuple[Tensor, Tensor]] = {}

    def velocity(self, i: int, x: Tensor) -> Tensor:
        """Returns v (B, d) of node i at x (B, d)."""
        y, *turns = self.field.lifted(x)
        if self.of_layers.keep:
            self.turns[i] = turns[0], turns[1]
        return self.of_layers.velocity(i, y)

    def vjp(self, i: int, cotangent: Tensor) -> Tensor:
        """Returns cotangent^T dv/dx of node i, (B, d)."""
        at_y = self.of_layers.vjp(i, cotangent)
        cos, sin = self.turns[i]
        at_real, at_cos, at_sin = torch.split(at_y, [len(self.field.real), cos.shape[1], cos.shape[1]], 1)
        at_x = torch.empty_like(cotangent)
        at_x[:, self.field.real] = at_real
        at_x[:, self.field.angles] = cos * at_sin - sin * at_cos
        return at_x
