"""The examples in flowtrain's docstrings, which are run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import flowtrain

MODULES = ["flowtrain", *(found.name for found in pkgutil.walk_packages(flowtrain.__path__, "flowtrain."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_their_docstrings_say(name: str) -> None:
    """doctest prints what differs."""
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def test_there_are_examples_to_run() -> None:
    """A change of how examples are written, or found, does not leave all the tests above with nothing to do."""
    finder = doctest.DocTestFinder()
    modules = map(importlib.import_module, MODULES)
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) > 25
