"""A fixed permutation of dimensions or channels, saved with the weights."""

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection


class Permutation(Bijection):
    """x_i = z_{p(i)} along dimension 1; log-determinant 0.

    p is a buffer: a permutation that a checkpoint forgets ruins the flow.

    Example:
        >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([[0.0, 1.0, 2.0]]))[0]
        tensor([[2., 0., 1.]])
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.register_buffer("back", torch.argsort(order))

    order: Tensor
    back: Tensor

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.order], z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.back], x.new_zeros(len(x))
