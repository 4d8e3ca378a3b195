"""Couplings and autoregressive maps of vectors without gradients, in both directions.

Without gradients, no activation is kept, and less Python code is run. Vectors have one column for each row of x.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowtrain.bijections.elementwise import ScaleShift
from flowtrain.bijections.spline import Spline
from flowtrain.nn.column_networks import Layer, is_hooked, masked
from flowtrain.nn.conditioners import MLP
from flowtrain.nn.residual_mlp import MaskedLinear, MaskedMLP, ResidualMLP
from flowtrain.nn.row_networks import hidden_rows, last_columns
from flowtrain.utils.autograd import needs_autograd

if TYPE_CHECKING:
    from flowtrain.bijections.conditioned_gradient import Conditioned

# the networks and elementwise maps that are evaluated here; a subclass may compute another function
NETWORKS = (MLP, ResidualMLP, MaskedMLP)
TRANSFORMS = (ScaleShift, Spline)
# the number of elements of b that a spline maps at once on a CPU, so that its parameters stay in the cache
ELEMENTS = 4096


def plain_layers(of: "Conditioned", x: Tensor) -> list[Layer] | None:
    """Returns the layers of the conditioner if this file can evaluate the bijection at x without gradients, else None.

    The caller has checked that there is no context.
    """
    if torch.is_grad_enabled() or x.dim() != 2 or not x.numel() or of.has_angles() or needs_autograd(x):
        return None
    net, transform, linear = of.conditioner, of.transform, of.linear
    if type(net) not in NETWORKS or type(transform) not in TRANSFORMS or is_hooked(transform):
        return None
    if linear is not None and is_hooked(linear):
        return None
    assert isinstance(net, MLP | ResidualMLP)
    layers = net.plain_layers()
    return None if layers is None or layers[0][0].dtype != x.dtype else layers


def mapped(of: "Conditioned", x: Tensor, to_base: bool) -> tuple[Tensor, Tensor] | None:
    """Computes `inverse` of a bijection at x (B, C) if `to_base`, else `forward` of a coupling.

    Returns None if this file cannot evaluate the bijection.
    """
    layers = plain_layers(of, x)
    parts = None if layers is None else of.column_parts()
    if layers is None or parts is None:
        return None
    columns = x.T.contiguous()
    a, b = (columns if part is None else columns[part] for part in parts)
    bound = of.input_bound
    inputs = a if bound is None else (a / bound).tanh_().mul_(bound)
    h = hidden_rows(of.conditioner.network, inputs, layers)  # type: ignore[arg-type]
    shift = None
    if of.linear is not None:
        weight = masked(of.linear.weight, of.linear.mask if isinstance(of.linear, MaskedLinear) else None)  # type: ignore[arg-type]
        shift = weight @ a
    if to_base and shift is not None:
        b = b - shift
    y, log_slope = elementwise(of.transform, b, h, layers[-1], to_base)
    if not to_base and shift is not None:
        y = y + shift
    log_det = log_slope.sum(0)
    changed = parts[1]
    if changed is None:
        return y.T, log_det
    found = columns.clone()
    found[changed] = y
    return found.T, log_det


def elementwise(
    transform: torch.nn.Module, b: Tensor, h: Tensor, last: Layer, to_base: bool
) -> tuple[Tensor, Tensor]:
    """Maps b (n, B) elementwise, with the parameters of the last layer for its inputs h (B, k).

    Returns the result and its log-slopes, each (n, B).
    """
    assert isinstance(transform, ScaleShift | Spline)
    n, rows = b.shape
    function = transform.values_to_base if to_base else transform.values_to_data
    size = rows
    if isinstance(transform, Spline) and b.device.type == "cpu":
        size = max(1, ELEMENTS // n)
    if size >= rows:
        return function(b, last_columns(h, last))
    weight = masked(last[0], last[1])
    y, log_slope = b.new_empty(n, rows), b.new_empty(n, rows)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        y[:, part], log_slope[:, part] = function(b[:, part], last_columns(h[part], last, weight))
    return y, log_slope
