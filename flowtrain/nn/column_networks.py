"""Networks of linear layers and relu with hand-written gradients, on activations with one column for each row of x.

Activations are (n, B), contiguous. Of all layouts, this one has the fastest products, and no operation has arguments of
two layouts, which is several times slower. A gradient needs fewer operations and less memory than with autograd.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.utils.autograd import differentiable_vjp, transforms_active
from flowtrain.utils.products import add_columns_product, columns_product, product

# a weight (m, k), its mask or None, and its bias (m,)
Layer = tuple[Tensor, Tensor | None, Tensor]
# for each hidden layer of `Plain` and each block of `Residual`, the factors of dropout, (width, B), or None
Drops = Sequence[Tensor | None]
# the parts of all layers in turn
Parts = Sequence[Tensor | None]
# looked up once, because the lookup takes as long as a small operation
_RELU_GRADIENT: Any = torch.ops.aten.threshold_backward.grad_input


class ColumnNetwork(ABC):
    """A network as three functions of the parts of its layers. The functions have no state."""

    @staticmethod
    @abstractmethod
    def evaluated(x: Tensor, layers: Sequence[Layer], drops: Drops, f: nn.Module) -> Tensor:
        """Evaluates the network (B, n_in) -> (B, n_out) with the activation f by differentiable operations of torch."""

    @staticmethod
    @abstractmethod
    def values(x: Tensor, layers: Sequence[Layer], drops: Drops) -> tuple[Tensor, list[Tensor]]:
        """Returns the outputs (n_out, B) for inputs x (n_in, B), and activations for `gradient`."""

    @staticmethod
    @abstractmethod
    def gradient(
        g: Tensor, x: Tensor, hidden: Sequence[Tensor], layers: Sequence[Layer], drops: Drops, of_parts: bool = True
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Returns the gradients of the inputs (n_in, B) and of all parts, for the gradient g (n_out, B).

        Without `of_parts`, the list of the gradients of the parts is empty.
        """


class Plain(ColumnNetwork):
    """Linear layers, with an activation and dropout between them."""

    @staticmethod
    def evaluated(x: Tensor, layers: Sequence[Layer], drops: Drops, f: nn.Module) -> Tensor:
        for (weight, mask, bias), drop in zip(layers[:-1], drops, strict=True):
            x = f(F.linear(x, masked(weight, mask), bias))
            x = x if drop is None else x * drop.T
        weight, mask, bias = layers[-1]
        return F.linear(x, masked(weight, mask), bias)

    @staticmethod
    def values(x: Tensor, layers: Sequence[Layer], drops: Drops) -> tuple[Tensor, list[Tensor]]:
        hidden: list[Tensor] = []
        for (weight, mask, bias), drop in zip(layers[:-1], drops, strict=True):
            x = columns_product(masked(weight, mask), bias, x).relu_()
            if drop is not None:
                x.mul_(drop)
            hidden.append(x)
        weight, mask, bias = layers[-1]
        return columns_product(masked(weight, mask), bias, x), hidden

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, hidden: Sequence[Tensor], layers: Sequence[Layer], drops: Drops, of_parts: bool = True
    ) -> tuple[Tensor, list[Tensor | None]]:
        found: list[Tensor | None] = []
        gradients = found if of_parts else None
        for layer, a, drop in zip(reversed(layers[1:]), reversed(hidden), reversed(drops), strict=True):
            g = _through_relu(_through_layer(g, a, layer, gradients), a)
            if drop is not None:
                g.mul_(drop)
        return _through_layer(g, x, layers[0], gradients), found


