"""Runs the examples in flowtrain's docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import flowtrain

MODULES = ["flowtrain", *(found.name for found in pkgutil.walk_packages(flowtrain.__path__, "flowtrain."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_their_docstrings_say(name: str) -> None:
    """doctest prints the differences."""
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def test_there_are_examples_to_run() -> None:
    """Guards against a change that leaves the tests above without examples to run."""
    finder = doctest.DocTestFinder()
    modules = map(importlib.import_module, MODULES)
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) > 25
