"""`python -m benchmarks.target_plans BUNDLE`: pre-flight verdict and memory plan of every GPU target, as Markdown and JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from vlm_edge.cli.preflight import verdict
from vlm_edge.targets import targets
from vlm_edge.targets.examine import examine
from vlm_edge.targets.memory_plan import gib
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.errors import TargetError

RESULTS = Path(__file__).parent / "results"
_HEAD = (
    "target",
    "nodes",
    "decoder",
    "context × rows",
    "weights",
    "KV cache",
    "activations",
    "running",
    "of",
    "compiling",
    "fits",
)


def main(bundle: Path, name: str) -> None:
    """Examines the bundle for each target in turn, prints the table, and keeps it in `benchmarks/results`."""
    found: dict[str, Any] = {}
    rows = [_HEAD, tuple("---" for _ in _HEAD)]
    for target in targets():
        if target.device is None:
            continue
        try:
            seen = examine(bundle, target)
        except TargetError as error:
            found[target.name] = {"refused": str(error)}
            rows.append((target.name, str(error), *("" for _ in _HEAD[2:])))
            continue
        plan = seen.plan()
        found[target.name] = verdict(seen.problems, plan)
        word = next((graph.word for graph in plan.graphs if graph.role == "decoder"), "–")
        rows.append(
            (
                target.name,
                "all" if not seen.problems else f"{len(seen.problems)} refused",
                word,
                f"{plan.context} × {plan.batch}",
                gib(plan.weights),
                gib(plan.kv_cache),
                gib(plan.activations),
                gib(plan.total),
                gib(plan.usable),
                f"{gib(plan.build_least)} – {gib(plan.build_most)}" if plan.build_most else "–",
                "yes" if plan.fits else f"no. {plan.advice}",
            )
        )
        print(" | ".join(rows[-1]), flush=True)
    manifest = read_manifest(bundle)
    parameters = sum(graph.parameters for graph in manifest.graphs.values())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = (
        f"# {manifest.source.architecture}, {parameters / 1e6:.0f} M parameters, on every GPU target\n\n"
        "What `vlm-edge preflight` says at each target's own precision, longest context and most rows: whether its TensorRT "
        "imports every node, and what memory the build needs (upper estimates) of what the device has beside the system. Nothing "
        "here was run on a GPU.\n\n"
        f"{table}\n"
    )
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(msgspec.to_builtins(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", default="target_plans", help="of the result files")
    given = parser.parse_args()
    main(given.bundle, given.name)
