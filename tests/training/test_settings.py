"""Invalid trainer settings are refused."""

import math
from typing import Any

import pytest
from helpers.processes import composed

from flowtrain.training.settings import Settings
from flowtrain.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "trainer.steps=0"),
        ({"steps": 1.5}, "whole number"),
        ({"steps": True}, "trainer.steps"),
        ({"lr": "fast"}, "trainer.lr=fast"),
        ({"lr": math.nan}, "trainer.lr"),
        ({"clip_norm": 0}, "greater than 0"),
        ({"ema": 1.0}, "between 0 and 1"),
        ({"optimizer": "sgd"}, "adamw"),
        ({"lr_decay": "linear"}, "cosine"),
        ({"patience": 0}, "at least 1"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**{**composed([])["trainer"], **changes})
