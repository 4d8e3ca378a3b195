"""The one contract of every invertible map, and their composition."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class Bijection(nn.Module, ABC):
    """An invertible map between base and data.

    `forward(z) -> (x, log|det dx/dz|)` leads from base to data, `inverse(x) -> (z, log|det dz/dx|)` back;
    values are (B, *event_shape), log-determinants (B,), in nats.
    """

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base to data."""

    @abstractmethod
    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base."""

    def map_forward(self, z: Tensor) -> Tensor:
        """`forward` without its log-determinant, for maps that can save the work."""
        return self.forward(z)[0]

    def map_inverse(self, x: Tensor) -> Tensor:
        """`inverse` without its log-determinant."""
        return self.inverse(x)[0]

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets data-dependent parameters from data x (B, *event_shape), once, before training. Most have none."""


class Chain(Bijection):
    """The composition b_n . ... . b_1 in the direction base to data: b_1 stands next to the base."""

    def __init__(self, bijections: Iterable[Bijection]) -> None:
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def __iter__(self) -> Iterator[Bijection]:
        for bijection in self.bijections:
            assert isinstance(bijection, Bijection)
            yield bijection

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for bijection in self:
            z, term = bijection.forward(z)
            log_det = log_det + term
        return z, log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for bijection in reversed(list(self)):
            x, term = bijection.inverse(x)
            log_det = log_det + term
        return x, log_det

    def map_forward(self, z: Tensor) -> Tensor:
        for bijection in self:
            z = bijection.map_forward(z)
        return z

    def map_inverse(self, x: Tensor) -> Tensor:
        for bijection in reversed(list(self)):
            x = bijection.map_inverse(x)
        return x

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        first, *rest = self
        for bijection in reversed(rest):
            bijection.initialize(x)
            x = bijection.map_inverse(x)
        first.initialize(x)
