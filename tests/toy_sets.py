"""Every toy under configs/data."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from flowtrain.data.toys.base import Toy

CONFIGS = Path(__file__).parent.parent / "configs" / "data"


def toy_classes() -> dict[str, type[Toy]]:
    targets = {path.stem: OmegaConf.select(OmegaConf.load(path), "_target_") for path in CONFIGS.glob("*.yaml")}
    # the files of finite data name theirs under `data`, beside trainer keys
    classes = {name: get_class(target) for name, target in sorted(targets.items()) if target is not None}
    return {name: kind for name, kind in classes.items() if issubclass(kind, Toy)}


TOYS = toy_classes()
every_toy = pytest.mark.parametrize("name", TOYS)


@cache
def toy(name: str) -> Toy:
    arguments: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    return TOYS[name](**{key: value for key, value in arguments.items() if key not in ("name", "_target_")})
