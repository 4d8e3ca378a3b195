"""The gradient of autoregressive maps from base to data, by the implicit function theorem.

An autoregressive map x(z, theta) is defined by h(x, theta) = z, and h needs one evaluation of the network. Its gradient
needs no graph of the d evaluations that compute x: with J = dh/dx, dx/dz = J^-1 and dx/dtheta = -J^-1 dh/dtheta.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from flowtrain.bijections import sequential
from flowtrain.bijections.conditioned_gradient import bounded
from flowtrain.bijections.evaluation import TRANSFORMS
from flowtrain.nn.column_networks import Parts, in_layers, in_turn, masked
from flowtrain.nn.residual_mlp import MaskedLinear
from flowtrain.utils.autograd import differentiable_vjp, needs_autograd

if TYPE_CHECKING:
    from flowtrain.bijections.autoregressive import Autoregressive

# the largest residual of a triangular solve, in units of the rounding error of the largest term of the row
ROUNDING = 64.0


def to_data(of: "Autoregressive", z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Computes `Autoregressive.forward` at z (B, d) as one operation of autograd. Returns None if it cannot."""
    if not torch.is_grad_enabled() or z.dim() != 2 or not z.numel() or needs_autograd(z):
        return None
    # a subclass may override other methods
    layers = of.plain_layers(z) if "gradient_of_split" in vars(type(of)) else None
    if layers is None or type(of.transform) not in TRANSFORMS or of.steps() is None:
        return None
    weight = None if of.linear is None else of.linear.weight
    mask = of.linear.mask if isinstance(of.linear, MaskedLinear) else None
    return ToData.apply(z, of, weight, mask, *in_turn(layers))  # type: ignore[no-untyped-call,no-any-return]


class ToData(torch.autograd.Function):
    """`Autoregressive.forward`: (x, log|det dx/dz|)."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, of: "Autoregressive", weight: Tensor | None, mask: Tensor | None, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        found = sequential.to_data(of, z)
        assert found is not None
        ctx.of = of
        ctx.save_for_backward(z, found[0], weight, mask, *parts)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> tuple[Any, ...]:
        z, x, weight, mask, *parts = ctx.saved_tensors
        batched = any(_functorch.is_legacy_batchedtensor(g) for g in (grad, grad_log))
        if torch.is_grad_enabled() or batched or needs_autograd(x):
            return ToData.by_autograd(ctx, z, weight, mask, parts, grad, grad_log)
        of: Autoregressive = ctx.of
        layers, drops = in_layers(parts), [None] * of.n_drops
        columns, g_x = x.T.contiguous(), grad.T.contiguous()
        inputs, tanh = of.network_inputs(columns)
        theta, hidden = of.network.values(inputs, layers, drops)
        w = None if weight is None else masked(weight, mask)
        b = columns if w is None else torch.addmm(columns, w, columns, alpha=-1)
        _, log_slope, kept = of.transform.columns_to_base(b, theta)
        slope = log_slope.exp()

        def residual(u: Tensor, of_parts: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
            """Returns g_x - J^T u - d(grad_log log_slope)/dx, and the gradients of b and of the parts of the layers."""
            g_b, g_theta = of.transform.columns_gradient(kept, -u, -grad_log)
            g_in, found = of.network.gradient(g_theta, inputs, hidden, layers, drops, of_parts)
            if tanh is not None:
                g_in = torch.ops.aten.tanh_backward(g_in, tanh)
            if w is not None:
                g_in = torch.addmm(g_in, w.T, g_b, alpha=-1)
            return g_x + g_in + g_b, g_b, found

        # J is triangular, so each iteration makes the solution exact for at least one more group
        u = g_x / slope
        for _ in range(of.passes):
            r, _, _ = residual(u, False)
            limit = ROUNDING * torch.finfo(x.dtype).eps * (g_x.abs() + (u * slope).abs()).amax(0)
            if bool((r.abs() <= limit).all()):
                break
            u = u.addcdiv_(r, slope)
        _, g_b, found = residual(u, True)
        g_weight = None
        if weight is not None:
            g_weight = (g_b @ columns.T).neg_()
            g_weight = g_weight if mask is None else g_weight.mul_(mask)
        return u.T, None, g_weight, None, *found

    @staticmethod
    def by_autograd(
        ctx: Any, z: Tensor, weight: Tensor | None, mask: Tensor | None, parts: Parts, grad: Tensor, grad_log: Tensor
    ) -> tuple[Any, ...]:
        """Returns the gradient, computed by operations that autograd can differentiate and vmap can batch."""
        of: Autoregressive = ctx.of
        drops, needed = [None] * of.n_drops, ctx.needs_input_grad

        def evaluated(z: Tensor, weight: Tensor | None, *parts: Tensor | None) -> tuple[Tensor, Tensor]:
            layers = in_layers(parts)

            def theta(x: Tensor) -> Tensor:
                return of.network.evaluated(bounded(x, of.input_bound), layers, drops, nn.ReLU())

            def linear_term(x: Tensor) -> Tensor | None:
                return None if weight is None else F.linear(x, masked(weight, mask))

            return of.group_by_group(z, theta, linear_term)

        which = [needed[0], needed[2], *needed[4:]]
        found = differentiable_vjp(evaluated, [z, weight, *parts], which, [grad, grad_log])
        return found[0], None, found[1], None, *found[2:]
