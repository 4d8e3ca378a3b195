"""Fixtures for the tests of data sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Refused

from flowtrain.data.images import IDXImages
from flowtrain.utils.errors import FlowtrainError


@pytest.fixture(scope="session")
def refused() -> Refused:
    """Returns a function that checks the type and the fragments of a call's error message, and returns the message."""

    def check(call: Callable[[], object], kind: type[FlowtrainError], fragments: list[str]) -> str:
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        assert [part for part in fragments if part not in message] == [], message
        return message

    return check


@pytest.fixture(scope="session")
def make() -> Callable[..., IDXImages]:
    """Returns a function that opens a folder of images written by `write_set`."""

    def open_images(root: Path, **options: Any) -> IDXImages:
        return IDXImages("mnist", str(root), **{"n_val": 10, **options})

    return open_images
