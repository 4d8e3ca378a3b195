"""A conditional flow with random parameters, and data with context columns that are drawn from it."""

import torch
from torch import Tensor

from flowtrain.data.base import Dataset, Samples
from flowtrain.data.context import ContextColumn
from flowtrain.flow import Flow
from helpers.flows import TIGHT, VECTORS, flow_of

COLUMNS = (
    ContextColumn("mass", mean=2.0, std=1.5),
    ContextColumn("colour", "categorical", categories=("blue", "green", "red")),
)


class WithContext(Dataset):
    """Rows x (n, d) with contexts (n, k), as validation and test set."""

    def __init__(self, x: Tensor, context: Tensor, columns: tuple[ContextColumn, ...] = COLUMNS) -> None:
        self.event_shape, self.context = tuple(x.shape[1:]), columns
        self.val = self.test = x
        self.val_context = self.test_context = context

    def train_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        return self.test[:batch_size]


def contexts(n: int) -> Tensor:
    """Returns values (n, 2) of COLUMNS: gamma variates and categories, of which red is the most frequent."""
    mass = torch.distributions.Gamma(2.0, 1.0).sample((n,))
    colour = torch.multinomial(torch.tensor([0.3, 0.2, 0.5]), n, replacement=True)
    return torch.stack([mass, colour.to(mass)], 1).double()


def conditional(name: str, columns: int = 2) -> Flow:
    """Returns a flow p(x | mass, colour) of a model of VECTORS."""
    return flow_of(VECTORS[name], Samples((columns,), context=COLUMNS), TIGHT)


def drawn_from(flow: Flow, n: int) -> WithContext:
    """Returns rows that a flow has drawn with random contexts."""
    c = contexts(n)
    return WithContext(flow.sample(n, context=c), c)
