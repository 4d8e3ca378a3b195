"""x = L z + m with L lower triangular: pushed through it, a standard normal is any Gaussian."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, check_sample, varies


class Affine(Bijection):
    """x = L z + m, log|det dx/dz| = sum log L_ii, for samples of d >= 1 elements, images flattened.

    L L^T is the covariance. `initialize` sets the maximum-likelihood Gaussian of the data it is given.

    Example:
        >>> affine = Affine(1)
        >>> z = affine.initialize(torch.tensor([[1.0], [5.0]]))
        >>> round(affine.mean.item(), 3), round(affine.factor().item(), 3)
        (3.0, 2.0)
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(d))
        self.log_diagonal = nn.Parameter(torch.zeros(d))
        self.below_diagonal = nn.Parameter(torch.zeros(d, d))

    def factor(self) -> Tensor:
        """L, (d, d)."""
        return self.below_diagonal.tril(-1) + torch.diag(self.log_diagonal.exp())

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z.flatten(1) @ self.factor().T + self.mean
        return x.view_as(z), self.log_diagonal.sum().expand(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.linalg.solve_triangular(self.factor(), (x.flatten(1) - self.mean).T, upper=False).T
        return z.view_as(x), -self.log_diagonal.sum().expand(len(x))

    @torch.no_grad()
    def initialize(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        check_sample(x)
        flat = x.flatten(1)
        centred = (flat - flat.mean(0)).double()
        covariance = centred.T @ centred / len(x)
        # constant columns keep a scale of 1
        variance = covariance.diagonal()
        variance.copy_(variance.where(varies(variance.sqrt(), flat.mean(0)), 1))
        # fewer rows than columns, or columns that depend on each other, leave directions without variance
        covariance.diagonal().mul_(1 + 1e-6).add_(1e-30)
        factor = torch.linalg.cholesky(covariance)
        self.mean.copy_(flat.mean(0))
        self.log_diagonal.copy_(factor.diagonal().log())
        self.below_diagonal.copy_(factor.tril(-1))
        return self.map_inverse(x, label)
