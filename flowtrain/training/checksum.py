"""A checksum of what a checkpoint says, wherever its bytes lie in the file."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from flowtrain.errors import CheckpointError


def checksum(content: Any) -> str:
    """SHA-256 of plain values and tensors, by type, order and value.

    Raises:
        CheckpointError: a value of another kind, or a tensor that claims more than its memory holds.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)};".encode())
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise CheckpointError(f"a {type(value).__name__} is no plain value")


def _add_tensor(digest: Any, value: Tensor) -> None:
    # a few bytes can claim a tensor of any shape, which would be written out below
    if value.device.type != "cpu":
        raise CheckpointError(f"a tensor is on {value.device}, where no file can put it")
    if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"a tensor of shape {tuple(value.shape)} has less memory than that")
    digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
