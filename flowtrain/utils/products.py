"""Matrix products on CPUs by the faster of two libraries, for hand-written gradients."""

from functools import cache

import torch
from torch import Tensor

# The number of multiplications from which oneDNN is faster. A call of it costs about 10 us more. On an AMD EPYC with
# AVX-512, MKL takes 155 us for 512 x 128 x 128 and oneDNN 85 us: MKL uses AVX-512 on Intel's processors only
LARGE = 1_500_000


@cache
def _has_onednn() -> bool:
    """Whether oneDNN's linear layer is there and the processor has AVX-512."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return bool(torch.ops.mkldnn._linear_pointwise)
    except (AttributeError, RuntimeError):
        return False


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias, (m, n), of a (m, k), b (n, k) and bias (n,), without a gradient.

    Example:
        >>> product(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1)).tolist()
        [[4.0], [4.0]]
    """
    large = a.shape[0] * a.shape[1] * b.shape[0] >= LARGE
    if (
        large
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and _has_onednn()
    ):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return found
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)
