"""Support for hand-written gradients: errors for second derivatives, and compatibility with `torch.func`.

A hand-written gradient (`torch.autograd.Function`) computes outside of autograd, so the transforms of `torch.func`
(grad, vmap, jvp, jacrev, jacfwd, hessian) cannot transform it. If `transforms_active` returns true, solves and fields
use ordinary differentiable operations instead.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from flowtrain.utils.errors import FlowtrainError


def transforms_active() -> bool:
    """Whether the code runs inside a transform of `torch.func`, or inside `torch.autograd.forward_ad.dual_level`."""
    # there is no public function for this; torch.autograd.Function.apply does the same check
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def needs_autograd(x: Tensor) -> bool:
    """Whether torch.func, a compiler or autocast is active. They need differentiable operations of torch."""
    return transforms_active() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


def plain_values(x: Tensor) -> Tensor:
    """Returns the values of x without a graph. Inside `torch.func.vmap`, returns the values of all lanes.

    vmap rejects control flow that depends on values, such as the choice of a step size, because lanes may differ. A
    decision that is based on the values of all lanes is the same for each lane.

    Example:
        >>> found = []
        >>> _ = torch.func.vmap(lambda row: (found.append(plain_values(row.sum())), row)[1])(torch.eye(3))
        >>> found[0]
        tensor([1., 1., 1.])
    """
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.detach()


def plain_max(x: Tensor) -> float:
    """Returns the largest of `plain_values(x)`; NaN if one of them is NaN."""
    x = plain_values(x)
    return float(x.max() if x.dim() else x)


def differentiable_vjp(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Computes the gradients of a function by operations that autograd can differentiate and vmap can batch.

    Args:
        function: returns the outputs for the inputs.
        inputs: the inputs. An input may be a function of other inputs.
        needed: whether the gradient of each input is needed.
        cotangents: the cotangent of each output.

    Returns:
        The gradient of each input at fixed other inputs, or None.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> differentiable_vjp(lambda x, y: [x * y], [x, 2 * x], [True, True], [torch.tensor(1.0)])[0].item()
        6.0
    """
    with torch.enable_grad():
        # without new tensors, the gradient of x would include the path through y, if y is a function of x
        own: Any = [v.view_as(v) if v is not None and n else v for v, n in zip(inputs, needed, strict=True)]
        pairs = [(y, c) for y, c in zip(function(*own), cotangents, strict=True) if y.requires_grad]
        outputs, of_outputs = zip(*pairs, strict=True)
        wanted = [v for v, n in zip(own, needed, strict=True) if n]
        found = iter(torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True))
    return [next(found) if n else None for n in needed]


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function so that it raises an error if a second derivative is requested.

    torch's `once_differentiable` raises its error only when the second derivative is computed, and a Hessian is then
    returned as zeros. Cotangents that are batched by `torch.func.vmap` are handled lane by lane.

    Raises:
        FlowtrainError: the gradient is taken with create_graph=True, or with is_grads_batched=True.
    """

    @wraps(backward)
    def checked(ctx: Any, *cotangents: Any) -> Any:
        if torch.is_grad_enabled():
            raise FlowtrainError(
                "torch.autograd supports only first derivatives of a continuous flow, but the gradient was requested "
                "with create_graph=True. Use torch.func for second derivatives, for example "
                "torch.func.hessian(lambda x: flow.log_prob(x[None])[0])(x)."
            )
        given = [c for c in cotangents if isinstance(c, Tensor)]
        if any(_functorch.is_legacy_batchedtensor(c) for c in given):
            raise FlowtrainError(
                "torch.autograd supports only one cotangent at a time for a continuous flow, but several were given "
                "with is_grads_batched=True or vectorize=True. Use torch.func.jacrev or torch.func.jacfwd."
            )
        if any(_functorch.is_batchedtensor(c) for c in given):
            return _lane_by_lane(lambda *lane: backward(ctx, *lane), cotangents)
        return backward(ctx, *cotangents)

    return checked


def _lane_by_lane(vjp: Callable[..., tuple[Any, ...]], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """Computes vjp(*cotangents) lane by lane. vmap has batched at least one of the cotangents."""
    places: list[int] = []
    n = 0

    def tensors(*lane: Any) -> tuple[Tensor, ...]:
        nonlocal n
        found = vjp(*lane)
        n = len(found)
        places[:] = [i for i, part in enumerate(found) if part is not None]
        return tuple(found[i] for i in places)

    parts = _Lanes.apply(tensors, *cotangents)  # type: ignore[no-untyped-call]
    answer: list[Any] = [None] * n
    for i, part in zip(places, parts, strict=True):
        answer[i] = part
    return tuple(answer)


class _Lanes(torch.autograd.Function):
    """A function of tensors that `torch.func.vmap` evaluates once for each lane."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *inputs: Any) -> tuple[Tensor, ...]:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves nothing, because there is no derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *inputs: Any) -> tuple[Any, Any]:
        """Evaluates the lanes one after another and stacks the results."""
        dims = in_dims[1:]
        lanes = [
            _Lanes.apply(  # type: ignore[no-untyped-call]
                function, *(y if d is None else y.select(d, i) for y, d in zip(inputs, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(part) for part in zip(*lanes, strict=True))
        return stacked, (0,) * len(stacked)
