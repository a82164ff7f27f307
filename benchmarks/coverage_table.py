"""`python -m benchmarks.coverage_table`: writes the coverage table of README.md from what the tests found (coverage.json)."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_edge.families import coverage

README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> None:
    """Replaces what stands between the two marks."""
    text = README.read_text(encoding="utf-8")
    made = f"<!-- coverage -->\n{coverage.markdown()}<!-- /coverage -->"
    README.write_text(
        re.sub(r"<!-- coverage -->\n.*?<!-- /coverage -->", lambda _: made, text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
