"""Shared by every test: a seed, and float64 as the default so that closed forms can be compared tightly."""

from collections.abc import Iterator

import matplotlib
import pytest
import torch

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def seeded_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
