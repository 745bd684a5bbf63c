import sys
from pathlib import Path

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
sys.path.insert(0, str(TUTORIALS))  # the tutorials import each other by their bare names
