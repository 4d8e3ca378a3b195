"""What a data set gives: training batches as a pure function of the step, fixed held-out sets, a density if known."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import ConfigError


def step_generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends on `seed` and the integers of `stream` alone.

    Randomness keyed by (seed, step) rather than carried from step to step is what lets a run resume
    exactly with no generator state to save.
    """
    if min((seed, *stream)) < 0:
        raise ConfigError(f"seed={seed}: a seed must be a whole number that is not negative")
    # the length as well, because SeedSequence takes (0, 1) and (0, 1, 0) for the same
    words = np.random.SeedSequence((seed, len(stream), *stream)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


# the stream of a step's own randomness (trace noise); data sets key theirs by other numbers
STEP_STREAM = 0x73_74_65_70


class Dataset(ABC):
    """Samples x of shape (B, *event_shape), float32, in data units.

    Attributes:
        event_shape: the shape of one sample.
        val, test: fixed held-out samples, the same for every seed of a run.
        columns: names of the columns of vector data, for plots and messages; may be empty.
        entropy: differential entropy of the true density in nats, where it is known.
    """

    event_shape: tuple[int, ...]
    val: Tensor
    test: Tensor
    columns: tuple[str, ...] = ()
    entropy: float | None = None

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The training batch of `step`, shape (batch_size, *event_shape): a pure function of its arguments."""

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Per-column mean and standard deviation of the training set, float64, or None where not standardised."""
        return None

    def log_prob(self, x: Tensor) -> Tensor | None:
        """True log density in nats, shape (B,), float64, or None where it is not known."""
        return None

    def split(self, name: str) -> Tensor:
        """The held-out set called `name`: val or test."""
        if name not in ("val", "test"):
            raise ConfigError(f"split={name}: there is no such split; choose val or test")
        return self.val if name == "val" else self.test
