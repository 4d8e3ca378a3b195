"""Mixtures of Gaussians at random centers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.data.targets.grid import log_normal
from flowtrain.utils.arguments import number, whole

# softplus(1), as in the authors' code
FAB_STD = math.log1p(math.e)


class GaussianMixture(Target):
    """gaussian_mixture: equally likely Gaussians N(c_k, std^2 I) with random centers in [-loc_range, loc_range]^d.

    p(x) = 1/K sum_k N(x; c_k, std^2 I), and log Z = 0.

    The defaults give the mixture with 40 modes of Midgley et al. 2023, "Flow annealed importance sampling bootstrap",
    section 4.1, with the centers of the authors' code.

    Args:
        n_modes: the number of Gaussians K.
        dim: the number of columns d.
        loc_range: the bound of the coordinates of the centers.
        std: the standard deviation of each Gaussian.
        seed: the seed of the centers.
        loc, scale: see `Target`. A scale of None means loc_range / sqrt(3), the standard deviation of the centers.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        n_modes: int = 40,
        dim: int = 2,
        loc_range: float = 40.0,
        std: float = FAB_STD,
        seed: int = 0,
        loc: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] | None = None,
    ) -> None:
        loc_range = number("target.loc_range", loc_range)
        super().__init__(dim, loc=loc, scale=loc_range / math.sqrt(3) if scale is None else scale, log_z=0.0)
        self.std = number("target.std", std)
        generator = torch.Generator().manual_seed(whole("target.seed", seed, least=0))
        # float32, with the same operations as in the authors' code
        unit = torch.rand(whole("target.n_modes", n_modes), self.dim, generator=generator, dtype=torch.float32)
        self.modes = ((unit - 0.5) * 2 * loc_range).double()
        self.register_buffer("centers", self.modes.clone(), persistent=False)

    def log_density(self, x: Tensor) -> Tensor:
        each = log_normal(x[:, None], self.get_buffer("centers").to(x), self.std).sum(2)
        return each.logsumexp(1) - math.log(each.shape[1])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        assert self.modes is not None
        chosen = torch.randint(len(self.modes), (n,), generator=generator)
        noise = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        return self.modes[chosen] + self.std * noise
