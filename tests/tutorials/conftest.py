import importlib.util
import sys
from pathlib import Path

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
sys.path.insert(0, str(TUTORIALS))  # the tutorials import each other by their bare names

if not all(map(importlib.util.find_spec, ("matplotlib", "sklearn"))):
    collect_ignore_glob = ["test_*.py"]  # they need the `docs` extra
