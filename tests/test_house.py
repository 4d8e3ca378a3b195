"""No function over 60 lines and no file over 300, unless the reason stands at its head (design.md, section 3).

A reason is a sentence of the module's docstring: "Longer than 300 lines because ...", or "longer than 60 lines ...".
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("flowtrain", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))
MOST = {"file": 300, "function": 60}


def too_long(text: str) -> list[str]:
    """What is longer than it may be, by name: the file itself, functions, methods and functions in them."""
    tree = ast.parse(text)
    lengths = [("file", "the file", len(text.splitlines()))]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # decorators, such as the cases of a test, are not what has to be followed
            lengths.append(("function", node.name, (node.end_lineno or 0) - node.lineno + 1))
    head = " ".join((ast.get_docstring(tree) or "").lower().split())
    excused = {kind for kind, most in MOST.items() if f"longer than {most} lines because" in head}
    return [f"{name}: {n} lines" for kind, name, n in lengths if n > MOST[kind] and kind not in excused]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_fits_a_screen(path: Path) -> None:
    assert not too_long(path.read_text())


def test_what_is_too_long_is_found_unless_a_reason_is_given() -> None:
    long = "def f():\n" + 60 * "    pass\n"
    method = "class A:\n    def g(self):\n" + 60 * "        pass\n"
    assert too_long(long) == ["f: 61 lines"]
    assert too_long(method) == ["g: 61 lines"]
    assert too_long(301 * "\n") == ["the file: 301 lines"]
    assert not too_long(300 * "\n")
    assert too_long('"""A table, longer than 300 lines because it is one."""\n' + 300 * "\n" + long) == ["f: 61 lines"]
    assert not too_long('"""One switch. Longer than 60 lines\nbecause cases belong together."""\n' + long)
