"""Log densities up to a constant, which configs of tests name as targets."""

import math

import torch
from torch import Tensor

# log of the integral of `banana`
BANANA_LOG_Z = math.log(2 * math.pi)
BANANA = ["target=custom", "target._target_=helpers.densities.banana", "target.dim=2"]


def banana(x: Tensor, width: float = 1.0) -> Tensor:
    """x1 is Gaussian, and x2 is Gaussian with mean x1^2."""
    return -0.5 * (x[:, 0].square() + ((x[:, 1] - x[:, 0].square()) / width).square())


def with_nan(x: Tensor) -> Tensor:
    """NaN for about one in ten points."""
    return torch.where(x[:, 0] > 1.3, torch.nan, banana(x))


def far_modes(x: Tensor) -> Tensor:
    """The normalized log density of three Gaussians, whose centers are 8 standard deviations apart."""
    centers = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]]).to(x)
    return torch.logsumexp(-0.5 * (x[:, None] - centers).square().sum(2), 1) - math.log(3 * 2 * math.pi)
