"""Full precision inside a solve."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turns autocast off, and TF32 on a GPU.

    TF32 products carry 10 bits of mantissa, an error of 5e-4 in every velocity: at rtol 1e-5 the error estimate would
    measure that noise, which no step size cures, and the step size would collapse. torch allows TF32 in convolutions
    unless told otherwise.
    """
    if device.type != "cuda":
        with torch.autocast(device.type, enabled=False):
            yield
        return
    products: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # torch before 2.9 knows these by other names
    old = not hasattr(cudnn, "conv")
    places, name = ((products, cudnn), "allow_tf32") if old else ((products, cudnn.conv), "fp32_precision")
    off: Any = False if old else "ieee"
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, off)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
