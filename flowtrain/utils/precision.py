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
