"""A velocity field, and the pushing of tangents through any field."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Field(nn.Module, ABC):
    """A velocity v(t, x) that pushes tangents alongside values.

    Shapes: x is (..., *event), with `event_dims` dimensions in an event; t is a scalar or broadcasts against the
    others; v has the shape of x. Any other module with `forward(t, x)` on x (B, *event) and t scalar or (B,) works
    as a field too (`push_tangents` falls back on forward-mode autodiff); this class only makes the divergence fast.

    Attributes:
        event_dims: 1 for vectors (d,), 3 for images (C, H, W).

    Example:
        >>> class Rotation(Field):
        ...     def forward(self, t, x):
        ...         return torch.stack([-x[..., 1], x[..., 0]], -1)
        ...
        ...     def push(self, t, x, tangents):
        ...         return self(t, x), self(t, tangents)  # linear in x
        >>> v, je = push_tangents(Rotation(), torch.tensor(0.0), torch.tensor([[1.0, 0.0]]), torch.eye(2).unsqueeze(1))
        >>> v.tolist(), je.squeeze(1).tolist()
        ([[-0.0, 1.0]], [[-0.0, 1.0], [-1.0, 0.0]])
    """

    event_dims: int = 1

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """v(t, x)."""

    @abstractmethod
    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(v, J e) for J = dv/dx and each tangent e; tangents (k, ...) broadcast against (k, *x.shape)."""

    def recorder(self) -> Any:
        """A `flowtrain.solvers.tape.Recorder` faster than autograd's; None where the field has none."""
        return None


def push_tangents(
    field: nn.Module, t: Tensor, x: Tensor, tangents: Tensor, event_dims: int = 1
) -> tuple[Tensor, Tensor]:
    """(v, J e): the field's own `push` where it has one, else `torch.func.jvp` over rows of `event_dims` dimensions.

    Shapes: x (..., *event), t broadcasting against x.shape[:-event_dims], tangents (k, ...) broadcasting against
    (k, *x.shape); J e comes back as (k, *x.shape). A `Field` knows its own `event_dims`, whatever is given here.
    """
    if isinstance(field, Field):
        return field.push(t, x, tangents)
    outer = x.dim() - event_dims
    rows = x.reshape(-1, *x.shape[outer:])
    row_times = t.expand(x.shape[:outer]).reshape(-1)
    directions = tangents.expand(len(tangents), *x.shape).reshape(-1, *rows.shape)

    def jvp(e: Tensor) -> tuple[Tensor, Tensor]:
        v, je = torch.func.jvp(lambda y: field(row_times, y), (rows,), (e,))  # type: ignore[misc]
        return v, je

    v, je = torch.func.vmap(jvp, out_dims=(None, 0))(directions)  # type: ignore[arg-type]
    return v.reshape(x.shape), je.reshape(-1, *x.shape)
