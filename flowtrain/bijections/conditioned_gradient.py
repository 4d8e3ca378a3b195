"""The hand-written gradient of couplings and autoregressive maps of vectors, from data to base.

A layer of a table flow consists of about 20 small operations. Autograd takes longer to record and to replay them than
to compute them. Here a layer is one operation of autograd.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.elementwise import Elementwise
from flowtrain.nn.column_networks import ColumnNetwork, Layer, Parts, in_layers, in_turn, is_hooked, masked
from flowtrain.nn.conditioners import MLP
from flowtrain.nn.residual_mlp import MaskedLinear, MaskedMLP, ResidualMLP, is_matrix
from flowtrain.utils.autograd import differentiable_vjp, needs_autograd

# the networks with a hand-written gradient; a subclass may compute another function
NETWORKS = (MLP, ResidualMLP, MaskedMLP)


def bounded(x: Tensor, bound: float | None) -> Tensor:
    """Returns bound * tanh(x / bound), or x if the bound is None."""
    return x if bound is None else bound * torch.tanh(x / bound)


class Conditioned(Bijection):
    """A bijection x_b = f(z_b; theta(c)) + W z_a, c = B tanh(z_a / B), see `flowtrain.bijections.Coupling`.

    Subclasses define the parts a and b.

    Attributes:
        conditioner: the network that computes theta.
        transform: f.
        input_bound: B, or None.
        linear: W, or None.
    """

    conditioner: nn.Module
    transform: Elementwise
    input_bound: float | None
    linear: nn.Module | None

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits x (B, C, ...) into a and b, each (B, n, ...)."""

    @abstractmethod
    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Returns x (B, C, ...) with the new part `b`."""

    def gradient_of_split(self, g: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor | None:
        """Returns the gradient of x, (B, C).

        None, the default, means that the class has no hand-written gradient.

        Args:
            g: the gradient of the result of `join`, (B, C).
            of_a: the gradient of a as the input of theta and W, (B, n).
            of_b: the gradient of b before its map, (B, n).
        """
        return None

    def gradient_of_join(self, g: Tensor) -> Tensor:
        """Returns the gradient of the new part b, (B, n), for the gradient g of the result of `join`."""
        return self.split(g)[1]

    def column_parts(self) -> tuple[slice | Tensor | None, slice | Tensor | None] | None:
        """Returns the indices of the parts a and b of vectors, or None if the parts are not columns.

        An index of None stands for all columns.
        """
        return None

    @property
    def network(self) -> type[ColumnNetwork]:
        """The functions that compute the conditioner."""
        net = self.conditioner
        assert isinstance(net, MLP | ResidualMLP)
        return net.network

    @property
    def n_drops(self) -> int:
        """The number of factors of dropout of the conditioner."""
        net = self.conditioner
        assert isinstance(net, MLP | ResidualMLP)
        return net.n_drops

    def drops(self, x: Tensor) -> list[Tensor | None]:
        """Draws the factors of dropout of the conditioner, each (width, B), for vectors x (B, d)."""
        net = self.conditioner
        assert isinstance(net, MLP | ResidualMLP)
        return net.drops(x)

    def plain_layers(self, x: Tensor, dropout: bool = False) -> list[Layer] | None:
        """Returns the linear layers of the conditioner for vectors x, or None if there is no hand-written gradient.

        A hand-written gradient exists for networks in NETWORKS without context and hooks, for transforms with a
        gradient and without hooks, and for vectors of the dtype of the network without angles.

        Args:
            dropout: whether the caller applies the factors of `drops`. If not, the result is None for a conditioner
                that drops hidden units.
        """
        net, linear = self.conditioner, self.linear
        if (
            type(net) not in NETWORKS
            or not self.transform.has_gradient
            or self.has_angles()
            or is_hooked(self.transform)
        ):
            return None
        assert isinstance(net, MLP | ResidualMLP)
        layers = net.plain_layers(dropout)
        if layers is None or layers[0][0].dtype != x.dtype or (linear is not None and not is_matrix(linear)):
            return None
        return layers

    def linear_weight(self) -> Tensor | None:
        """Returns W, or None if there is no W."""
        linear = self.linear
        if linear is None:
            return None
        weight: Any = linear.weight
        return masked(weight, linear.mask if isinstance(linear, MaskedLinear) else None)

    def network_inputs(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns (B tanh(a / B), tanh(a / B)) without autograd. The second value is None if there is no bound."""
        bound = self.input_bound
        if bound is None:
            return a, None
        tanh = (a / bound).tanh_()
        return tanh * bound, tanh

    def by_hand(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Computes `inverse` as one operation of autograd, or returns None if this is not possible."""
        if x.dim() != 2 or context is not None or not x.numel() or needs_autograd(x):
            return None
        # a subclass may override other methods
        layers = self.plain_layers(x, dropout=True) if "gradient_of_split" in vars(type(self)) else None
        if layers is None:
            return None
        drops = self.drops(x)
        weight = None if self.linear is None else self.linear.weight
        mask = self.linear.mask if isinstance(self.linear, MaskedLinear) else None
        return ToBase.apply(x, self, self.network, drops, weight, mask, *in_turn(layers))  # type: ignore[no-untyped-call,no-any-return]

    @abstractmethod
    def has_angles(self) -> bool:
        """Whether some elements are angles."""


class ToBase(torch.autograd.Function):
    """`Conditioned.inverse`: (z, log|det dz/dx|), with a hand-written gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        of: Conditioned,
        network: type[ColumnNetwork],
        drops: list[Tensor | None],
        weight: Tensor | None,
        mask: Tensor | None,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        a, b = (part.T.contiguous() for part in of.split(x))
        inputs, tanh = of.network_inputs(a)
        theta, hidden = network.values(inputs, in_layers(parts), drops)
        if weight is not None:
            b = torch.addmm(b, masked(weight, mask), a, alpha=-1)
        z, log_slope, kept = of.transform.columns_to_base(b, theta)
        ctx.of, ctx.network, ctx.drops, ctx.sizes = of, network, drops, (len(kept), len(hidden))
        ctx.save_for_backward(x, weight, mask, a, tanh, inputs, *kept, *hidden, *parts)
        return of.join(x, a.T, z.T), log_slope.sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> tuple[Any, ...]:
        x, weight, mask, a, tanh, inputs, *rest = ctx.saved_tensors
        n_kept, n_hidden = ctx.sizes
        kept, hidden, parts = rest[:n_kept], rest[n_kept : n_kept + n_hidden], rest[n_kept + n_hidden :]
        batched = any(_functorch.is_legacy_batchedtensor(g) for g in (grad, grad_log))
        if torch.is_grad_enabled() or batched or needs_autograd(x):
            return ToBase.by_autograd(ctx, x, weight, mask, parts, grad, grad_log)
        of: Conditioned = ctx.of
        g_z = of.gradient_of_join(grad).T
        g_b, g_theta = of.transform.columns_gradient(kept, g_z, grad_log)
        g_a, found = ctx.network.gradient(g_theta, inputs, hidden, in_layers(parts), ctx.drops)
        if of.input_bound is not None:
            g_a = torch.ops.aten.tanh_backward(g_a, tanh)
        g_weight = None
        if weight is not None:
            g_weight = (g_b @ a.T).neg_()
            g_weight = g_weight if mask is None else g_weight.mul_(mask)
            g_a = torch.addmm(g_a, masked(weight, mask).T, g_b, alpha=-1)
        return of.gradient_of_split(grad, g_a.T, g_b.T), None, None, None, g_weight, None, *found

    @staticmethod
    def by_autograd(
        ctx: Any, x: Tensor, weight: Tensor | None, mask: Tensor | None, parts: Parts, grad: Tensor, grad_log: Tensor
    ) -> tuple[Any, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""
        of: Conditioned = ctx.of

        def evaluated(x: Tensor, weight: Tensor | None, *parts: Tensor | None) -> tuple[Tensor, Tensor]:
            a, b = of.split(x)
            theta = ctx.network.evaluated(bounded(a, of.input_bound), in_layers(parts), ctx.drops, nn.ReLU())
            if weight is not None:
                b = b - F.linear(a, masked(weight, mask))
            z, log_slope = of.transform.to_base(b, theta)
            return of.join(x, a, z), log_slope.sum(1)

        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[4], *ctx.needs_input_grad[6:]]
        found = differentiable_vjp(evaluated, [x, weight, *parts], needed, [grad, grad_log])
        return found[0], None, None, None, found[1], None, *found[2:]
