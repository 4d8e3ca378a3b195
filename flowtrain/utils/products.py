"""Matrix products for hand-written gradients. On CPUs, the faster of two libraries is used."""

from functools import cache

import torch
from torch import Tensor

# The number of multiplications from which oneDNN is faster, although a call costs about 10 us more. On one AMD EPYC
# with AVX-512, 512 x 128 x 128 takes 155 us with MKL and 85 us with oneDNN, because MKL uses AVX-512 only on Intel
# CPUs. On a Zen 4, where it takes 172 us and 167 us, oneDNN is not used, see `has_half_width`
LARGE = 1_500_000


def has_onednn() -> bool:
    """Whether the linear layer of oneDNN is available and switched on, and the CPU has AVX-512."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_is_available()


@cache
def _onednn_is_available() -> bool:
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return bool(torch.ops.mkldnn._linear_pointwise)
    except (AttributeError, RuntimeError):
        return False


@cache
def has_half_width() -> bool:
    """Whether the CPU is an AMD Zen 4, which computes AVX-512 in two halves, as fast as AVX2.

    There, log p and training steps take a fifth longer with oneDNN than with MKL. Zen 5 has AVX-VNNI and a larger L1
    cache.
    """
    # torch before 2.13 may not have this function
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    is_amd = "AMD" in str(capabilities.get("cpu_name"))
    return is_amd and not capabilities.get("avx_vnni") and capabilities.get("l1d_cache_size") == 2**15


def _linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return found


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes a b^T + bias, (m, n), for a (m, k), b (n, k) and bias (n,), without a gradient.

    Example:
        >>> product(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1)).tolist()
        [[4.0], [4.0]]
    """
    if prefers_onednn(a, b):
        return _linear(a, b, bias)
    if bias is not None:
        return torch.addmm(bias, a, b.T)
    # MKL is slow if the second matrix has few columns and is transposed
    return (b @ a.T).T.contiguous() if b.shape[0] < 16 and b.stride(0) == 1 else a @ b.T


def weight_gradient(at_y: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes at_y^T x into out (n, m), for at_y (k, n) and x (k, m): the gradient of W for y = x W^T."""
    # oneDNN needs copies of both matrices, so it is faster only for larger products than in `product`
    if at_y.shape[0] * at_y.shape[1] * x.shape[1] >= 2 * LARGE and prefers_onednn(at_y, x.T):
        out.copy_(_linear(at_y.T, x.T, None))
    elif at_y.shape[1] <= x.shape[1]:
        torch.mm(at_y.T, x, out=out)
    else:
        # MKL is slow if the second matrix has few columns
        out.copy_(torch.mm(x.T, at_y).T)


def prefers_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is faster for the product a b^T of a (m, k) and b (n, k)."""
    # the compiler chooses products itself, and warns about the caches of the functions below
    if torch.compiler.is_compiling():
        return False
    return bool(
        # the test that takes the least time is the first one
        not has_half_width()
        and a.shape[0] * a.shape[1] * b.shape[0] >= LARGE
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and has_onednn()
        # oneDNN copies a, but a slice b of columns would make it a thousand times slower
        and (b.is_contiguous() or b.T.is_contiguous())
    )


def relu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes relu(x W^T + bias), (B, m), for x (B, k), W (m, k) and bias (m,), without a gradient.

    Example:
        >>> relu_product(torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1), torch.zeros(1)).tolist()
        [[1.0], [0.0]]
    """
    if prefers_onednn(x, weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
        return found
    return torch.addmm(bias, x, weight.T).relu_()


def sum_product(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes h + x W^T + bias, (B, m), for h (B, m), x (B, k), W (m, k) and bias (m,), without a gradient.

    h may be modified.

    Example:
        >>> sum_product(torch.ones(1, 1), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1)).tolist()
        [[4.0]]
    """
    if prefers_onednn(x, weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, h, weight, bias, "add")
        return found
    return h.add_(bias).addmm_(x, weight.T)


def columns_product(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Computes W x + bias, (m, B), for W (m, k), bias (m,) and x (k, B), without a gradient.

    This is a linear layer of activations with one column for each row of a batch. The result is contiguous.

    Example:
        >>> columns_product(torch.ones(1, 3), torch.ones(1), torch.ones(3, 2)).tolist()
        [[4.0, 4.0]]
    """
    if prefers_onednn(weight, x.T):
        return _linear(weight, x.T, None).add_(bias.unsqueeze(1))
    return torch.addmm(bias.unsqueeze(1), weight, x)


def add_columns_product(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> None:
    """Adds W x + bias to h (m, B), for W (m, k), bias (m,) and x (k, B), without a gradient.

    Example:
        >>> h = torch.ones(1, 2)
        >>> add_columns_product(h, torch.ones(1, 3), torch.ones(1), torch.ones(3, 2))
        >>> h.tolist()
        [[5.0, 5.0]]
    """
    if prefers_onednn(weight, x.T):
        h.add_(_linear(weight, x.T, None)).add_(bias.unsqueeze(1))
    else:
        h.add_(bias.unsqueeze(1)).addmm_(weight, x)
