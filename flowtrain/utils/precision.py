"""Context managers for TF32 and autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# of the networks inside couplings while they train; what they feed, and every evaluation, is in full precision
PRECISIONS = ("float32", "tf32", "bfloat16")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turns autocast off, and TF32 on a GPU.

    TF32 products carry 10 bits of mantissa, an error of 5e-4 in every velocity: at rtol 1e-5 the error estimate would
    measure that noise, which no step size cures, and the step size would collapse. torch allows TF32 in convolutions
    unless told otherwise.
    """
    if torch.compiler.is_exporting():
        # torch.export would put each such block into a subgraph, which ONNX has no operator for
        yield
        return
    with _products(device, tf32=False), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def training_step(name: str, device: torch.device) -> Iterator[None]:
    """A whole step, backward too, in one of PRECISIONS: TF32 products on a GPU where `name` is tf32, else float32.

    What asks for full precision itself is not reached: the inverse of a linear map and its product, and ODE solves.
    """
    with _products(device, tf32=name == "tf32"):
        yield


def narrowed(name: str, device: torch.device) -> torch.autocast:
    """The loss of a step in one of PRECISIONS: convolutions and products in bfloat16 where that is `name`.

    Not for the backward pass, in which torch takes for each operation the dtype that it had.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")


@contextmanager
def default_precision() -> Iterator[None]:
    """Inside, float32 products have torch's default precision: full for matrices, TF32 for convolutions on a GPU.

    The settings of the caller are restored: `torch.set_float32_matmul_precision`, and those of single backends.
    """
    places, name, default = _precision_settings()
    before = [getattr(place, name) for place in places]
    # torch before 2.9: allow_tf32 sets it too
    first = torch.get_float32_matmul_precision() if name == "allow_tf32" else None
    for place, value in zip(places, default, strict=True):
        setattr(place, name, value)
    # read after that: it raises an error if a backend contradicts it
    legacy = torch.get_float32_matmul_precision()
    try:
        if legacy != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
        if first is not None:
            torch.set_float32_matmul_precision(first)


def _precision_settings() -> tuple[list[Any], str, list[Any]]:
    """The backends of CUDA and of the CPU, the attribute that holds their precision, and torch's default for each."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    # torch before 2.9 knows these by other names
    if not hasattr(cudnn, "conv"):
        return [cuda.matmul, cudnn], "allow_tf32", [False, True]
    cpu: Any = torch.backends.mkldnn
    return [cuda.matmul, cudnn.conv, cpu.matmul, cpu.conv], "fp32_precision", ["ieee", "tf32", "ieee", "ieee"]


@contextmanager
def _products(device: torch.device, tf32: bool) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # torch before 2.9 knows these by other names
    old = not hasattr(cudnn, "conv")
    places, name = ((products, cudnn), "allow_tf32") if old else ((products, cudnn.conv), "fp32_precision")
    setting: Any = tf32 if old else "tf32" if tf32 else "ieee"
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, setting)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
