"""What a refusal says."""

from collections.abc import Callable

import pytest

from flowtrain.utils.errors import FlowtrainError


def refused(call: Callable[[], object], kind: type[FlowtrainError], fragments: list[str]) -> str:
    """The message, which holds all the fragments."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [part for part in fragments if part not in message] == [], message
    return message
