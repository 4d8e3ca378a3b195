"""Where the real data are, which no test may need."""

import os
from pathlib import Path

import pytest

REAL = Path(os.environ.get("FLOWTRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real(*names: str) -> list[str]:
    """The paths of these files; skips the test where one is absent."""
    paths = [REAL / name for name in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        pytest.skip(f"real data not found: {', '.join(missing)}; set FLOWTRAIN_DATA")
    return [str(path) for path in paths]
