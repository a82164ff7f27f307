"""One step in its own process: `python -m benchmarks.gpu_check.work KIND '{"option": …}'` prints one RESULT line."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

KINDS = {
    "machine": "machine:facts",
    "rtx-default-build": "probe:build_default",
    "rtx-default-load": "probe:load_default",
    "fill": "measure:filled",
    "build": "measure:built",
    "parity": "parity:check",
    "ours": "measure:ours",
    "peer": "peers:measured",
}
"""Kind of work → module and function, which takes the options and gives the result."""

MARK = "RESULT "


def main(kind: str, options: dict[str, Any]) -> None:
    """Does the work and prints its result."""
    module, name = KINDS[kind].split(":")
    result = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)(**options)
    sys.stdout.write(MARK + json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
