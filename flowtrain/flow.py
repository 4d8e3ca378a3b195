"""A flow: a base density and a bijection. log p(x) = log p0(z) + log|det dz/dx|, z = inverse(x)."""

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.errors import FlowtrainError
from flowtrain.solvers import History, Solver


class Flow(nn.Module):
    """A density over samples of `event_shape` with a standard normal base.

    Args:
        event_shape: shape of one sample.
        bijection: from base to data.

    Example:
        >>> import torch
        >>> from flowtrain.bijections.affine import Affine
        >>> flow = Flow((2,), Affine(2))
        >>> round(float(flow.log_prob(torch.zeros(1, 2))), 4)  # -log(2 pi)
        -1.8379
    """

    def __init__(self, event_shape: tuple[int, ...], bijection: Bijection) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.bijection = bijection

    @property
    def solver(self) -> Solver | None:
        """The ODE solver of a continuous flow; None for a discrete one."""
        parts = (getattr(m, "solver", None) for m in self.bijection.modules())
        return next((s for s in parts if isinstance(s, Solver)), None)

    @property
    def histories(self) -> list[History]:
        """What past solves left for the next ones: part of the state of a training run, not of the model."""
        found: list[dict[bool, History]] = [getattr(m, "histories", {}) for m in self.bijection.modules()]
        return [h for one in found for h in one.values()]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), for x (B, *event_shape) in data units.

        Raises:
            FlowtrainError: x of another shape.
        """
        z, log_det = self.bijection.inverse(self._checked(x, "x"))
        return self.base_log_prob(z) + log_det

    def base_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I), (B,)."""
        z = z.flatten(1)
        return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))

    def forward(self, z: Tensor) -> Tensor:
        """Base to data: x (B, *event_shape)."""
        return self.bijection.map_forward(self._checked(z, "z"))

    def inverse(self, x: Tensor) -> Tensor:
        """Data to base: z (B, *event_shape)."""
        return self.bijection.map_inverse(self._checked(x, "x"))

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, chunk: int = 10_000) -> Tensor:
        """n samples (n, *event_shape) in data units, from the global generator of the flow's device.

        `temperature` multiplies the base noise: 1 samples the density, below 1 stays nearer its modes.

        Raises:
            FlowtrainError: n < 1, or a temperature below 0.
        """
        if n < 1:
            raise FlowtrainError(f"n={n}: ask for at least one sample")
        if not 0 <= temperature < math.inf:
            raise FlowtrainError(f"temperature={temperature}: give a number that is not negative")
        like = next(self.parameters())
        # drawn at once, so that the samples do not depend on how they are chunked
        z = temperature * torch.randn(n, *self.event_shape, dtype=like.dtype, device=like.device)
        return torch.cat([self.forward(part) for part in torch.split(z, chunk)])

    def _checked(self, x: Tensor, name: str) -> Tensor:
        if x.shape[1:] != self.event_shape or x.dim() != 1 + len(self.event_shape):
            wanted = ", ".join(map(str, ("B", *self.event_shape)))
            raise FlowtrainError(f"{name} has shape {tuple(x.shape)}; this flow takes ({wanted})")
        return x.to(next(self.parameters()))
