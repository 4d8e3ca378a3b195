"""Smooth activations with their first two derivatives: a field pushes tangents through the slope, with no second graph.

The derivatives are computed from what `replace` says to keep of an evaluation: of tanh the value serves, and its place
is that of x.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(ABC):
    """y = f(x), elementwise, for any shape."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """f(x), differentiable by autograd."""

    def gain(self, device: torch.device) -> float:
        """`replace` takes gain x in place of x: a product makes it for nothing."""
        return 1.0

    @abstractmethod
    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x / gain), what the derivatives are computed from), without a graph; x may be overwritten."""

    @abstractmethod
    def slope(self, kept: Tensor) -> Tensor:
        """f'(x)."""

    @abstractmethod
    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        """f''(x)."""

    def pull(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_slope: Tensor) -> Tensor:
        """at_value f'(x) + at_slope f''(x), overwriting at_value."""
        return at_value.mul_(slope).addcmul_(at_slope, self.curvature(kept, slope))

    @abstractmethod
    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x), f'(x)), differentiable by autograd."""


@final
class Tanh(Activation):
    """tanh(x), with f' = 1 - f^2 and f'' = -2 f f'."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def gain(self, device: torch.device) -> float:
        # on a CPU torch's sigmoid is many times as fast as its tanh; tanh x = 2 sigmoid(2x) - 1 to 2e-7 in float32
        return 2.0 if device.type == "cpu" else 1.0

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.add(x.new_tensor(-1), x.sigmoid_(), alpha=2, out=x) if x.device.type == "cpu" else x.tanh_()
        return y, y

    def slope(self, kept: Tensor) -> Tensor:
        return torch.addcmul(kept.new_ones(()), kept, kept, value=-1)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        return (kept * slope).mul_(-2)

    def pull(self, kept: Tensor, slope: Tensor, at_value: Tensor, at_slope: Tensor) -> Tensor:
        # f'' = -2 f f'
        return at_value.addcmul_(kept, at_slope, value=-2).mul_(slope)

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x)
        return y, 1 - y * y


@final
class Softplus(Activation):
    """log(1 + exp(x)), with f' = sigmoid(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(x), x

    def slope(self, kept: Tensor) -> Tensor:
        return torch.sigmoid(kept)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        return slope - slope * slope

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(x), torch.sigmoid(x)


@final
class Swish(Activation):
    """x sigmoid(x), also known as SiLU (Ramachandran et al. 2017, Searching for activation functions)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(x), x

    def slope(self, kept: Tensor) -> Tensor:
        gate = torch.sigmoid(kept)
        return gate + kept * gate * (1 - gate)

    def curvature(self, kept: Tensor, slope: Tensor) -> Tensor:
        gate = torch.sigmoid(kept)
        return gate * (1 - gate) * (2 + kept * (1 - 2 * gate))

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        y = x * gate
        return y, gate + y * (1 - gate)


ACTIVATIONS: dict[str, Activation] = {"tanh": Tanh(), "softplus": Softplus(), "swish": Swish()}
