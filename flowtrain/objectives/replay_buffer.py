"""A prioritised replay buffer of weighted samples."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtrain.utils.errors import CheckpointError

KEYS = ("x", "log_w", "log_q")


class ReplayBuffer:
    """The newest weighted samples, from which rows are drawn with probabilities proportional to their weights.

    Args:
        size: the largest number of rows. New rows replace the oldest ones.
        like: a tensor with the device of the rows.
        dim: the number of columns d.

    Attributes:
        x: the samples (n, d), oldest first, float32.
        log_w: their log weights (n,), float32.
        log_q: log q(x) (n,) of the flow for which the weights are valid, float32.
    """

    def __init__(self, size: int, like: Tensor, dim: int) -> None:
        self.size, self.dim, self.device = size, dim, like.device
        self.x = torch.zeros(0, dim, dtype=torch.float32, device=self.device)
        self.log_w, self.log_q = self.x.new_zeros(0), self.x.new_zeros(0)

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, log_w: Tensor, log_q: Tensor) -> None:
        """Adds rows x (m, d) with log weights and log densities (m,)."""
        self.x, self.log_w, self.log_q = (
            torch.cat([old, new.to(old)])[-self.size :]
            for old, new in ((self.x, x), (self.log_w, log_w), (self.log_q, log_q))
        )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws the positions (n,) of rows with probabilities proportional to their weights.

        No row is drawn twice, unless n exceeds the number of rows: the buffer is then repeated. The rows are the n
        largest of log w plus Gumbel noise, which is sequential sampling without replacement (Kool et al. 2019,
        Stochastic beams and where to find them, section 2.3).
        """
        repeats = -(-n // len(self))
        log_w = self.log_w.cpu().double().repeat(repeats)
        gumbel = -torch.empty_like(log_w).exponential_(generator=generator).log()
        return ((log_w + gumbel).topk(n).indices % len(self)).to(self.device)

    def correct(self, rows: Tensor, log_q: Tensor, power: float) -> None:
        """Updates the weights of rows (m,), which are p^alpha q^(1 - alpha) / (density of the row), for a new log q.

        The new weight is w (q_old / q_new)^power with power = alpha - 1.
        """
        log_q = log_q.to(self.log_q)
        self.log_w[rows] += power * (self.log_q[rows] - log_q)
        self.log_q[rows] = log_q

    def state(self) -> dict[str, Any]:
        """Returns the contents. Later changes of the buffer do not change them."""
        return {key: getattr(self, key).clone() for key in KEYS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state`. If the buffer is smaller than the saved one, the oldest rows are dropped.

        Raises:
            CheckpointError: values that no run writes.
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


def effective(log_w: Tensor) -> float:
    """Returns the effective sample size of log weights (n,) (Kish), as a share of n; NaN without rows."""
    if not len(log_w):
        return math.nan
    w = torch.softmax(log_w.double(), 0)
    return 1 / float(w.square().sum()) / len(log_w)
