"""The inverse of a chain of autoregressive maps as one operation of autograd.

Each operation of torch has an overhead of a few microseconds, as much as the arithmetic of a small layer. Here the
activations have the layout (columns, B) in all maps, and one operation applies the masks of all matrices.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection
from flowtrain.bijections.conditioned_gradient import bounded
from flowtrain.bijections.elementwise import Elementwise
from flowtrain.bijections.scale import ActNorm
from flowtrain.nn.column_networks import ColumnNetwork, Layer, masked
from flowtrain.nn.residual_mlp import MaskedLinear
from flowtrain.utils.autograd import differentiable_vjp, needs_autograd

Masks = Sequence[Tensor | None]


class Map(NamedTuple):
    """The parts of an autoregressive map. Attribute access on nn.Module is slower.

    Attributes:
        of: the map.
        network: the functions that compute the conditioner.
        transform: the elementwise map.
        drops: the factors of dropout of the conditioner.
        depth: the number of linear layers of the conditioner.
        has_linear: whether the map has a matrix W, see `Autoregressive`.
    """

    of: Autoregressive
    network: type[ColumnNetwork]
    transform: Elementwise
    drops: list[Tensor | None]
    depth: int
    has_linear: bool


class Plan(NamedTuple):
    """Autoregressive maps from data to base.

    Attributes:
        maps: the maps.
        masks: the mask of each matrix, or None. The matrices of each map are W, if the map has one, and the weights of
            the linear layers.
    """

    maps: list[Map]
    masks: list[Tensor | None]

    def parts(
        self, matrices: Sequence[Tensor], masks: Masks, biases: Sequence[Tensor]
    ) -> Iterator[tuple[Map, Tensor | None, list[Layer]]]:
        """Yields (map, W times its mask or None, linear layers) for each map."""
        weights, rest = zip(matrices, masks, strict=True), iter(biases)
        for one in self.maps:
            linear = masked(*next(weights)) if one.has_linear else None
            yield one, linear, [(*next(weights), next(rest)) for _ in range(one.depth)]


def to_base(bijections: Sequence[Bijection], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Computes the inverse of autoregressive maps at x (B, d), or returns None if this is not possible.

    Args:
        bijections: the maps, from data to base. The first one may be an ActNorm.
        x: the vectors. The maps have no context.
    """
    norm, maps = None, bijections
    if bijections and type(bijections[0]) is ActNorm:
        norm, maps = bijections[0], bijections[1:]
        if norm.shift.dtype != x.dtype:
            return None
    if x.dim() != 2 or not x.numel() or needs_autograd(x):
        return None
    found: list[Map] = []
    networks: list[Any] = []
    matrices: list[Any] = []
    masks: list[Any] = []
    biases: list[Tensor] = []
    for one in maps:
        layers = one.plain_layers(x, dropout=True) if type(one) is Autoregressive else None
        if layers is None:
            return None
        assert isinstance(one, Autoregressive)
        # attribute access on nn.Module takes ten times as long
        modules: Any = one._modules
        if (linear := modules.get("linear")) is not None:
            matrices.append(linear.weight)
            masks.append(linear.mask if isinstance(linear, MaskedLinear) else None)
        for weight, mask, bias in layers:
            matrices.append(weight)
            masks.append(mask)
            biases.append(bias)
        networks.append(modules["conditioner"])
        found.append(Map(one, networks[-1].network, modules["transform"], [], len(layers), linear is not None))
    if not found:
        return None
    # drawn after the checks of all maps, so that a result of None leaves the random generator unchanged
    found = [one._replace(drops=net.drops(x)) for one, net in zip(found, networks, strict=True)]
    shift, log_scale = (None, None) if norm is None else (norm.shift, norm.log_scale)
    plan = Plan(found, masks)
    return _ToBase.apply(x, plan, shift, log_scale, *matrices, *biases)  # type: ignore[no-untyped-call,no-any-return]


