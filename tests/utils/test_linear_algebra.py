"""Triangular solves agree with torch in float64."""

import pytest
import torch

from flowtrain.utils.linear_algebra import solve_lower


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("n", [4, 50])
def test_solves_without_gradients_match_float64(shape: tuple[int, ...], n: int) -> None:
    torch.manual_seed(0)
    lower = 0.3 * torch.randn(*shape, 5, 5).tril(-1) + torch.diag(torch.rand(5) + 0.5)
    right = torch.randn(*shape, 5, n)
    # elements above the diagonal do not count
    given = lower + torch.randn(5, 5).triu(1)
    exact = torch.linalg.solve_triangular(lower.double(), right.double(), upper=False)
    with torch.no_grad():
        torch.testing.assert_close(solve_lower(given, right).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solve_lower(given, right).double(), exact, rtol=1e-5, atol=1e-5)
