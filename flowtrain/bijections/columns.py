"""A bijection of some columns of vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, initialized


class OnColumns(Bijection):
    """Applies a bijection of vectors to some columns. The other columns do not change.

    Args:
        inner: the bijection of vectors (B, len(columns)).
        columns: the indices of the columns.

    Example:
        >>> from flowtrain.bijections.scale import ActNorm
        >>> norm = OnColumns(ActNorm(1), [1])
        >>> norm.initialize(torch.tensor([[5.0, 1.0], [5.0, 3.0]]))
        tensor([[ 5., -1.],
                [ 5.,  1.]])
    """

    columns: Tensor

    def __init__(self, inner: Bijection, columns: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner
        # checkpoints do not contain this buffer, because `columns` determines it
        self.register_buffer("columns", torch.tensor(list(columns), device="cpu"), persistent=False)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner(z[:, self.columns], context)
        return z.index_copy(1, self.columns, x), log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse(x[:, self.columns], context)
        return x.index_copy(1, self.columns, z), log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return x.index_copy(1, self.columns, initialized(self.inner, x[:, self.columns], context, weights))
