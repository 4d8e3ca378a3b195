"""Linear maps: the invertible 1x1 convolution of Glow, and a fixed one that starts a flow at a Gaussian."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain, places
from flowtrain.covariance import shrunk_covariance
from flowtrain.precision import full_precision

# Smallest eigenvalue of a covariance relative to the largest. Below it float32 cannot resolve the direction
LEAST_EIGENVALUE = 1e-8


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


class GaussianStart(Bijection):
    """x = F z + m with fixed F and m, F F^T = C: it turns a standard normal base into the Gaussian N(m, C).

    A flow whose other parts start as affine maps then starts at the Gaussian of the training rows, see `FromGaussian`.
    F is the symmetric square root of C, so that z_i stays next to x_i. log|det dx/dz| = log det C / 2.

    Args:
        d: length of the vectors.

    Example:
        >>> start = GaussianStart(2)
        >>> start.fit(torch.tensor([1.0, 2.0]), torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        >>> x, log_det = start(torch.ones(1, 2))
        >>> x, round(float(log_det), 4)  # log 6
        (tensor([[3., 5.]]), 1.7918)
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("factor", torch.eye(d))
        self.register_buffer("inverse_factor", torch.eye(d))
        self.register_buffer("log_volume", torch.zeros(()))

    mean: Tensor
    factor: Tensor
    inverse_factor: Tensor
    log_volume: Tensor

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Sets the Gaussian from its mean (d,) and its positive semidefinite covariance (d, d)."""
        values, vectors = torch.linalg.eigh(covariance.double())
        roots = values.clamp_min(LEAST_EIGENVALUE * values.max()).sqrt()
        self.mean.copy_(mean)
        self.factor.copy_(vectors * roots @ vectors.T)
        self.inverse_factor.copy_(vectors / roots @ vectors.T)
        self.log_volume.copy_(roots.log().sum())

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(z.device):
            return z @ self.factor.T + self.mean, self.log_volume.expand(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(x.device):
            return (x - self.mean) @ self.inverse_factor.T, -self.log_volume.expand(len(x))


class Preconditioned(Chain):
    """A model over vectors (B, d) between a standard normal and the data whitened by their shrunk covariance.

    A model that starts as the identity then starts at the Gaussian of the data. All directions of the whitened data
    have the same scale, which makes an ODE easier to learn. Couplings perform better on unwhitened columns, see
    `FromGaussian`.
    """

    def __init__(self, model: Bijection, d: int) -> None:
        super().__init__([model, GaussianStart(d)])

    @torch.no_grad()
    def initialize(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        model, start = self
        assert isinstance(start, GaussianStart)
        start.fit(*shrunk_covariance(x))
        return model.initialize(start.map_inverse(x), label)


class FromGaussian(Chain):
    """A model over vectors (B, d) whose base is the Gaussian of the training rows in place of a standard normal.

    `initialize` sets this base from the data x. The flow then starts at N(m, C), with the mean and the shrunk
    covariance of x (see `flowtrain.covariance`). It assumes that the model is affine at first, which holds for all
    models of flowtrain: z = J (x - m) + o maps N(m, C) to N(o, J C J^T).
    """

    def __init__(self, model: Bijection, d: int) -> None:
        super().__init__([GaussianStart(d), model])

    @torch.no_grad()
    def initialize(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        start, model = self
        assert isinstance(start, GaussianStart)
        model.initialize(x, label)
        mean, covariance = shrunk_covariance(x)
        std = covariance.diagonal().sqrt()
        steps = torch.cat([torch.zeros_like(std).unsqueeze(0), std.diag()])
        labels = None if label is None else label[:1].expand(len(steps))
        was_training = model.training
        # evaluation mode: batch norm uses its running statistics, and dropout is off
        model.eval()
        moved = model.map_inverse((mean + steps).to(x), labels).double()
        model.train(was_training)
        jacobian = (moved[1:] - moved[0]).T / std
        start.fit(moved[0], jacobian @ covariance @ jacobian.T)
        return self.map_inverse(x, label)
