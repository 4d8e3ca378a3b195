"""Residual networks for vectors, dense and masked, with a hand-written gradient for speed."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.nn.conditioners import ACTIVATIONS, one_width, with_context, zero
from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.products import product
from flowtrain.utils.recorded import Recorded

# a weight, its mask or None, and its bias
Layer = tuple[Tensor, Tensor | None, Tensor]


class ResidualMLP(Recorded, nn.Module):
    """A residual network (B, n_in) -> (B, n_out).

    A linear layer, a residual block for each width, and a linear layer. A block is h + W2 D f(W1 f(h)) with dropout D,
    as in Neural Spline Flows (Durkan et al. 2019, appendix B.1). The output is initially zero. It is stored in
    column-major order, which saves `Spline` a copy.

    Args:
        n_in: number of inputs.
        hidden: widths of the blocks, all equal.
        n_out: number of outputs.
        activation: relu | tanh | swish.
        classes: the size K of the context, see `MLP`. None: no context.
        dropout: probability of dropping a hidden unit in training.

    Raises:
        ConfigError: blocks of different widths.
    """

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        activation: str = "relu",
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = one_width(hidden)
        self.classes, self.dropout = classes, dropout
        self.first = nn.Linear(n_in + (classes or 0), width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * len(hidden)))
        self.last = zero(nn.Linear(width, n_out))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns (B, n_out) for x (B, n_in) and, with classes, a context (B,) or (B, K)."""
        x = with_context(x, context, self.classes)
        layers = [_layer(module) for module in (self.first, *self.blocks, self.last)]
        drops: list[Tensor | None] = [None] * (len(self.blocks) // 2)
        if self.training and self.dropout:
            ones = x.new_ones(len(x), len(layers[0][0]))
            drops = [F.dropout(ones, self.dropout) for _ in drops]
        ordinary = transforms_active() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        if ordinary or not isinstance(self.activation, nn.ReLU):
            return _evaluated(x, layers, drops, self.activation)
        return _Relu.apply(x, drops, *(part for layer in layers for part in layer))  # type: ignore[no-untyped-call,no-any-return]


class MaskedMLP(ResidualMLP):
    """A `ResidualMLP` (B, n_in) -> (B, n_out) in which each output depends only on inputs of smaller groups.

    The weights are masked (Germain et al. 2015, MADE; with residual blocks Nash and Durkan 2019, Autoregressive energy
    machines). Hidden units of group m depend on inputs of groups up to m. Outputs of group g depend on hidden units of
    groups below g. The context is an input in a separate group below all others. The output is initially zero.

    Args:
        inputs: the group of each input, (n_in,), whole numbers from 0.
        hidden: widths of the blocks, all equal.
        outputs: the group of each output, (n_out,).
        activation, classes, dropout: as in `ResidualMLP`.

    Raises:
        ConfigError: blocks of different widths.

    Example:
        >>> net = MaskedMLP(torch.tensor([0, 1]), [8], torch.tensor([0, 1]))
        >>> _ = torch.nn.init.ones_(net.last.weight)
        >>> jacobian = torch.autograd.functional.jacobian(net, torch.randn(1, 2))[0, :, 0]
        >>> [bool(v) for v in jacobian.flatten() != 0]  # output 1 depends on input 0
        [False, False, True, False]
    """

    def __init__(
        self,
        inputs: Tensor,
        hidden: Sequence[int],
        outputs: Tensor,
        activation: str = "relu",
        classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(len(inputs), hidden, len(outputs), activation, classes, dropout)
        # hidden units of group -1 depend only on the context, or on no input
        lowest = -1 if classes or int(outputs.max()) == 0 else 0
        highest = max(int(outputs.max()) - 1, lowest)
        units = lowest + torch.arange(hidden[0], device="cpu") % (highest - lowest + 1)
        if classes:
            inputs = torch.cat([inputs, inputs.new_full((classes,), -1)])
        self.first = MaskedLinear(inputs, units)
        self.blocks = nn.ModuleList(MaskedLinear(units, units) for _ in self.blocks)
        self.last = zero(MaskedLinear(units, outputs - 1))


class MaskedLinear(nn.Linear):
    """A linear layer in which unit i depends on input j only if inputs[j] <= outputs[i].

    Args:
        inputs: the group of each input.
        outputs: the highest group that each unit depends on.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, bias: bool = True) -> None:
        super().__init__(len(inputs), len(outputs), bias)
        mask = inputs <= outputs.unsqueeze(1)
        # None if every unit depends on every input. Not a buffer, because the groups determine the mask, so that
        # checkpoints and averaged weights do not need it
        self.mask = None if bool(mask.all()) else mask.to(self.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mask = None if self.mask is None else fn(self.mask)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _masked(self.weight, self.mask), self.bias)


def _layer(module: nn.Module) -> Layer:
    assert isinstance(module, nn.Linear)
    return module.weight, module.mask if isinstance(module, MaskedLinear) else None, module.bias


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else weight * mask


def _in_parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _evaluated(x: Tensor, layers: Sequence[Layer], drops: Sequence[Tensor | None], f: nn.Module) -> Tensor:
    """Evaluates the network by differentiable operations of torch.

    Args:
        x: (B, n_in).
        layers: the first layer, two layers for each block, and the last layer.
        drops: for each block, the factors of dropout, (B, width), or None.
        f: the activation.
    """
    first, *inner, last = [(_masked(weight, mask), bias) for weight, mask, bias in layers]
    h = F.linear(x, *first)
    for (one, two), drop in zip(_in_parts(inner, 2), drops, strict=True):
        u = f(F.linear(f(h), *one))
        h = h + F.linear(u if drop is None else u * drop, *two)
    weight, bias = last
    return torch.addmm(bias.unsqueeze(1), weight, f(h).T).T


class _Relu(torch.autograd.Function):
    """`_evaluated` for relu, with a gradient that needs fewer operations and less memory than autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drops: Sequence[Tensor | None], *parts: Tensor | None) -> Tensor:
        layers: Any = _in_parts(parts, 3)
        (weight, bias), *inner, last = [(_masked(weight, mask), bias) for weight, mask, bias in layers]
        h = product(x, weight, bias)
        hidden = []
        for ((one, bias_one), (two, bias_two)), drop in zip(_in_parts(inner, 2), drops, strict=True):
            a = h.relu()
            u = product(a, one, bias_one).relu_()
            if drop is not None:
                u.mul_(drop)
            h.add_(product(u, two, bias_two))
            hidden += [a, u]
        hidden.append(h.relu_())
        ctx.drops, ctx.n = drops, len(hidden)
        ctx.save_for_backward(x, *hidden, *parts)
        weight, bias = last
        return product(weight, h).add_(bias.unsqueeze(1)).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        hidden, parts = rest[: ctx.n], rest[ctx.n :]
        if torch.is_grad_enabled() or transforms_active() or _functorch.is_legacy_batchedtensor(grad):
            return _Relu.by_autograd(ctx, x, parts, grad)
        layers = _in_parts(parts, 3)
        found: list[Tensor | None] = []

        def back(g: Tensor, a: Tensor, layer: Sequence[Any]) -> Tensor:
            """Returns the gradient of the inputs a of a linear layer, for the gradient g of its outputs.

            The gradients of its parameters are added to `found`.
            """
            weight, mask, _ = layer
            # a matrix product is slower if its result has more rows than columns
            wide = weight.shape[0] <= weight.shape[1]
            g_weight = product(g.T, a.T) if wide else product(a.T, g.T).T
            found[:0] = [g_weight if mask is None else g_weight.mul_(mask), None, g.sum(0)]
            weight = _masked(weight, mask)
            return product(g, weight.T) if wide else product(weight.T, g).T

        def through_relu(g: Tensor, a: Tensor) -> Tensor:
            found: Tensor = torch.ops.aten.threshold_backward(g, a, 0)
            return found

        g_h = through_relu(back(grad, hidden[-1], layers[-1]), hidden[-1])
        for i in reversed(range(len(ctx.drops))):
            a, u = hidden[2 * i : 2 * i + 2]
            g_u = through_relu(back(g_h, u, layers[2 * i + 2]), u)
            if ctx.drops[i] is not None:
                g_u.mul_(ctx.drops[i])
            g_h = g_h + through_relu(back(g_u, a, layers[2 * i + 1]), a)
        return back(g_h, x, layers[0]), None, *found

    @staticmethod
    def by_autograd(ctx: Any, x: Tensor, parts: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        with torch.enable_grad():
            inputs: Any = [v for v, needed in zip([x, *parts], wanted, strict=True) if needed]
            layers: Any = _in_parts(parts, 3)
            answer = _evaluated(x, layers, ctx.drops, nn.ReLU())
            given = iter(torch.autograd.grad(answer, inputs, grad, create_graph=True))
        g_x, *rest = (next(given) if needed else None for needed in wanted)
        return g_x, None, *rest
