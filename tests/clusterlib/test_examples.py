"""Every example in a docstring of clusterlib runs and says what it shows.

Not by --doctest-modules: that would import every file under tests/ too, benchmarks among them.
"""

import doctest
import importlib
import pkgutil

import pytest

import clusterlib

MODULES = [found.name for found in pkgutil.walk_packages(clusterlib.__path__, "clusterlib.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
