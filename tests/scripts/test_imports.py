"""The scripts import only names that exist in flowtrain. Most scripts run for too long to be run by a test."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda p: str(p.relative_to(SCRIPTS)))
def test_imported_names_exist(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flowtrain":
            module = importlib.import_module(str(node.module))
            names = [a.name for a in node.names if not hasattr(module, a.name)]
            is_package = hasattr(module, "__path__")
            missing += [name for name in names if not is_package or find_spec(f"{node.module}.{name}") is None]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "flowtrain"]
            missing += [name for name in names if find_spec(name) is None]
    assert not missing
