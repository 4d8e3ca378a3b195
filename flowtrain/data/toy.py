"""Two-dimensional toys: endless fresh training samples and a density known in float64."""

from abc import abstractmethod

import torch
from torch import Tensor

from flowtrain.checks import whole, within_memory
from flowtrain.data.base import Dataset, step_generator
from flowtrain.errors import ConfigError, DataError

_TRAIN, _VAL, _TEST = 1, 2, 3
# held-out points
MOST = 10_000_000


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """U(0, 1) of that shape, in float64 on the CPU."""
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """N(0, 1) of that shape, in float64 on the CPU."""
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def choice(generator: torch.Generator, n: int, count: int) -> Tensor:
    """`n` independent draws from 0 .. count - 1, all equally likely, (n,)."""
    return torch.randint(count, (n,), generator=generator)


class Toy(Dataset):
    """A density on the plane that can be sampled and evaluated: one subclass per toy.

    Every training batch is fresh, so there is no training set to overfit, and the entropy is the lowest test
    NLL any model can reach.

    A subclass gives `sample`, `_log_density` and `entropy`.

    >>> from flowtrain.data.moons import Moons
    >>> moons = Moons()
    >>> kl_of_a_perfect_model = -moons.log_prob(moons.test).mean() - moons.entropy
    >>> bool(kl_of_a_perfect_model.abs() < 0.05)  # a mean over 10,000 points
    True

    Args:
        n_val, n_test: sizes of the held-out sets.
        seed: of the held-out sets alone; a run's own seed drives only the training batches.

    Raises:
        ConfigError: a size or seed out of range.
    """

    event_shape = (2,)
    columns = ("x1", "x2")
    entropy: float
    # Points by quadrature nodes is what a density holds, several times over: small enough to stay in the cache.
    _chunk = 128

    def __init__(self, n_val: int = 2000, n_test: int = 10_000, seed: int = 0) -> None:
        seed = whole("data.seed", seed, least=0)
        for key, n in (("data.n_val", n_val), ("data.n_test", n_test)):
            # in float64, and once more in float32
            within_memory(key, whole(key, n), 2 * (8 + 4))
            if n > MOST:
                raise ConfigError(f"{key}={n}: give at most {MOST:,}; their density alone would take hours")
        self.val = self.sample(n_val, step_generator(seed, _VAL)).float()
        self.test = self.sample(n_test, step_generator(seed, _TEST)).float()

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Fresh samples of shape (batch_size, 2), float32, keyed by (seed, step)."""
        return self.sample(batch_size, step_generator(seed, _TRAIN, step)).float()

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """True log density in nats of x (B, 2): shape (B,), float64, on the device of x, without gradient.

        NaN gives NaN and an infinite coordinate -inf. Memory does not grow with B beyond the input's own size.

        Raises:
            DataError: x of another shape.

        Example:
            >>> from flowtrain.data.checkerboard import Checkerboard
            >>> [round(p, 4) for p in Checkerboard().log_prob(torch.tensor([[0.5, 0.5], [9.0, 9.0]])).tolist()]
            [-3.4657, -inf]
        """
        if x.ndim != 2 or x.shape[1] != 2:
            raise DataError(f"log_prob got shape {tuple(x.shape)}: a toy's points have shape (B, 2)")
        points = x.to("cpu", torch.float64)
        parts = [self._log_density_or_nan(chunk) for chunk in torch.split(points, self._chunk)]
        return torch.cat(parts).to(x.device)

    def _log_density_or_nan(self, x: Tensor) -> Tensor:
        finite = x.isfinite().all(dim=1)
        out = torch.full((len(x),), -torch.inf, dtype=torch.float64)
        out[x.isnan().any(dim=1)] = torch.nan
        out[finite] = self._log_density(x[finite])
        return out

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` independent samples, shape (n, 2), float64."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Log density in nats of finite points x (B, 2), float64 on the CPU, B at most a chunk: shape (B,)."""
