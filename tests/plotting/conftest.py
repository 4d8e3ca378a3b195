"""Fixtures of the tests of figures."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from flowtrain.plotting import style


@pytest.fixture(scope="session")
def png_size() -> Callable[[Path], tuple[int, int]]:
    """Reads the width and the height of a PNG in pixels."""

    def read(path: Path) -> tuple[int, int]:
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        return struct.unpack(">II", header[16:24])

    return read


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> int:
    """Divides the width and height of figures in pixels by a number, which is returned. Many figures are then fast."""
    monkeypatch.setattr(style, "DPI", style.DPI // 5)
    return 5
