"""A multilayer perceptron as the conditioner of a coupling over vectors."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.conditioners.parts import ACTIVATIONS, zero


class MLP(nn.Sequential):
    """(B, n_in) -> (B, n_out), zero at its start, so that a coupling begins as the identity.

    Args:
        hidden: widths.
        activation: relu | tanh | swish.
        classes: how many there are of the labels (B,), which enter one-hot; None takes none.
        dropout: the share of the hidden units that training drops.
    """

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        activation: str,
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        sizes = [n_in + (classes or 0), *hidden]
        body: list[nn.Module] = []
        for a, b in pairwise(sizes):
            # inside the activation, so that the names of the weights are the same with and without it
            activate = ACTIVATIONS[activation]()
            body += [nn.Linear(a, b), nn.Sequential(activate, nn.Dropout(dropout)) if dropout else activate]
        super().__init__(*body, zero(nn.Linear(sizes[-1], n_out)))
        self.classes = classes

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out) of x (B, n_in); labels (B,) where there are classes."""
        if self.classes is not None:
            assert label is not None
            # not F.one_hot, which vmap refuses
            x = torch.cat([x, F.embedding(label, torch.eye(self.classes, dtype=x.dtype, device=x.device))], 1)
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y
