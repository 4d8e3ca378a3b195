"""Multi-scale flows of images: bijections of squeezed images and of half of the channels.

The wrapped bijections keep the shape of an image, so latents have the shape of the data.
"""

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Pass, as_pass, initialized
from flowtrain.ode import AS_CONFIGURED, SolveOptions


class Wrapped(Bijection):
    """A bijection applied to a part or to a rearrangement of x, which is the same in both directions.

    The rearrangement preserves volume, so the inner bijection has the same log-determinant.
    """

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.inner = inner

    @abstractmethod
    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the input of the inner bijection, and the elements that stay unchanged or None."""

    @abstractmethod
    def leave(self, inside: Tensor, outside: Tensor | None) -> Tensor:
        """Inverts `enter`."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Wrapped.pass_forward, self), z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(Wrapped.pass_inverse, self), x, context)

    def pass_forward(self, z: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        inside, outside = self.enter(z)
        x, log_det, integrals = self.inner.pass_forward(inside, context, options)
        return Pass(self.leave(x, outside), log_det, integrals)

    def pass_inverse(self, x: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        inside, outside = self.enter(x)
        z, log_det, integrals = self.inner.pass_inverse(inside, context, options)
        return Pass(self.leave(z, outside), log_det, integrals)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        inside, outside = self.enter(z)
        return self.leave(self.inner.map_forward(inside, context), outside)

    def map_inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        inside, outside = self.enter(x)
        return self.leave(self.inner.map_inverse(inside, context), outside)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        inside, outside = self.enter(x)
        return self.leave(initialized(self.inner, inside, context, weights), outside)


class Squeeze(Wrapped):
    """A bijection of (4 C, H/2, W/2) applied to squeezed images (C, H, W). H and W are even."""

    def enter(self, x: Tensor) -> tuple[Tensor, None]:
        return squeeze(x), None

    def leave(self, inside: Tensor, outside: Tensor | None) -> Tensor:
        return unsqueeze(inside)


class FactorOut(Wrapped):
    """A bijection of the first half of the channels. The other half is factored out (Dinh et al. 2017, section 3.6)."""

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        return first, second

    def leave(self, inside: Tensor, outside: Tensor | None) -> Tensor:
        assert outside is not None
        return torch.cat([inside, outside], 1)


def squeeze(x: Tensor) -> Tensor:
    """Turns each 2x2 square of pixels into four channels: (B, C, H, W) -> (B, 4 C, H/2, W/2).

    Upper left and lower right of every channel come first, then upper right and lower left. So the two halves of the
    channels are the two colours of a checkerboard (Dinh et al. 2017, Real NVP, sections 3.4 and 3.6).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2)
        >>> squeeze(x).flatten()
        tensor([0., 3., 1., 2.])
        >>> torch.equal(unsqueeze(squeeze(x)), x)
        True
    """
    return torch.cat([x[..., i::2, j::2] for i, j in ((0, 0), (1, 1), (0, 1), (1, 0))], 1)


def unsqueeze(x: Tensor) -> Tensor:
    """Inverts `squeeze`: (B, 4 C, H, W) -> (B, C, 2 H, 2 W)."""
    upper_left, lower_right, upper_right, lower_left = x.chunk(4, 1)
    rows = [torch.stack(pair, -1).flatten(-2) for pair in ((upper_left, upper_right), (lower_left, lower_right))]
    return torch.stack(rows, -2).flatten(-3, -2)
