"""What a process of its own does in a test; it imports nothing else of the tests."""

from pathlib import Path
from typing import Any

from flowtrain.runs.lock import holding


def hold(run_dir: Path, ready: Any, leave: Any) -> None:
    with holding(run_dir):
        ready.set()
        leave.wait(60)
