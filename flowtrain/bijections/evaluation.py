"""Evaluates couplings and autoregressive maps of vectors without gradients.

No activation is kept for a gradient, and less Python code runs. Tensors inside are (n, B), with one column for each row
of x (B, n).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.elementwise import ScaleShift
from flowtrain.bijections.spline import Spline
from flowtrain.nn.column_networks import ColumnNetwork, Layer, is_hooked, masked
from flowtrain.nn.conditioners import MLP
from flowtrain.nn.residual_mlp import MaskedLinear, MaskedMLP, ResidualMLP, is_matrix
from flowtrain.nn.row_networks import hidden_rows, last_columns
from flowtrain.utils.autograd import needs_autograd

if TYPE_CHECKING:
    from flowtrain.bijections.conditioned_gradient import Conditioned

# the networks and elementwise maps that this module evaluates. A subclass may compute another function
NETWORKS = (MLP, ResidualMLP, MaskedMLP)
TRANSFORMS = (ScaleShift, Spline)
# the number of elements that are mapped at once on a CPU, so that their parameters stay in the cache
ELEMENTS: dict[type, int] = {ScaleShift: 2**17, Spline: 2**13}
# the number of rows that are mapped at once is a multiple of this, because products of 167 rows, for example, take 1.3
# times as long for each row as products of 176 rows
ROWS = 64


class Parts(NamedTuple):
    """The parts of a bijection.

    Attributes:
        network: the functions that compute the conditioner.
        transform: the elementwise map.
        linear: W times its mask, or None.
        layers: the linear layers of the conditioner.
        bound: the `input_bound` of the bijection.
        kept, changed: the indices of the parts a and b, see `Conditioned.column_parts`.
    """

    network: type[ColumnNetwork]
    transform: ScaleShift | Spline
    linear: Tensor | None
    layers: list[Layer]
    bound: float | None
    kept: slice | Tensor | None
    changed: slice | Tensor | None


def is_possible(x: Tensor) -> bool:
    """Whether this module can evaluate bijections at x."""
    return not (torch.is_grad_enabled() or needs_autograd(x) or x.dim() != 2 or not x.numel())


def parts_of(of: "Conditioned", dtype: torch.dtype) -> Parts | None:
    """Returns the parts of a bijection, or None if this module cannot evaluate it for vectors of a dtype."""
    # a subclass may override other methods
    if of.has_angles() or "column_parts" not in vars(type(of)):
        return None
    # attribute access on nn.Module takes ten times as long
    modules: Any = of._modules
    net, transform, linear = modules["conditioner"], modules["transform"], modules.get("linear")
    if type(net) not in NETWORKS or type(transform) not in TRANSFORMS or is_hooked(transform):
        return None
    if linear is not None and not is_matrix(linear):
        return None
    layers = net.plain_layers()
    if layers is None or layers[0][0].dtype != dtype:
        return None
    indices = of.column_parts()
    if indices is None:
        return None
    weight = None
    if linear is not None:
        weight = masked(linear.weight, linear.mask if isinstance(linear, MaskedLinear) else None)
    return Parts(net.network, transform, weight, layers, of.input_bound, *indices)


def mapped(of: "Conditioned", x: Tensor, to_base: bool) -> tuple[Tensor, Tensor] | None:
    """Computes `inverse` of a bijection at x (B, C) if `to_base`, else `forward` of a coupling.

    Returns:
        The result (B, C) and the log-determinant (B,), or None if this module cannot evaluate the bijection.
    """
    parts = parts_of(of, x.dtype) if is_possible(x) else None
    if parts is None:
        return None
    y, log_det = mapped_columns(parts, own_columns(x), to_base)
    return y.T, log_det


def own_columns(x: Tensor) -> Tensor:
    """Returns a contiguous copy (C, B) of x (B, C)."""
    return x.T.clone(memory_format=torch.contiguous_format)


def mapped_columns(parts: Parts, columns: Tensor, to_base: bool) -> tuple[Tensor, Tensor]:
    """Computes `mapped` for contiguous columns (C, B). The result of a coupling replaces them.

    Returns:
        The result (C, B) and the log-determinant (B,).
    """
    kept, changed, bound = parts.kept, parts.changed, parts.bound
    a, b = columns if kept is None else columns[kept], columns if changed is None else columns[changed]
    inputs = a if bound is None else (a / bound).tanh_().mul_(bound)
    h = hidden_rows(parts.network, inputs, parts.layers)
    last = parts.layers[-1]
    if changed is None:
        # a is b, so b may not be overwritten
        b = b if parts.linear is None else torch.addmm(b, parts.linear, a, alpha=-1)
        return elementwise(parts.transform, b, h, last, to_base)
    if to_base and parts.linear is not None:
        b.addmm_(parts.linear, a, alpha=-1)
    _, log_det = elementwise(parts.transform, b, h, last, to_base, out=b)
    if not to_base and parts.linear is not None:
        b.addmm_(parts.linear, a)
    if not isinstance(changed, slice):
        columns[changed] = b
    return columns, log_det


def elementwise(
    transform: ScaleShift | Spline, b: Tensor, h: Tensor, last: Layer, to_base: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Maps b (n, B) elementwise. The last layer computes the parameters of the map from h (B, k).

    Args:
        transform: the map.
        b: the values.
        h: the inputs of the last layer.
        last: the last layer.
        to_base: the direction of the map.
        out: where the result is written, (n, B), which may be b. None: a new tensor.

    Returns:
        The result (n, B) and the sum of its log-slopes (B,).
    """
    n, rows = b.shape
    function = transform.values_to_base if to_base else transform.values_to_data
    size = ROWS * -(-ELEMENTS[type(transform)] // (n * ROWS))
    if size >= rows or b.device.type != "cpu":
        y, log_slope = function(b, last_columns(h, last))
        return y if out is None else out.copy_(y), log_slope.sum(0)
    weight = masked(last[0], last[1])
    y, log_det = b.new_empty(n, rows) if out is None else out, b.new_empty(rows)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        y[:, part], log_slope = function(b[:, part], last_columns(h[part], last, weight))
        torch.sum(log_slope, 0, out=log_det[part])
    return y, log_det
