"""Small graphs are shared with the tests of the passes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
