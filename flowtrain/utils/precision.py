"""Context managers for TF32 and autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# Precisions of the networks inside couplings in training. The couplings, and every evaluation, have full precision
PRECISIONS = ("float32", "tf32", "bfloat16")


# a context that changes nothing. It has no state, so that it can be entered many times
UNCHANGED: AbstractContextManager[None] = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Turns off autocast and, on a GPU, TF32.

    TF32 products have a mantissa of 10 bits, which gives velocities a relative error of 5e-4. At rtol 1e-5 the error
    estimate of an ODE solver would measure this noise. A smaller step does not reduce the noise, so the step size would
    collapse. By default, torch uses TF32 in convolutions.
    """
    # torch.export would put each such block into a subgraph, for which ONNX has no operator
    if torch.compiler.is_exporting() or (device.type == "cpu" and not torch.is_autocast_enabled("cpu")):
        return UNCHANGED
    return _full_precision(device)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with _products(device, tf32=False), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def training_step(name: str, device: torch.device) -> Iterator[None]:
    """Sets the precision of a training step, including its backward pass: TF32 products on a GPU if `name` is "tf32".

    Code inside `full_precision`, such as the inverse of a linear map or an ODE solve, is not affected.

    Args:
        name: one of PRECISIONS.
    """
    with _products(device, tf32=name == "tf32"):
        yield


def narrowed(name: str, device: torch.device) -> torch.autocast:
    """Returns a context for the loss of a step. Convolutions and products use bfloat16 if `name` is "bfloat16".

    Run the backward pass outside the context. In the backward pass, torch uses for each operation the dtype of its
    forward pass.

    Args:
        name: one of PRECISIONS.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")


@contextmanager
def default_precision() -> Iterator[None]:
    """Sets torch's default precision of float32 products: full for matrices, TF32 for convolutions on a GPU.

    On exit, the settings of the caller are restored: `torch.set_float32_matmul_precision` and the settings of backends.
    """
    places, name, default = _precision_settings()
    before = [getattr(place, name) for place in places]
    # before torch 2.9, setting allow_tf32 also changes this setting
    first = torch.get_float32_matmul_precision() if name == "allow_tf32" else None
    for place, value in zip(places, default, strict=True):
        setattr(place, name, value)
    # read only after that, because reading this setting raises an error if it contradicts the setting of a backend
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
    """Returns the backends of CUDA and the CPU, the name of their precision attribute, and torch's default for each."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    # torch before 2.9 has other names of these settings
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
    # torch before 2.9 has other names of these settings
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
