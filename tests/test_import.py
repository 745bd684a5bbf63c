"""What `import bilevel` loads, and that each public name is there and listed."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import bilevel

PUBLIC = [bilevel, *(part for part in vars(bilevel).values() if isinstance(part, ModuleType))]
PUBLIC = [module for module in PUBLIC if not module.__name__.rpartition(".")[2].startswith("_")]
HEAVY = ("scipy", "torch._dynamo", "torchvision", "matplotlib", "pandas", "sympy.plotting")
LIGHT = "torch, numpy, optree"  # what `import bilevel` may add to


def test_import_loads_nothing_heavy() -> None:
    code = (
        f"import sys, {LIGHT}; before = set(sys.modules); import bilevel; "
        f"print(*(m for m in {HEAVY!r} if m in set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""


def test_import_does_not_load_the_test_problems() -> None:
    code = "import sys, bilevel; print('bilevel.testing' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_lists_names_that_are_there_once(module: ModuleType) -> None:
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_all_of_the_package_is_complete() -> None:
    """Each name without an underscore that the package binds, but for its own parts, is listed."""
    parts = {info.name for info in pkgutil.iter_modules(bilevel.__path__)}
    found = {name for name in vars(bilevel) if not name.startswith("_")} - parts
    listed = set(bilevel.__all__)
    assert found - listed == set()
    assert {name for name in listed if inspect.ismodule(getattr(bilevel, name))} <= parts


def test_testing_offers_problems_and_checks() -> None:
    testing = importlib.import_module("bilevel.testing")
    assert set(testing.__all__) >= {"check_hypergradient_estimator", "check_solver", "problems"}
