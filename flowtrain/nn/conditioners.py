"""Conditioners: the networks that compute the parameters of a coupling or of an autoregressive map."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.recorded import Recorded

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "swish": nn.SiLU}


def zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer, its answer zero: a coupling begins as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(Recorded, nn.Sequential):
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
        activation: str = "relu",
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
        x = with_label(x, label, self.classes)
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y


class ResidualMLP(Recorded, nn.Module):
    """(B, n_in) -> (B, n_out): linear, a residual block for each width, linear; zero at its start.

    A block is h + W2 D f(W1 f(h)) with dropout D, as in Neural Spline Flows (Durkan et al. 2019, appendix B.1).

    Args:
        hidden: the widths, the same for every block.
        activation, classes, dropout: as in `MLP`.

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
        self.classes = classes
        self.first = nn.Linear(n_in + (classes or 0), width)
        self.blocks = residual_blocks(lambda: nn.Linear(width, width), hidden, activation, dropout)
        self.activation = ACTIVATIONS[activation]()
        self.last = zero(ColumnLinear(width, n_out))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out) of x (B, n_in); labels (B,) where there are classes."""
        h = self.first(with_label(x, label, self.classes))
        for block in self.blocks:
            h = h + block(h)
        y: Tensor = self.last(self.activation(h))
        return y


class MaskedMLP(Recorded, nn.Module):
    """(B, n_in) -> (B, n_out) where each output depends only on inputs of smaller groups; zero at its start.

    A `ResidualMLP` whose weights are masked (Germain et al. 2015, MADE; with residual blocks Nash and Durkan 2019,
    Autoregressive energy machines). The hidden units of group m depend on inputs of groups up to m, and outputs of
    group g on hidden units of groups below g. Labels count as inputs of a group below all others.

    Args:
        inputs: the group of each input, whole numbers from 0, (n_in,).
        hidden: the widths, the same for every block.
        outputs: the group of each output, (n_out,).
        activation, classes, dropout: as in `MLP`.

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
        super().__init__()
        width = one_width(hidden)
        self.classes = classes
        # units that depend on labels alone, or on nothing
        lowest = -1 if classes or int(outputs.max()) == 0 else 0
        highest = max(int(outputs.max()) - 1, lowest)
        units = lowest + torch.arange(width, device="cpu") % (highest - lowest + 1)
        if classes:
            inputs = torch.cat([inputs, inputs.new_full((classes,), -1)])
        self.first = MaskedLinear(inputs, units)
        self.blocks = residual_blocks(lambda: MaskedLinear(units, units), hidden, activation, dropout)
        self.activation = ACTIVATIONS[activation]()
        self.last = zero(MaskedLinear(units, outputs - 1, columns=True))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out) of x (B, n_in); labels (B,) where there are classes."""
        h = self.first(with_label(x, label, self.classes))
        for block in self.blocks:
            h = h + block(h)
        y: Tensor = self.last(self.activation(h))
        return y


class ColumnLinear(nn.Linear):
    """A linear layer for inputs (B, n_in) whose answer (B, n_out) is stored column by column.

    `Spline` works along the columns of its parameters, which spares it a copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x.T).T


