"""Imports go down only (design.md, section 2)."""

import ast
from pathlib import Path

import flowtrain

PACKAGE = Path(flowtrain.__file__).parent
# from the top; modules on one line do not import each other
LAYERS = [
    ("__main__",),
    ("cli",),
    ("run",),
    ("console", "report", "sweep"),
    ("pictures",),
    ("__init__",),
    ("loading",),
    ("build",),
    ("training", "quality"),
    ("evaluation",),
    ("scores", "trajectory"),
    ("plots",),
    ("objectives", "models"),
    ("flow",),
    ("bijections",),
    ("regularizers",),
    ("divergence", "conditioners"),
    ("fields", "solvers", "data", "paths", "process", "sizing", "titles"),
    (
        "checks",
        "clock",
        "collecting",
        "covariance",
        "derivatives",
        "distributed",
        "files",
        "markdown",
        "precision",
        "seeding",
        "trust",
    ),
    ("errors", "quoting", "status", "suggestions"),
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flowtrain":
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("flowtrain.")}
    return names


def test_imports_go_down() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = module_of(path)
        for name in imported(path):
            same = name == here
            if not same and LEVEL[name] <= LEVEL[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports flowtrain.{name}")
    assert not wrong


def test_every_module_has_its_layer() -> None:
    assert {module_of(p) for p in PACKAGE.rglob("*.py")} == set(LEVEL)


def test_instantiate_is_called_in_build_alone() -> None:
    users = [p.name for p in PACKAGE.rglob("*.py") if "instantiate" in p.read_text()]
    assert users == ["build.py"]
