"""Computes autoregressive maps from base to data without gradients, in the time of one evaluation of the network.

The direct algorithm evaluates the whole masked network once for each group of elements. A hidden unit depends only on
the elements of the first groups, up to the group of the unit. Here each unit is computed once, as soon as these
elements are known. Elements are computed in one step if they depend on the same units. A network of 64 units has at
most 65 steps, for any number of elements.
"""

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.evaluation import is_possible, parts_of
from flowtrain.nn.residual_mlp import MaskedMLP

if TYPE_CHECKING:
    from flowtrain.bijections.autoregressive import Autoregressive

# the largest batch for which a step multiplies by all units, where unknown units are 0. This needs fewer operations of
# torch, but twice as many multiplications
FEW = 256


class Plan(NamedTuple):
    """The steps of `to_data`.

    Attributes:
        elements: the positions of the elements in the order of the steps, (d,). None if the elements have this order.
        back: the inverse permutation of `elements`, (d,), or None.
        units: the positions of the hidden units in the order of the steps, (H',). None if the units have this order.
        n_elements, n_units: the number of new elements and of new units in each step.
    """

    elements: Tensor | None
    back: Tensor | None
    units: Tensor | None
    n_elements: list[int]
    n_units: list[int]


def plan(groups: Tensor, net: MaskedMLP, merge: bool) -> Plan | None:
    """Returns the steps for the groups (d,) of the elements, or None if the network has other groups.

    Args:
        groups: the groups.
        net: the network.
        merge: whether elements of several groups may be computed in one step. This is false if elements depend on each
            other directly, by W.
    """
    of_elements: list[int] = groups.tolist()
    of_inputs, of_units, of_outputs = net.groups
    d = len(of_elements)
    if of_inputs != of_elements or len(of_outputs) % d or of_outputs != of_elements * (len(of_outputs) // d):
        return None
    n_elements: list[int] = []
    n_units: list[int] = []
    known = 0
    for group in range(max(of_elements) + 1):
        size, needed = of_elements.count(group), sum(unit < group for unit in of_units)
        if merge and n_units and needed == known:
            n_elements[-1] += size
            continue
        n_elements.append(size)
        n_units.append(needed - known)
        known = needed
    elements = _order(of_elements, d, groups.device)
    back = None if elements is None else elements.argsort()
    return Plan(elements, back, _order(of_units, known, groups.device), n_elements, n_units)


def _order(groups: list[int], n: int, device: torch.device) -> Tensor | None:
    """Returns the first n positions in the order of their groups, or None if all positions have this order."""
    order = sorted(range(len(groups)), key=groups.__getitem__)[:n]
    return None if order == list(range(len(groups))) else torch.tensor(order, device=device)


def to_data(of: "Autoregressive", z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Computes `Autoregressive.forward` at z (B, d) without a context, or returns None if this is not possible."""
    parts = parts_of(of, z.dtype) if is_possible(z) else None
    steps = None if parts is None else of.steps()
    if parts is None or steps is None:
        return None
    transform, layers, (d, rows) = parts.transform, parts.layers, z.T.shape
    elements, units = steps.elements, steps.units
    bound, size = of.input_bound, len(layers[-1][0]) // d
    # in the order of the steps, products with known units need no masks
    first = _sorted(layers[0][0], units, elements).split_with_sizes(steps.n_units)
    inner = [_sorted(weight, units, units).split_with_sizes(steps.n_units) for weight, _, _ in layers[1:-1]]
    biases = [_taken(bias, units, 0).unsqueeze(1).split_with_sizes(steps.n_units) for _, _, bias in layers[:-1]]
    last = _taken(_taken(layers[-1][0].view(size, d, -1), elements, 1), units, 2).split_with_sizes(steps.n_elements, 1)
    last_bias = _taken(layers[-1][2].view(size, d), elements, 1).split_with_sizes(steps.n_elements, 1)
    linear = (
        None if parts.linear is None else _sorted(parts.linear, elements, elements).split_with_sizes(steps.n_elements)
    )

    few = rows <= FEW
    new = z.new_zeros if few else z.new_empty
    x = new(d, rows)
    inputs = x if bound is None else new(d, rows)
    # the inputs of each layer after the first one
    hidden = [new(sum(steps.n_units), rows) for _ in layers[1:]]
    units_of = [one.split_with_sizes(steps.n_units) for one in hidden]
    z_parts, x_parts = _taken(z.T, elements, 0).split_with_sizes(steps.n_elements), x.split_with_sizes(steps.n_elements)
    input_parts = inputs.split_with_sizes(steps.n_elements)
    log_slopes = []
    known = 0
    ends = list(accumulate(steps.n_units))
    for i, (n_new, end) in enumerate(zip(steps.n_units, ends, strict=True)):
        if n_new:
            stop = d if few else known
            h = torch.addmm(biases[0][i], first[i][:, :stop], inputs[:stop])
            torch.clamp_min(h, 0, out=units_of[0][i])
            for k in range(0, len(inner), 2):
                u = _product(biases[k + 1][i], inner[k][i], hidden[k], end, few)
                torch.clamp_min(u, 0, out=units_of[k + 1][i])
                h = h.add_(_product(biases[k + 2][i], inner[k + 1][i], hidden[k + 1], end, few))
                torch.clamp_min(h, 0, out=units_of[k + 2][i])
        n = steps.n_elements[i]
        weight = last[i][:, 0] if n == 1 else last[i].flatten(0, 1)
        theta = _product(last_bias[i].reshape(-1, 1), weight, hidden[-1], end, few)
        y, log_slope = transform.values_to_data(z_parts[i], theta)
        if linear is not None and known:
            stop = d if few else known
            y = y.addmm_(linear[i][:, :stop], x[:stop])
        x_parts[i].copy_(y)
        if bound is not None:
            torch.mul((y / bound).tanh_(), bound, out=input_parts[i])
        log_slopes.append(log_slope)
        known += n
    return _taken(x, steps.back, 0).T, torch.cat(log_slopes).sum(0)


def _sorted(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return _taken(_taken(weight, rows, 0), columns, 1)


def _taken(x: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return x if index is None else x.index_select(dim, index)


def _product(bias: Tensor, weight: Tensor, x: Tensor, known: int, few: bool) -> Tensor:
    """Returns W x + bias, (n, B), for the first `known` units x (H, B), or for all units if `few`."""
    return torch.addmm(bias, weight, x) if few else torch.addmm(bias, weight[:, :known], x[:known])