class Residual(ColumnNetwork):
    """A linear layer, residual blocks h + W2 D f(W1 f(h)) with dropout D, and a linear layer after an activation."""

    @staticmethod
    def evaluated(x: Tensor, layers: Sequence[Layer], drops: Drops, f: nn.Module) -> Tensor:
        first, *inner, last = [(masked(weight, mask), bias) for weight, mask, bias in layers]
        h = F.linear(x, *first)
        for (one, two), drop in zip(_in_parts(inner, 2), drops, strict=True):
            u = f(F.linear(f(h), *one))
            h = h + F.linear(u if drop is None else u * drop.T, *two)
        weight, bias = last
        return torch.addmm(bias.unsqueeze(1), weight, f(h).T).T

    @staticmethod
    def values(x: Tensor, layers: Sequence[Layer], drops: Drops) -> tuple[Tensor, list[Tensor]]:
        first, *inner, last = [(masked(weight, mask), bias) for weight, mask, bias in layers]
        h = columns_product(first[0], first[1], x)
        hidden = []
        for (one, two), drop in zip(_in_parts(inner, 2), drops, strict=True):
            a = h.relu()
            u = columns_product(one[0], one[1], a).relu_()
            if drop is not None:
                u.mul_(drop)
            add_columns_product(h, two[0], two[1], u)
            hidden += [a, u]
        hidden.append(h.relu_())
        return columns_product(last[0], last[1], h), hidden

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, hidden: Sequence[Tensor], layers: Sequence[Layer], drops: Drops, of_parts: bool = True
    ) -> tuple[Tensor, list[Tensor | None]]:
        found: list[Tensor | None] = []
        gradients = found if of_parts else None
        g_h = _through_relu(_through_layer(g, hidden[-1], layers[-1], gradients), hidden[-1])
        for i in reversed(range(len(drops))):
            a, u = hidden[2 * i : 2 * i + 2]
            g_u = _through_relu(_through_layer(g_h, u, layers[2 * i + 2], gradients), u)
            drop = drops[i]
            if drop is not None:
                g_u.mul_(drop)
            g_h = _through_relu(_through_layer(g_u, a, layers[2 * i + 1], gradients), a).add_(g_h)
        return _through_layer(g_h, x, layers[0], gradients), found


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the weight times its mask."""
    return weight if mask is None else weight * mask


def in_layers(parts: Parts) -> list[Layer]:
    """Returns the layers for the parts of all layers in turn."""
    layers: list[Any] = _in_parts(parts, 3)
    return layers


def in_turn(layers: Sequence[Layer]) -> list[Tensor | None]:
    """Returns the parts of all layers in turn."""
    return [part for layer in layers for part in layer]


def _in_parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _through_layer(g: Tensor, a: Tensor, layer: Layer, found: list[Tensor | None] | None) -> Tensor:
    """Returns the gradient of the inputs a (k, B) of a linear layer, for the gradient g (m, B) of its outputs.

    The gradients of the parts of the layer are inserted at the start of `found`, unless it is None.
    """
    weight, mask, _ = layer
    if found is not None:
        # MKL is slow if the second matrix has few columns
        g_weight = product(a, g).T.contiguous() if len(a) < len(g) and a.is_cpu else product(g, a)
        found[:0] = [g_weight if mask is None else g_weight.mul_(mask), None, g.sum(1)]
    return product(masked(weight, mask).T, g.T)


def _through_relu(g: Tensor, a: Tensor) -> Tensor:
    """Overwrites g, the gradient of the output a of relu, by the gradient of the input, and returns it."""
    found: Tensor = _RELU_GRADIENT(g, a, 0, grad_input=g)
    return found


class ColumnFunction(torch.autograd.Function):
    """`evaluated` of a network with relu, with the hand-written gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, network: type[ColumnNetwork], drops: Drops, *parts: Tensor | None) -> Tensor:
        answer, hidden = network.values(x.T, in_layers(parts), drops)
        ctx.network, ctx.drops, ctx.n = network, drops, len(hidden)
        ctx.save_for_backward(x, *hidden, *parts)
        return answer.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        hidden, parts = rest[: ctx.n], rest[ctx.n :]
        if torch.is_grad_enabled() or transforms_active() or _functorch.is_legacy_batchedtensor(grad):
            return ColumnFunction.by_autograd(ctx, x, parts, grad)
        g_x, found = ctx.network.gradient(grad.T, x.T, hidden, in_layers(parts), ctx.drops)
        return g_x.T, None, None, *found

    @staticmethod
    def by_autograd(ctx: Any, x: Tensor, parts: Parts, grad: Tensor) -> tuple[Any, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""

        def evaluated(x: Tensor, *parts: Tensor | None) -> list[Tensor]:
            return [ctx.network.evaluated(x, in_layers(parts), ctx.drops, nn.ReLU())]

        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        g_x, *rest = differentiable_vjp(evaluated, [x, *parts], needed, [grad])
        return g_x, None, None, *rest


def weights_of(module: Any, kind: type[nn.Linear] = nn.Linear) -> Layer | None:
    """Returns the weight, the mask or None, and the bias of a linear layer.

    Returns None for a layer that the kernels do not know and that must be called: a layer of another class than `kind`
    (such as a layer of a user, or a parametrized layer), a layer with a hook, or a layer without a bias.
    """
    if type(module) is not kind or is_hooked(module):
        return None
    # attribute access takes longer, and is needed only if the parameters have been replaced
    own: Any = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None:
        weight, bias = module.weight, module.bias
    return None if bias is None else (weight, vars(module).get("mask"), bias)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has a hook, which only a call of the module runs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
