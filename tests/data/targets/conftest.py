"""Fixtures for the tests of targets. A test with the argument `target` runs for every target that needs no file."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowtrain.data.targets.base import Target
from flowtrain.runs.build import build_target
from flowtrain.runs.compose import compose, options
from flowtrain.utils.files import config_dir

NAMES = [name for name in options("target", [config_dir()]) if name not in ("custom", "logistic_regression")]


def build(name: str, **keys: object) -> Target:
    """Returns the target of a config."""
    settings = {"data": "target", "target": name, **{f"target.{key}": value for key, value in keys.items()}}
    return build_target(compose(settings).config)


def draw(target: Target, n: int = 20_000, seed: int = 3) -> Tensor:
    found = target.sample(n, torch.Generator().manual_seed(seed))
    assert found is not None
    return found


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest) -> Target:
    return build(request.param)


@pytest.fixture
def named() -> Callable[..., Target]:
    """Returns the function that builds a target by its name."""
    return build


@pytest.fixture
def samples() -> Callable[..., Tensor]:
    """Returns the function that draws exact samples of a target."""
    return draw
