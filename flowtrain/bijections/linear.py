"""The invertible 1x1 convolution (Kingma and Dhariwal 2018, Glow, section 3.2), a linear map of the channels."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, places
from flowtrain.precision import full_precision


class InvertibleLinear(Bijection):
    """z = W x at every place, W = P L (U + diag(s)): for images (B, C, H, W) a 1x1 convolution, for vectors a matrix.

    P is a fixed permutation, L unit lower and U strictly upper triangular, s = sign exp(log|s|) with a fixed sign, all
    from a random rotation; log|det dz/dx| = H W sum log|s| (Glow, eq. 10 and 11). W leads from data to base, the
    direction of training; its inverse is taken in float64, once a call.

    Example:
        >>> linear, x = InvertibleLinear(3), torch.randn(2, 3, 4, 4)
        >>> z, log_det = linear.inverse(x)
        >>> torch.allclose(linear(z)[0], x, atol=1e-4), bool((log_det.abs() < 1e-3).all())  # it begins as a rotation
        (True, True)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        p, lower, upper = torch.linalg.lu(rotation)
        s, dtype = upper.diagonal(), torch.get_default_dtype()
        self.register_buffer("permutation", p.to(dtype))
        self.register_buffer("sign", s.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_scale = nn.Parameter(s.abs().log().to(dtype))

    permutation: Tensor
    sign: Tensor

    def weight(self) -> Tensor:
        """W, (C, C)."""
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())
        return self.permutation @ lower @ upper

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(z.device):
            back = torch.linalg.inv(self.weight().double()).to(z.dtype)
            return channel_map(back, z), -self.log_det(z)

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # an error here would be one of the flow itself
        with full_precision(x.device):
            return channel_map(self.weight(), x), self.log_det(x)

    def log_det(self, x: Tensor) -> Tensor:
        """log|det dz/dx| of each row of x (B, C, ...), (B,)."""
        return (places(x) * self.log_scale.sum()).expand(len(x))


def channel_map(weight: Tensor, x: Tensor) -> Tensor:
    """y_ij = W x_ij, x (B, C, ...)."""
    return torch.matmul(weight, x.flatten(2)).view_as(x) if x.dim() > 2 else x @ weight.T
