"""Bitwise comparison of the results of two runs."""

import json
from pathlib import Path
from typing import Any

import torch


def differences(run: Path, whole: Path) -> list[str]:
    """Returns the differences between two run directories, except for seconds."""
    found = [] if rows(run) == rows(whole) else ["metrics.jsonl differs"]
    for name in ("last.pt", "best.pt"):
        read = [torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (run, whole)]
        found += value_differences(*read, name)
    return found + value_differences(
        *(json.loads((folder / "result.json").read_text()) for folder in (run, whole)), "result.json"
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def value_differences(a: Any, b: Any, where: str) -> list[str]:
    """Returns where two values differ, ignoring seconds and the checksum, which covers the seconds."""
    if type(a) is not type(b):
        return [f"{where} is a {type(a).__name__}, not a {type(b).__name__}"]
    if isinstance(a, dict):
        keys = [key for key in {**a, **b} if "seconds" not in str(key) and key != "checksum"]
        return [found for key in keys for found in value_differences(a.get(key), b.get(key), f"{where}:{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [
            found for i, pair in enumerate(zip(a, b, strict=True)) for found in value_differences(*pair, f"{where}:{i}")
        ]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    else:
        # compared by repr: NaN equals NaN, and 0.0 differs from -0.0
        same = repr(a) == repr(b)
    return [] if same else [f"{where} differs"]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
