"""`python -m benchmarks.gpu_check`: sets up the environment with the standard library alone, and goes on in it.

What the check itself imports may only exist among the wheels that were carried along.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from .environment import ROOT, EnvironmentFault, prepare

WORK = ROOT / "out" / "gpu_check" / "work"


def main(arguments: list[str]) -> None:
    """Prepares, then runs `command.main` here or in the environment that was made."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--work", type=Path, default=WORK)
    known, _ = parser.parse_known_args(arguments)
    if {"--dry-run", "--help"} & set(arguments):
        go_on(arguments)
    began, fault, python, installed = time.time(), "", sys.executable, list[str]()
    try:
        python, installed = prepare(known.wheels, known.work / "environment")
    except EnvironmentFault as error:
        fault = str(error)
        print(f"environment: {fault}", file=sys.stderr)
    prepared = json.dumps({"began": began, "seconds": time.time() - began, "installed": installed, "fault": fault})
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "runtimes"), os.environ.get("PYTHONPATH", "")])
    arguments = [*arguments, "--prepared", prepared]
    if python != sys.executable:
        os.execv(python, [python, "-m", "benchmarks.gpu_check.command", *arguments])
    go_on(arguments)


def go_on(arguments: list[str]) -> None:
    """The rest, in this process. Does not return."""
    from .command import main as command

    command(arguments, prog_name="python -m benchmarks.gpu_check")


if __name__ == "__main__":
    main(sys.argv[1:])
