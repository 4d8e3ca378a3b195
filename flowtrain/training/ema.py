"""An exponential moving average (EMA) of the weights and of the running statistics of batch norms."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """shadow <- d shadow + (1 - d) weights after each step, d = min(decay, (1 + n) / (10 + n)) at the nth update.

    The decay grows as in TensorFlow's ExponentialMovingAverage, so that the initial weights do not dominate the average
    of a short run.

    The running statistics of batch norms are averaged too, because the last statistics fit the activations of averaged
    weights less well. For RealNVP with batch norms and decay 0.99, the validation NLL on moons after 200, 400 and 600
    steps is 2.566, 2.525 and 2.502 with averaged statistics, and 2.586, 2.544 and 2.517 with copied statistics.
    Averaging is valid because statistics change only with an accepted update, see `TrainState.keep_running`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        # buffers outside the state_dict, such as masks, are constant and not averaged
        self._saved = set(module.state_dict())
        self.shadow = {name: p.detach().clone() for name, p in self._averaged()}
        # searching the parameters of a module takes longer than the update
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the module's weights to the average, and resets the count of updates."""
        self.updates = 0
        for name, p in self._averaged():
            p.copy_(self.shadow[name])

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._pairs is None:
            self._pairs = list(self.shadow.values()), [p for _, p in self._averaged()]
        torch._foreach_lerp_(*self._pairs, 1 - decay)

    def _averaged(self) -> Iterator[tuple[str, Tensor]]:
        pairs = self.module.named_buffers()
        buffers = ((name, b) for name, b in pairs if b.is_floating_point() and name in self._saved)
        return chain(self.module.named_parameters(), buffers)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self._pairs = None
        for name, p in self._averaged():
            p.data, self.shadow[name] = self.shadow[name], p.data

    def state(self) -> dict[str, Tensor | int]:
        """Returns the averages by name and the count of updates."""
        return {"updates": self.updates, **self.shadow}

    def load(self, state: dict[str, Tensor | int]) -> None:
        """Restores the result of `state`."""
        for name, shadow in self.shadow.items():
            # older versions did not average buffers, and their buffers did not change
            value = state.get(name, shadow)
            assert isinstance(value, Tensor)
            shadow.copy_(value)
        self.updates = int(state["updates"])


def averages(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the averages in a saved `Ema.state` by name, without the count of updates."""
    return {name: value for name, value in saved.items() if name != "updates"}
