"""A prioritised replay buffer: rows are drawn with probabilities proportional to their weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtrain.utils.errors import CheckpointError

KEYS = ("x", "log_w", "log_q")


class ReplayBuffer:
    """A buffer of the newest weighted samples. `draw` draws rows with probabilities proportional to their weights.

    Args:
        size: the largest number of rows. New rows replace the oldest ones.
        like: a tensor on the device of the buffer.
        dim: the number of columns d.

    Attributes:
        x: the samples, (n, d), oldest first, float32.
        log_w: the log weights of the samples, (n,), float32.
        log_q: log q(x), (n,), float32, of the flow to which the weight of the row belongs.
    """

    def __init__(self, size: int, like: Tensor, dim: int) -> None:
        self.size, self.dim, self.device = size, dim, like.device
        self.x = torch.zeros(0, dim, dtype=torch.float32, device=self.device)
        self.log_w, self.log_q = self.x.new_zeros(0), self.x.new_zeros(0)

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, log_w: Tensor, log_q: Tensor) -> None:
        """Adds rows x (m, d) with log weights and log q, (m,), and drops the oldest rows beyond `size`."""
        self.x, self.log_w, self.log_q = (
            torch.cat([old, new.to(old)])[-self.size :]
            for old, new in ((self.x, x), (self.log_w, log_w), (self.log_q, log_q))
        )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws the indices (n,) of rows without replacement, with probabilities proportional to their weights.

        If n exceeds the number of rows, the rows are repeated first. The drawn rows have the n largest values of log w
        plus Gumbel noise, which is equivalent to sequential sampling without replacement (Kool et al. 2019, Stochastic
        beams and where to find them, section 2.3).
        """
        repeats = -(-n // len(self))
        log_w = self.log_w.cpu().double().repeat(repeats)
        gumbel = -torch.empty_like(log_w).exponential_(generator=generator).log()
        return ((log_w + gumbel).topk(n).indices % len(self)).to(self.device)

    def correct(self, rows: Tensor, log_q: Tensor, power: float) -> None:
        """Updates the weights of rows for a new flow q.

        A weight is p^alpha q^(1 - alpha) / r with the density r of the row. With power = alpha - 1, the new weight is
        w (q_old / q_new)^power.

        Args:
            rows: the indices of the rows, (m,).
            log_q: log q_new of the rows, (m,), in nats.
            power: alpha - 1.
        """
        log_q = log_q.to(self.log_q)
        self.log_w[rows] += power * (self.log_q[rows] - log_q)
        self.log_q[rows] = log_q

    def state(self) -> dict[str, Any]:
        """Returns a copy of the contents."""
        return {key: getattr(self, key).clone() for key in KEYS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state`. If the buffer is smaller than the saved one, the oldest rows are dropped.

        Raises:
            CheckpointError: the state is not a valid result of `state`.
        """
        found = [state.get(key) for key in KEYS]
        n = len(found[0]) if isinstance(found[0], Tensor) and found[0].dim() else -1
        for value, shape in zip(found, ((n, self.dim), (n,), (n,)), strict=True):
            good = isinstance(value, Tensor) and value.shape == shape and value.dtype == torch.float32
            if not good or not bool(value.isfinite().all()):  # type: ignore[union-attr]
                raise CheckpointError(
                    "the checkpoint is damaged: the buffer of the objective does not contain finite rows of "
                    f"{self.dim} columns with their weights"
                )
        self.x, self.log_w, self.log_q = (v.to(self.device)[-self.size :].clone() for v in found)  # type: ignore[union-attr]


def effective_share(log_w: Tensor) -> float:
    """Returns the effective sample size (Kish 1965) of log weights (n,), as a share of n. NaN if n is 0."""
    if not len(log_w):
        return math.nan
    w = torch.softmax(log_w.double(), 0)
    return 1 / float(w.square().sum()) / len(log_w)
