"""Networks of linear layers and relu without gradients, on activations with one row for each row of x.

Activations are (B, n), so that oneDNN adds the bias and applies relu inside a product. The outputs have one column for
each row of x, as in `flowtrain.nn.column_networks`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.nn.column_networks import ColumnNetwork, Layer, Residual, masked
from flowtrain.utils.products import prefers_onednn, product, relu_product, sum_product

# the number of inputs from which a copy with contiguous rows makes the first layer faster with oneDNN
WIDE = 128


def hidden_rows(network: type[ColumnNetwork], x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Returns the inputs (B, n) of the last layer of a network for inputs x (n_in, B)."""
    if len(layers) == 1:
        return x.T
    (weight, bias), *inner = [(masked(weight, mask), bias) for weight, mask, bias in layers[:-1]]
    rows = x.T.contiguous() if len(x) >= WIDE and prefers_onednn(x.T, weight) else x.T
    if network is Residual:
        h = product(rows, weight, bias)
        for one, two in zip(inner[::2], inner[1::2], strict=True):
            h = sum_product(h, relu_product(h.relu(), *one), *two)
        return h.relu_()
    h = relu_product(rows, weight, bias)
    for layer in inner:
        h = relu_product(h, *layer)
    return h


def last_columns(h: Tensor, layer: Layer, weight: Tensor | None = None) -> Tensor:
    """Returns the outputs (n_out, B) of the last layer for its inputs h (B, n).

    Args:
        h: the inputs.
        layer: the last layer.
        weight: the weight times the mask, if it is known.
    """
    weight = masked(layer[0], layer[1]) if weight is None else weight
    bias = layer[2].unsqueeze(1)
    if prefers_onednn(weight, h):
        return product(weight, h).add_(bias)
    return torch.addmm(bias, weight, h.T)
