"""Triangular solves that `torch.export` and ONNX can represent."""

import torch
from torch import Tensor

from flowtrain.utils.autograd import transforms_active
from flowtrain.utils.products import product

# the largest d for which `solve_lower` computes L^-1
MOST = 256


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """Computes L^-1 b, (..., d, n), for lower triangular L (..., d, d) and b (..., d, n).

    Without gradients, and for many b, L^-1 is computed in float64 and multiplied by b, which is up to ten times faster.
    In a program that `torch.export` traces, b is multiplied by L^-1 in float64, because ONNX has no triangular solve.
    The inverse of a parameter is a constant of the program.
    """
    found: Tensor
    if torch.compiler.is_exporting():
        found = (_inverse(lower) @ right.double()).to(right.dtype)
        return found
    d, n = right.shape[-2:]
    if torch.is_grad_enabled() or n < 2 * d or d > MOST or transforms_active():
        found = torch.linalg.solve_triangular(lower, right, upper=False)
        return found
    inverse = _inverse(lower).to(right.dtype)
    if right.dim() == 2:
        return product(inverse, right.T)
    return torch.matmul(inverse, right)


def _inverse(lower: Tensor) -> Tensor:
    """Returns L^-1, (..., d, d), float64."""
    identity = torch.eye(lower.shape[-1], dtype=torch.float64, device=lower.device)
    found: Tensor = torch.linalg.solve_triangular(lower.double(), identity.expand(lower.shape), upper=False)
    return found