class MaskedLinear(ColumnLinear):
    """A linear layer whose unit i sees input j if inputs[j] <= outputs[i].

    Args:
        inputs: the group of each input.
        outputs: the highest group that each unit sees.
        columns: whether the answer is stored column by column.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, bias: bool = True, columns: bool = False) -> None:
        super().__init__(len(inputs), len(outputs), bias)
        self.columns = columns
        self.register_buffer("mask", inputs <= outputs.unsqueeze(1))

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask
        if self.columns:
            return torch.addmm(self.bias.unsqueeze(1), weight, x.T).T
        return F.linear(x, weight, self.bias)


def one_width(hidden: Sequence[int]) -> int:
    """The width of residual blocks.

    Raises:
        ConfigError: there is not exactly one width.
    """
    if len(set(hidden)) != 1:
        raise ConfigError(
            f"model.hidden={list(hidden)}: the blocks of a residual network are all of one width, as in [32,32]"
        )
    return hidden[0]


def residual_blocks(
    linear: Callable[[], nn.Linear], hidden: Sequence[int], activation: str, dropout: float
) -> nn.ModuleList:
    """The changes W2 D f(W1 f(h)) that residual blocks add to h, one for each width."""

    def block() -> nn.Sequential:
        drop = [nn.Dropout(dropout)] if dropout else []
        # the names of the weights are the same with and without dropout
        return nn.Sequential(
            ACTIVATIONS[activation](), linear(), nn.Sequential(ACTIVATIONS[activation](), *drop), linear()
        )

    return nn.ModuleList(block() for _ in hidden)


def with_label(x: Tensor, label: Tensor | None, classes: int | None) -> Tensor:
    """x (B, n) and the labels (B,) one-hot, (B, n + classes); x where there are no classes."""
    if classes is None:
        return x
    assert label is not None
    # not F.one_hot, which vmap refuses
    return torch.cat([x, F.embedding(label, torch.eye(classes, dtype=x.dtype, device=x.device))], 1)


class ConvNet(Recorded, nn.Module):
    """(B, n_in, H, W) -> (B, n_out, H, W): 3x3, then 1x1 for each further width, then 3x3; zero at its start.

    The network of Glow's couplings (Kingma and Dhariwal 2018, section 3.3).

    Args:
        hidden: channels of the hidden layers, at least one.
        activation: relu | tanh | swish.
        classes: how many there are of the labels (B,), each of which shifts the first hidden layer; None takes none.
        size: (H, W), for a shift of the first hidden layer at each place; None for a network that is the same at all.
    """

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        activation: str = "relu",
        classes: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.first = InformedConv(n_in, hidden[0], classes, size)
        self.middle = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(hidden))
        self.last = zero(nn.Conv2d(hidden[-1], n_out, 3, padding="same"))
        self.activation = ACTIVATIONS[activation]()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out, H, W) of x (B, n_in, H, W); labels (B,) where there are classes."""
        h = self.first(x, label)
        for layer in self.middle:
            h = layer(self.activation(h))
        y: Tensor = self.last(self.activation(h))
        return y


class ResidualNet(Recorded, nn.Module):
    """(B, n_in, H, W) -> (B, n_out, H, W): 3x3, a residual block h + W2 * f(W1 * f(h)) for each width, 3x3.

    The network of Real NVP's couplings (Dinh et al. 2017, section 4.1; pre-activation blocks of He et al. 2016), zero
    at its start. With `batch_norm` every convolution of a block has one before it.

    Args:
        hidden: the channels, the same for every block.
        activation, classes, size: as in `ConvNet`.

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
        size: tuple[int, int] | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        width = one_width(hidden)
        self.first = InformedConv(n_in, width, classes, size)
        self.blocks = nn.ModuleList(Block(width, activation, batch_norm) for _ in hidden)
        self.activation = ACTIVATIONS[activation]()
        self.last = zero(nn.Conv2d(width, n_out, 3, padding="same"))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out, H, W) of x (B, n_in, H, W); labels (B,) where there are classes."""
        h = self.first(x, label)
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.last(self.activation(h))
        return y


class Block(nn.Sequential):
    """h + W2 * f(n(W1 * f(n(h)))), n batch normalisation or nothing."""

    def __init__(self, width: int, activation: str, batch_norm: bool) -> None:
        def half() -> list[nn.Module]:
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            return [*norm, ACTIVATIONS[activation](), nn.Conv2d(width, width, 3, padding="same")]

        super().__init__(*half(), *half())

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, H, W) of h, of the same shape."""
        change: Tensor = super().forward(h)  # type: ignore[no-untyped-call]
        return h + change


class InformedConv(Recorded, nn.Conv2d):
    """W * x + b + E[label] + P, E one vector of channels for each class, P one for each place of an image."""

    def __init__(self, n_in: int, n_out: int, classes: int | None, size: tuple[int, int] | None) -> None:
        super().__init__(n_in, n_out, 3, padding="same")
        self.embedding = None if classes is None else nn.Parameter(torch.zeros(classes, n_out))
        self.places = None if size is None else nn.Parameter(torch.zeros(1, n_out, *size))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, n_out, H, W) of x (B, n_in, H, W); labels (B,) where there are classes."""
        # only a matter of speed, and refused by vmap
        y = super().forward(x if transforms_active() else x.contiguous(memory_format=torch.channels_last))
        if self.embedding is not None:
            assert label is not None
            y = y + F.embedding(label, self.embedding).unsqueeze(-1).unsqueeze(-1)
        return y if self.places is None else y + self.places
