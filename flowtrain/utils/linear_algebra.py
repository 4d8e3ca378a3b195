"""Triangular solves that `torch.export` and ONNX can represent."""

import torch
from torch import Tensor


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """Computes L^-1 b, (..., d, n), for lower triangular L (..., d, d) and b (..., d, n).

    In a program that `torch.export` traces, b is multiplied by L^-1 in float64, because ONNX has no triangular solve.
    The inverse of a parameter is a constant of the program.
    """
    found: Tensor
    if not torch.compiler.is_exporting():
        found = torch.linalg.solve_triangular(lower, right, upper=False)
        return found
    identity = torch.eye(lower.shape[-1], dtype=torch.float64, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower.double(), identity.expand(lower.shape), upper=False)
    found = (inverse @ right.double()).to(right.dtype)
    return found
