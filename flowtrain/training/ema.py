"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """shadow <- d shadow + (1 - d) weights after each step, d = min(decay, (1 + n) / (10 + n)) at the nth update.

    The growing decay lets a short run forget its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach() for p in self.module.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside, its own again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.module.named_parameters():
            p.data, self.shadow[name] = self.shadow[name], p.data

    def state(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **self.shadow}

    def load(self, state: dict[str, Tensor | int]) -> None:
        for name, shadow in self.shadow.items():
            value = state[name]
            assert isinstance(value, Tensor)
            shadow.copy_(value)
        self.updates = int(state["updates"])