class _ToBase(torch.autograd.Function):
    """The maps of a `Plan`, after the ActNorm: x (B, d) -> (z (B, d), the log-determinant (B,))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Plan, shift: Tensor | None, log_scale: Tensor | None, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        n = len(plan.masks)
        matrices, biases = _masked(parts[:n], plan.masks), parts[n:]
        z, factor = x.T.contiguous(), None
        if shift is not None and log_scale is not None:
            factor = (-log_scale).exp_().unsqueeze(1)
            # x * factor - shift * factor would lose digits of data far from 0
            z = (z - shift.unsqueeze(1)).mul_(factor)
        log_slopes: list[Tensor] = []
        kept: list[Sequence[Tensor]] = []
        for one, linear, layers in plan.parts(matrices, [None] * n, biases):
            inputs, tanh = one.of.network_inputs(z)
            theta, hidden = one.network.values(inputs, layers, one.drops)
            b = z if linear is None else torch.addmm(z, linear, z, alpha=-1)
            after, log_slope, of_transform = one.transform.columns_to_base(b, theta)
            log_slopes.append(log_slope)
            kept += [(z, inputs, *hidden), () if tanh is None else (tanh,), of_transform]
            z = after
        ctx.plan, ctx.sizes = plan, [len(one) for one in kept]
        ctx.save_for_backward(x, shift, log_scale, factor, *parts, *matrices, *(v for one in kept for v in one))
        log_det = torch.cat(log_slopes).sum(0)
        return z.T, log_det if log_scale is None else log_det.sub_(log_scale.sum())

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        n, m = len(plan.masks), sum(one.depth for one in plan.maps)
        x, shift, log_scale, factor, *rest = ctx.saved_tensors
        parts, matrices, flat = rest[: n + m], rest[n + m : 2 * n + m], iter(rest[2 * n + m :])
        batched = any(_functorch.is_legacy_batchedtensor(g) for g in (grad, grad_log))
        if torch.is_grad_enabled() or batched or needs_autograd(x):
            return _ToBase.by_autograd(ctx, x, shift, log_scale, parts, grad, grad_log)
        kept = [list(islice(flat, size)) for size in ctx.sizes]
        g = grad.T.contiguous()
        of_matrices: list[Tensor] = []
        of_biases: list[Tensor] = []
        for one, linear, layers in reversed(list(plan.parts(matrices, [None] * n, parts[n:]))):
            of_transform, tanh, (z, inputs, *hidden) = kept.pop(), kept.pop(), kept.pop()
            g_b, g_theta = one.transform.columns_gradient(of_transform, g, grad_log)
            g, found = one.network.gradient(g_theta, inputs, hidden, layers, one.drops)
            if tanh:
                g = torch.ops.aten.tanh_backward(g, *tanh)
            of_matrices[:0], of_biases[:0] = found[::3], found[2::3]  # type: ignore[assignment]
            if linear is not None:
                g.addmm_(linear.T, g_b, alpha=-1)
                of_matrices.insert(0, (g_b @ z.T).neg_())
            g.add_(g_b)
        _mask_in_place(of_matrices, plan.masks)
        g_shift = g_scale = None
        if factor is not None:
            # z is the input of the first map
            g_scale = (g * z).sum(1).add_(grad_log.sum()).neg_()
            g_shift = g.mul_(factor).sum(1).neg_()
        return g.T, None, g_shift, g_scale, *of_matrices, *of_biases

    @staticmethod
    def by_autograd(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        log_scale: Tensor | None,
        parts: Sequence[Tensor],
        grad: Tensor,
        grad_log: Tensor,
    ) -> tuple[Any, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""
        plan: Plan = ctx.plan
        n = len(plan.masks)

        def evaluated(
            x: Tensor, shift: Tensor | None, log_scale: Tensor | None, *parts: Tensor
        ) -> tuple[Tensor, Tensor]:
            log_det = torch.zeros_like(x[:, 0])
            if shift is not None and log_scale is not None:
                x, log_det = (x - shift) * (-log_scale).exp(), log_det - log_scale.sum()
            for one, linear, layers in plan.parts(parts[:n], plan.masks, parts[n:]):
                theta = one.network.evaluated(bounded(x, one.of.input_bound), layers, one.drops, nn.ReLU())
                b = x if linear is None else x - F.linear(x, linear)
                x, log_slope = one.transform.to_base(b, theta)
                log_det = log_det + log_slope.sum(1)
            return x, log_det

        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        g_x, *others = differentiable_vjp(evaluated, [x, shift, log_scale, *parts], needed, [grad, grad_log])
        return g_x, None, *others


def _masked(matrices: Sequence[Tensor], masks: Masks) -> list[Tensor]:
    """Returns the products of the matrices with their masks."""
    found = list(matrices)
    places = [i for i, mask in enumerate(masks) if mask is not None]
    if places:
        products = torch._foreach_mul([matrices[i] for i in places], [masks[i] for i in places])  # type: ignore[misc]
        for i, one in zip(places, products, strict=True):
            found[i] = one
    return found


def _mask_in_place(matrices: Sequence[Tensor], masks: Masks) -> None:
    """Multiplies matrices by their masks in place."""
    pairs = [pair for pair in zip(matrices, masks, strict=True) if pair[1] is not None]
    if pairs:
        torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))
