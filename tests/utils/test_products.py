"""Matrix products of both libraries agree with float64. So does the gradient of a network that uses both."""

import pytest
import torch

from flowtrain.nn.residual_mlp import ResidualMLP
from flowtrain.utils import products
from flowtrain.utils.products import (
    LARGE,
    has_half_width,
    prefers_onednn,
    product,
    relu_product,
    sum_product,
    weight_gradient,
)


@pytest.fixture(autouse=True, params=[False, True], ids=["wide", "half width"])
def half_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the products of a CPU with fast oneDNN, and of a Zen 4."""
    monkeypatch.setattr(products, "has_half_width", lambda: request.param)


@pytest.mark.parametrize("rows", [0, 7, 600])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_float32_products_match_float64(rows: int, transposed: bool, biased: bool) -> None:
    m, k, n = rows, 64, 80
    a = torch.randn(k, m).T if transposed else torch.randn(m, k)
    b = torch.randn(k, n).T if transposed else torch.randn(n, k)
    bias = torch.randn(n) if biased else None
    exact = a @ b.T + (0 if bias is None else bias)
    narrow = product(a.float(), b.float(), None if bias is None else bias.float())
    assert (m * k * n >= LARGE) == (rows == 600)
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(a, b, bias), exact)


@pytest.mark.parametrize("rows", [0, 7, 1500])
@pytest.mark.parametrize(("n", "m"), [(64, 64), (64, 2), (2, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients_match_float64(rows: int, n: int, m: int, transposed: bool) -> None:
    at_y = torch.randn(n, rows).T if transposed else torch.randn(rows, n)
    x = torch.randn(rows, m)
    found = [torch.full((n, m), torch.nan, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    for out in found:
        weight_gradient(at_y.to(out.dtype), x.to(out.dtype), out)
        torch.testing.assert_close(out.double(), at_y.T @ x, rtol=1e-4, atol=1e-3)
    w = torch.randn(n, m)
    torch.testing.assert_close(product(at_y, w.T), at_y @ w)


def test_float32_gradients_of_a_large_network_match_float64() -> None:
    exact = ResidualMLP(40, [64], 90)
    for p in exact.parameters():
        p.data = torch.randn_like(p) / 8
    x, cotangent = torch.randn(600, 40), torch.randn(600, 90)
    narrow = ResidualMLP(40, [64], 90).float()
    narrow.load_state_dict(exact.state_dict())
    found = []
    for net, dtype in ((exact, torch.float64), (narrow, torch.float32)):
        y = x.to(dtype).requires_grad_()
        answer = net(y)
        found.append([answer, *torch.autograd.grad(answer, [y, *net.parameters()], cotangent.to(dtype))])
    for a, b in zip(*found, strict=True):
        # rounding may put a unit near the kink of its relu on either side
        assert (a - b.double()).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("rows", [3, 2000])
def test_products_with_relu_and_with_a_sum_match_float64(rows: int) -> None:
    torch.manual_seed(0)
    x, h, weight, bias = torch.randn(rows, 64), torch.randn(rows, 32), torch.randn(32, 64), torch.randn(32)
    exact = x.double() @ weight.double().T + bias
    torch.testing.assert_close(relu_product(x, weight, bias).double(), exact.relu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum_product(h.clone(), x, weight, bias).double(), h + exact, rtol=1e-4, atol=1e-4)


def test_slices_of_columns_are_not_multiplied_by_onednn() -> None:
    # oneDNN would be a thousand times slower
    x = torch.randn(2000, 128)[:, ::2]
    assert not prefers_onednn(torch.randn(64, 64), x)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx_vnni": False, "l1d_cache_size": 32768}, True),
        ({"cpu_name": "AMD EPYC", "avx_vnni": True, "l1d_cache_size": 49152}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx_vnni": False, "l1d_cache_size": 32768}, False),
        ({}, False),
    ],
)
def test_half_width_is_found_from_the_capabilities_of_the_cpu(
    capabilities: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_half_width.__wrapped__() == expected
