"""What a gradient written by hand does not offer."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from flowtrain.errors import FlowtrainError


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function that has no second derivative, to say so where one is begun.

    torch's own once_differentiable speaks only when the second derivative is taken, and a Hessian comes back as zeros.

    Raises:
        FlowtrainError: the gradient is taken with create_graph=True.
    """

    @wraps(backward)
    def checked(ctx: Any, *cotangents: Any) -> Any:
        if torch.is_grad_enabled():
            raise FlowtrainError(
                "a continuous flow has first derivatives only: the gradient was asked for with create_graph=True. "
                "Take second derivatives by finite differences of first ones, in float64 at a tight solver.rtol."
            )
        return backward(ctx, *cotangents)

    return checked
