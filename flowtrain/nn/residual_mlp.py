"""Residual networks for vectors, dense and masked, with a hand-written gradient for speed."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.nn.column_networks import ColumnFunction, Layer, Residual, in_turn, is_hooked, masked, weights_of
from flowtrain.nn.conditioners import ACTIVATIONS, one_width, with_context, zero
from flowtrain.nn.dropout import dropout_factors
from flowtrain.utils.autograd import needs_autograd
from flowtrain.utils.recorded import Recorded


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

    network = Residual
    # the class of the layers
    kind: type[nn.Linear] = nn.Linear

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
        layers = self.layers()
        if layers is None:
            return self._called(x)
        drops = self.drops(x)
        if needs_autograd(x) or not self._has_relu():
            return Residual.evaluated(x, layers, drops, self.activation)
        return ColumnFunction.apply(x, Residual, drops, *in_turn(layers))  # type: ignore[no-untyped-call,no-any-return]

    def _called(self, x: Tensor) -> Tensor:
        """Returns `forward` for inputs that include the context, by calls of the layers."""
        h, blocks = self.first(x), list(self.blocks)
        for one, two in zip(blocks[::2], blocks[1::2], strict=True):
            h = h + two(F.dropout(self.activation(one(self.activation(h))), self.dropout, self.training))
        y: Tensor = self.last(self.activation(h))
        return y

    def _has_relu(self) -> bool:
        return type(self.activation) is nn.ReLU and not is_hooked(self.activation)

    def layers(self) -> list[Layer] | None:
        """Returns the first layer, two of each block, and the last layer. None if one of them must be called."""
        # attribute access takes longer
        own = self._modules
        blocks = own["blocks"]
        assert blocks is not None
        found = []
        for module in (own["first"], *blocks._modules.values(), own["last"]):
            layer = weights_of(module, self.kind)
            if layer is None:
                return None
            found.append(layer)
        return found

    @property
    def n_drops(self) -> int:
        """The number of blocks."""
        return len(self.blocks) // 2

    def drops(self, x: Tensor) -> list[Tensor | None]:
        """Draws the factors of dropout of each block, (width, B), for inputs (B, n). None without dropout."""
        rate, width = self.dropout if self.training else 0.0, self.first.out_features
        return [dropout_factors(rate, width, x) for _ in range(self.n_drops)]

    def plain_layers(self, dropout: bool = False) -> list[Layer] | None:
        """Returns `layers`, or None if there is a context, a hook, or another activation than relu.

        If hidden units are dropped, the result is None unless `dropout` is true.
        """
        ordinary = self.classes is None and self._has_relu() and not is_hooked(self)
        return self.layers() if ordinary and (dropout or not (self.training and self.dropout)) else None


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
        # the groups of the inputs without the context, of the hidden units, and of the outputs
        self.groups: tuple[list[int], list[int], list[int]] = inputs.tolist(), units.tolist(), outputs.tolist()
        if classes:
            inputs = torch.cat([inputs, inputs.new_full((classes,), -1)])
        self.kind = MaskedLinear
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
        return F.linear(x, masked(self.weight, self.mask), self.bias)


def is_matrix(linear: nn.Module) -> bool:
    """Whether a layer is only a product with its weight: a plain or masked linear layer without a bias or a hook."""
    return type(linear) in (nn.Linear, MaskedLinear) and linear.bias is None and not is_hooked(linear)
