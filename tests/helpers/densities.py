"""Log densities up to a constant, which configs of tests name as targets."""

import math

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target

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


def with_option(x: Tensor, width: float) -> Tensor:
    """A banana, whose width is required."""
    return banana(x, width)


def with_scale(x: Tensor, scale: float = 1.0) -> Tensor:
    """A banana with an argument that is named like a key of targets."""
    return banana(x, scale)


class Banana:
    """Makes a log density that has settings."""

    def __init__(self, width: float = 1.0) -> None:
        self.width = width

    def __call__(self, x: Tensor) -> Tensor:
        return banana(x, self.width)


class KnownBanana(Target):
    """A target with log Z."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(2, log_z=BANANA_LOG_Z + math.log(width))
        self.width = width

    def log_density(self, x: Tensor) -> Tensor:
        return banana(x, self.width)
