"""A chain of couplings or autoregressive maps of vectors, whose inverse is one operation of autograd.

A flow on a table consists of many small operations. Autograd takes longer to record and replay them than they take to
compute. Here all linear maps between two layers become one matrix. The matrices of all layers are computed at once, and
the gradients of all matrices are one product.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.bijections import autoregressive_chain, evaluation
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection, Chain, Pass, as_pass
from flowtrain.bijections.conditioned_gradient import Conditioned, bounded
from flowtrain.bijections.coupling import HalfCoupling, IndexCoupling
from flowtrain.bijections.linear import InvertibleLinear, Permutation
from flowtrain.bijections.scale import ActNorm
from flowtrain.nn.column_networks import Layer, Parts, in_layers, in_turn
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.autograd import differentiable_vjp, needs_autograd
from flowtrain.utils.precision import full_precision

# the most columns of a table for which one matrix is faster than its factors. Both parts of an autoregressive map are
# the whole vector, so its matrices are larger
MOST_COLUMNS = 32
MOST_AUTOREGRESSIVE = 16
LINEAR = (ActNorm, InvertibleLinear, Permutation)
COUPLINGS = (HalfCoupling, IndexCoupling)
CONDITIONED = (*COUPLINGS, Autoregressive)


class TableChain(Chain):
    """A `Chain` of bijections of vectors, whose inverse is faster for chains of the following form.

    The chain consists of couplings of one class, with ActNorms, invertible linear maps and permutations between them.
    Or it consists of autoregressive maps with invertible linear maps between them. The vectors have at most
    MOST_COLUMNS or MOST_AUTOREGRESSIVE elements. Chains of autoregressive maps with nothing between them are faster
    too, see `flowtrain.bijections.autoregressive_chain`. There is no context. Other chains are computed as a `Chain`.
    The results differ only by rounding. Without gradients, a coupling overwrites the result of the layer before it.

    Example:
        >>> from flowtrain.nn.conditioners import MLP
        >>> chain = TableChain([HalfCoupling(2, False, MLP(1, [8], 2)), ActNorm(2)])
        >>> chain.inverse(torch.tensor([[1.0, 2.0]]))[0].tolist()  # the identity before training
        [[1.0, 2.0]]
    """

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(TableChain.pass_forward, self), z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return as_pass(partial(TableChain.pass_inverse, self), x, context)

    def pass_forward(self, z: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        if torch.is_grad_enabled():
            return super().pass_forward(z, context, options)
        return _evaluated(list(self), z, context, options, to_base=False)

    def pass_inverse(self, x: Tensor, context: Tensor | None = None, options: SolveOptions = AS_CONFIGURED) -> Pass:
        if not torch.is_grad_enabled():
            return _evaluated(list(self)[::-1], x, context, options, to_base=True)
        found = self.in_one_operation(x) if context is None and x.dim() == 2 else None
        return super().pass_inverse(x, context, options) if found is None else Pass(*found)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return super().map_forward(z, context)
        return _evaluated(list(self), z, context, AS_CONFIGURED, to_base=False, with_log_det=False).x

    def map_inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.pass_inverse(x, context).x
        return _evaluated(list(self)[::-1], x, context, AS_CONFIGURED, to_base=True, with_log_det=False).x

    def in_one_operation(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Computes `inverse` for vectors x (B, d) as one operation of autograd, or returns None if not possible."""
        found = self.by_matrices(x)
        return autoregressive_chain.to_base(list(reversed(list(self))), x) if found is None else found

    def by_matrices(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Computes `inverse` for vectors x (B, d) with one matrix for each layer, or returns None if not possible."""
        if needs_autograd(x) or not x.numel() or x.shape[1] > MOST_COLUMNS:
            return None
        kinds = {type(bijection) for bijection in self}
        if Autoregressive in kinds and (InvertibleLinear not in kinds or x.shape[1] > MOST_AUTOREGRESSIVE):
            return None
        layers: list[Conditioned] = []
        parts: list[Tensor | None] = []
        depths: list[int] = []
        stages: list[list[Bijection]] = [[]]
        from_data = list(reversed(list(self)))
        # (x - m) exp(-s) is exact for data far from 0, but x exp(-s) - m exp(-s) in a matrix product is not
        first_norms = from_data[:1] if from_data and type(from_data[0]) is ActNorm else []
        for bijection in from_data[len(first_norms) :]:
            kind = type(bijection)
            if kind in CONDITIONED and (not layers or kind is type(layers[0])):
                assert isinstance(bijection, Conditioned)
                network = bijection.plain_layers(x, dropout=True)
                if network is None:
                    return None
                layers.append(bijection)
                depths.append(len(network))
                parts += in_turn(network)
                stages.append([])
            elif kind in LINEAR and not (isinstance(bijection, ActNorm) and bijection.shift.dtype != x.dtype):
                stages[-1].append(bijection)
            else:
                return None
        if not layers:
            return None
        with full_precision(x.device):
            between, log_det = _linear_parts(stages, x)
            matrices = _matrices(layers, between)
        kept = [_size_of_a(layer, x.shape[1]) for layer in layers]
        plan = Plan(layers, depths, kept, [layer.drops(x) for layer in layers], torch.is_grad_enabled())
        for norm in first_norms:
            x, of_norm = norm.inverse(x)
            log_det = log_det + of_norm
        z, log_slope = _ToBase.apply(x, plan, *matrices, *parts)  # type: ignore[no-untyped-call]
        return z, log_slope + log_det


def _evaluated(
    bijections: Sequence[Bijection],
    x: Tensor,
    context: Tensor | None,
    options: SolveOptions,
    to_base: bool,
    with_log_det: bool = True,
) -> Pass:
    """Applies bijections one after another, without gradients. The log-determinant is needed only if `with_log_det`."""
    kinds: tuple[type, ...] = ()
    if context is None and evaluation.is_possible(x):
        kinds = CONDITIONED if to_base else COUPLINGS
    log_det: Tensor | None = None
    integrals: tuple[Tensor, ...] = ()
    # x^T, if it is the result of a layer and nothing else uses it
    columns: Tensor | None = None
    for bijection in bijections:
        kind = type(bijection)
        parts: evaluation.Parts | None = None
        # a layer may have changed the number of dimensions
        if kind in kinds and x.dim() == 2:
            parts = evaluation.parts_of(cast(Conditioned, bijection), x.dtype)
        if parts is not None:
            columns = evaluation.own_columns(x) if columns is None else columns
            columns, term = evaluation.mapped_columns(parts, columns, to_base)
            log_det = term if log_det is None or not with_log_det else log_det + term
            continue
        x = x if columns is None else columns.T
        columns = None
        if with_log_det:
            x, term, more = (bijection.pass_inverse if to_base else bijection.pass_forward)(x, context, options)
            log_det, integrals = term if log_det is None else log_det + term, integrals + more
        else:
            x = (bijection.map_inverse if to_base else bijection.map_forward)(x, context)
        if kinds and kind in LINEAR and x.dim() == 2 and x.T.is_contiguous():
            columns = x.T
    x = x if columns is None else columns.T
    return Pass(x, x.new_zeros(x.shape[0]) if log_det is None else log_det, integrals)


class Plan(NamedTuple):
    """The conditioned layers of a chain from data to base.

    Attributes:
        layers: the layers.
        depths: the number of linear layers of each conditioner.
        kept: the size of part a of each layer.
        drops: the factors of dropout of each conditioner.
        is_differentiated: whether autograd may need the gradient.
    """

    layers: list[Conditioned]
    depths: list[int]
    kept: list[int]
    drops: list[list[Tensor | None]]
    is_differentiated: bool

    def networks(self, parts: Parts) -> list[list[Layer]]:
        """Returns the linear layers of each conditioner, for the parts of one conditioner after another."""
        every, found = iter(in_layers(parts)), []
        for depth in self.depths:
            found.append([next(every) for _ in range(depth)])
        return found


def _size_of_a(layer: Conditioned, d: int) -> int:
    """Returns the size of part a of a layer for vectors (d,)."""
    if isinstance(layer, IndexCoupling):
        return len(layer.kept)
    return layer.sizes[int(layer.swap)] if isinstance(layer, HalfCoupling) else d


def _linear_parts(stages: Sequence[Sequence[Bijection]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the linear map of each stage as a matrix of (x, 1), (S, d + 1, d + 1), and the sum of log-determinants.

    Matrices of the same kind are computed together.
    """
    d = x.shape[1]
    identity = torch.eye(d + 1, dtype=x.dtype, device=x.device)
    pool, log_det = [identity.unsqueeze(0)], x.new_zeros(())
    place: dict[int, int] = {}
    for kind in LINEAR:
        members: list[Any] = [one for stage in stages for one in stage if type(one) is kind]
        if not members:
            continue
        place.update(zip(map(id, members), count(sum(map(len, pool))), strict=False))
        if kind is Permutation:
            backs = torch.cat([v for one in members for v in (one.back, _indices((d,), x.device))])
            pool.append(identity[backs].view(len(members), d + 1, d + 1))
            continue
        found, term = _of_norms(members) if kind is ActNorm else _of_linear(members, identity)
        pool.append(found)
        log_det = log_det + term
    matrices, answer = torch.cat(pool), identity.expand(len(stages), -1, -1)
    for slot in range(max(map(len, stages))):
        index = tuple(place[id(stage[slot])] if slot < len(stage) else 0 for stage in stages)
        chosen = matrices[_indices(index, x.device)]
        answer = chosen @ answer if slot else chosen
    return answer, log_det


def _of_norms(norms: Sequence[ActNorm]) -> tuple[Tensor, Tensor]:
    """Returns the matrices (n, d + 1, d + 1) of (x - m) exp(-s), and the sum of the log-determinants."""
    log_scale = torch.stack([norm.log_scale for norm in norms])
    factor = (-log_scale).exp()
    shift = (torch.stack([norm.shift for norm in norms]) * factor).neg()
    scale = F.pad(factor, (0, 1), value=1.0)
    return scale.diag_embed() + F.pad(shift.unsqueeze(2), (shift.shape[1], 0, 0, 1)), -log_scale.sum()


def _of_linear(members: Sequence[InvertibleLinear], identity: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the matrices (n, d + 1, d + 1) of linear maps, and the sum of the log-determinants."""
    names = ("permutation", "sign", "lower", "upper", "log_scale")
    permutation, sign, lower, upper, log_scale = (torch.stack([getattr(m, name) for m in members]) for name in names)
    upper = upper.triu(1) + (sign * log_scale.exp()).diag_embed()
    weight = (permutation + permutation @ lower.tril(-1)) @ upper
    d = weight.shape[1]
    return F.pad(weight, (0, 1, 0, 1)) + F.pad(identity[d:, d:], (d, 0, d, 0)), log_scale.sum()


@lru_cache(maxsize=64)
def _indices(index: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(index, device=device)


@lru_cache(maxsize=64)
def _places(
    shapes: tuple[tuple[int, int] | None, ...], kept: tuple[int, ...], size: int, device: torch.device
) -> Tensor:
    """Returns the positions of the entries of all W in flattened matrices (L, size, size)."""
    found = []
    with torch.inference_mode(False):
        for i, (shape, n) in enumerate(zip(shapes, kept, strict=True)):
            if shape is not None:
                rows, columns = (torch.arange(k, device="cpu") for k in shape)
                found.append((((i * size + n + rows) * size).unsqueeze(1) + columns).flatten())
        return torch.cat(found).to(device)


def _matrices(layers: Sequence[Conditioned], between: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the matrices of (x, 1) -> (a, b), of (a, z, 1) -> (a, b) for each further layer, and of (a, z, 1) -> z.

    b is the part of the vector that a layer transforms, minus W a. In (a, z, 1), z is the transformed part.

    Args:
        layers: the L layers from data to base.
        between: the linear maps before each layer and after the last layer, (L + 1, d + 1, d + 1).
    """
    n, d, device = len(layers), between.shape[1] - 1, between.device
    identity = torch.eye(d + 1, dtype=between.dtype, device=device)
    # (x, 1) -> (a, b, 1), and (a, z, 1) -> (x, 1)
    split: Tensor | None = None
    join: Tensor | None = None
    size = d + 1
    if isinstance(layers[0], Autoregressive):
        # a and b are the whole vector
        size = 2 * d + 1
        split = torch.cat([identity[:d], identity]).expand(n, -1, -1)
        join = F.pad(identity, (d, 0)).expand(n, -1, -1)
    elif (order := _order(layers, d, device)) is not None:
        split = identity[order].view(n, d + 1, d + 1)
        join = split.mT
    weights = [layer.linear_weight() for layer in layers]
    into = torch.eye(size, dtype=between.dtype, device=device).expand(n, -1, -1)
    if any(w is not None for w in weights):
        shapes: Any = tuple(None if w is None else tuple(w.shape) for w in weights)
        index = _places(shapes, tuple(_size_of_a(layer, d) for layer in layers), size, device)
        values = torch.cat([w.flatten() for w in weights if w is not None])
        into = into.reshape(-1).index_add(0, index, values, alpha=-1).view(n, size, size)
    into = into[:, :-1] if split is None else into[:, :-1] @ split
    found, last = into @ between[:-1], between[-1, :-1]
    if join is None:
        return found[0], found[1:], last
    return found[0], found[1:] @ join[:-1], last @ join[-1]


def _order(layers: Sequence[Any], d: int, device: torch.device) -> Tensor | None:
    """Returns the positions in (x, 1) of (a, b, 1) for one coupling after another, or None if they are in order."""
    if isinstance(layers[0], IndexCoupling):
        end = _indices((d,), device)
        return torch.cat([v for layer in layers for v in (layer.kept, layer.changed, end)])
    if not any(layer.swap for layer in layers):
        return None
    order: list[int] = []
    for layer in layers:
        first = layer.sizes[0] if layer.swap else 0
        order += [*range(first, d), *range(first), d]
    return _indices(tuple(order), device)


class _ToBase(torch.autograd.Function):
    """The layers of a `Plan`: x (B, d) -> (z (B, d), the sum of the log-slopes of all layers (B,))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Plan, first: Tensor, further: Tensor, last: Tensor, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (rows, d), size = x.shape, len(first)
        start = x.new_ones(d + 1, rows)
        start[:d] = x.T
        # (a, z, 1) of each layer
        states = x.new_ones(len(plan.layers), size + 1, rows)
        log_slopes: list[Tensor] = []
        kept: list[Sequence[Tensor]] = []
        before = start
        for i, network in enumerate(plan.networks(parts)):
            layer, y = plan.layers[i], states[i, :size]
            _product(further[i - 1] if i else first, before, y)
            b = y[plan.kept[i] :]
            inputs, tanh = layer.network_inputs(y[: plan.kept[i]])
            theta, hidden = layer.network.values(inputs, network, plan.drops[i])
            z, log_slope, of_transform = layer.transform.columns_to_base(b, theta)
            b.copy_(z)
            log_slopes.append(log_slope)
            if plan.is_differentiated:
                kept += [(inputs, *(() if tanh is None else (tanh,)), *hidden), of_transform]
            before = states[i]
        z = _product(last, before, x.new_empty(d, rows))
        ctx.plan, ctx.sizes = plan, [len(one) for one in kept]
        ctx.save_for_backward(x, first, further, last, start, states, *parts, *(v for one in kept for v in one))
        return z.T, torch.cat(log_slopes).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        x, first, further, last, start, states, *rest = ctx.saved_tensors
        n_parts = 3 * sum(plan.depths)
        parts, flat = rest[:n_parts], iter(rest[n_parts:])
        batched = any(_functorch.is_legacy_batchedtensor(g) for g in (grad, grad_log))
        if torch.is_grad_enabled() or batched or needs_autograd(x):
            return _ToBase.by_autograd(ctx, x, first, further, last, parts, grad, grad_log)
        kept = [[next(flat) for _ in range(size)] for size in ctx.sizes]
        networks, found = plan.networks(parts), []
        g_z = grad.T.contiguous()
        # the gradients of (a, b) of each layer
        g = torch.empty_like(states[:, :-1])
        torch.mm(last[:, :-1].T, g_z, out=g[-1])
        for i in reversed(range(len(networks))):
            layer, g_y, n = plan.layers[i], g[i], plan.kept[i]
            of_network, of_transform = kept[2 * i], kept[2 * i + 1]
            n_inputs = 1 + (layer.input_bound is not None)
            g_b, g_theta = layer.transform.columns_gradient(of_transform, g_y[n:], grad_log)
            drops = plan.drops[i]
            g_a, of_parts = layer.network.gradient(g_theta, of_network[0], of_network[n_inputs:], networks[i], drops)
            if layer.input_bound is not None:
                g_a = torch.ops.aten.tanh_backward(g_a, of_network[1])
            g_y[:n].add_(g_a)
            g_y[n:].copy_(g_b)
            found.append(of_parts)
            if i:
                torch.mm(further[i - 1, :, :-1].T, g_y, out=g[i - 1])
        g_x = (first[:, :-1].T @ g[0]).T if ctx.needs_input_grad[0] else None
        g_further = torch.bmm(g[1:], states[:-1].mT)
        of_matrices = g[0] @ start.T, g_further, g_z @ states[-1].T
        return g_x, None, *of_matrices, *(v for one in reversed(found) for v in one)

    @staticmethod
    def by_autograd(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        further: Tensor,
        last: Tensor,
        parts: Parts,
        grad: Tensor,
        grad_log: Tensor,
    ) -> tuple[Any, ...]:
        """Computes the gradient by operations that autograd can differentiate and vmap can batch."""
        plan: Plan = ctx.plan

        def evaluated(
            x: Tensor, first: Tensor, further: Tensor, last: Tensor, *parts: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            one = torch.ones_like(x[:, :1])
            before, log_det = torch.cat([x, one], 1), torch.zeros_like(x[:, 0])
            for i, network in enumerate(plan.networks(parts)):
                layer = plan.layers[i]
                y = before @ (further[i - 1] if i else first).T
                a, b = y[:, : plan.kept[i]], y[:, plan.kept[i] :]
                inputs = bounded(a, layer.input_bound)
                theta = layer.network.evaluated(inputs, network, plan.drops[i], nn.ReLU())
                z, log_slope = layer.transform.to_base(b, theta)
                before, log_det = torch.cat([a, z, one], 1), log_det + log_slope.sum(1)
            return before @ last.T, log_det

        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        g_x, *others = differentiable_vjp(evaluated, [x, first, further, last, *parts], needed, [grad, grad_log])
        return g_x, None, *others


def _product(matrix: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Computes matrix @ x into `out`. TF32 would add an error to z that the log-determinant does not contain."""
    if x.is_cpu:
        return torch.mm(matrix, x, out=out)
    with full_precision(x.device):
        return torch.mm(matrix, x, out=out)
