"""Fixtures for the tests of toys. A test with the argument `name` runs for every toy in configs/data."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from flowtrain.data.toys.base import Toy
from flowtrain.utils.files import config_dir

CONFIGS = config_dir() / "data"


def toy_classes() -> dict[str, type[Toy]]:
    targets = {path.stem: OmegaConf.select(OmegaConf.load(path), "_target_") for path in CONFIGS.glob("*.yaml")}
    # configs of finite data sets have their _target_ under `data`, because they set trainer keys too
    classes = {name: get_class(target) for name, target in sorted(targets.items()) if target is not None}
    return {name: kind for name, kind in classes.items() if issubclass(kind, Toy)}


TOYS = toy_classes()


@pytest.fixture(params=TOYS)
def name(request: pytest.FixtureRequest) -> str:
    """Returns the name of a toy."""
    return str(request.param)


@pytest.fixture(scope="session")
def toys() -> dict[str, type[Toy]]:
    """Returns the class of every toy."""
    return TOYS


@pytest.fixture(scope="session")
def toy() -> Callable[[str], Toy]:
    """Returns a function that builds a toy from its config and caches it."""

    @cache
    def build(name: str) -> Toy:
        arguments: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
        return TOYS[name](**{key: value for key, value in arguments.items() if key not in ("name", "_target_")})

    return build
