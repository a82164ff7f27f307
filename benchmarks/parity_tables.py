"""`python -m benchmarks.parity_tables`: the trained checkpoints against their bundles, at fp32, int8 and int4.

Exports each checkpoint, builds the three CPU targets, compares graphs, logits, greedy answers and task accuracy on held-out
scenes with PyTorch, and writes the table into benchmarks/results (a page per model beside it with --pages).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from benchmarks.train import scenes
from vlm_edge.cli.console import progress, stdout, table
from vlm_edge.export import export
from vlm_edge.parity import Pair, ParityReport, Question, compare
from vlm_edge.targets.build import build

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
WORK = ROOT / "out/parity"
TARGETS = ("cpu-fp32", "cpu-int8", "cpu-int4")
POOL = 64


def dataset(name: str, count: int) -> list[Question] | list[Pair]:
    """Held-out scenes as parity reads them: questions for the generative models, pairs in pools of 64 for CLIP."""
    if name == "tiny-clip":
        pools = max(1, count // POOL)
        return [Pair(image, text) for pool in range(pools) for image, text in scenes.held_out_captions(POOL, seed=pool)]
    kind: Literal["llava", "smolvlm"] = "smolvlm" if name == "tiny-smolvlm" else "llava"
    found = scenes.held_out_examples(count, model=kind)
    return [Question((example.image,), example.prompt, example.answer) for example in found]


@click.command()
@click.option("--count", type=click.IntRange(64), default=512, show_default=True, help="Held-out examples per model.")
@click.option("--pages", is_flag=True, help="Also write each model's report as a page into out/parity.")
@click.option("--save/--no-save", default=False, help="Write JSON and Markdown into benchmarks/results.")
def main(count: int, pages: bool, save: bool) -> None:
    """Parity of the three trained checkpoints at fp32, int8 and int4."""
    reports: dict[str, ParityReport] = {}
    with progress() as listener:
        for name in ("tiny-llava", "tiny-smolvlm", "tiny-clip"):
            checkpoint, bundle = ROOT / "tests/checkpoints" / name, WORK / f"{name}.vlm"
            export(checkpoint, bundle, overwrite=True, progress=listener)
            for target in TARGETS:
                build(bundle, target, progress=listener)
            reports[name] = compare(bundle, str(checkpoint), dataset=dataset(name, count), progress=listener)
            if pages:
                reports[name].to_html(WORK / f"{name}.html")
    lines = ["| model | build | verdict | subject | numbers |", "|---|---|---|---|---|"]
    drawn = table(f"Parity with PyTorch, {count} held-out examples", "model", "build", "verdict", "subject", "numbers")
    for name, report in reports.items():
        verdicts = {each.name: each.verdict for each in report.builds}
        for row in report.rows():
            cells = (name, row.what, f"{row.verdict} ({verdicts.get(row.what, '')})", row.subject, row.numbers)
            lines.append("| " + " | ".join(cells) + " |")
            drawn.add_row(*cells)
    stdout.print(drawn)
    if save:
        RESULTS.mkdir(exist_ok=True)
        head = f"### Parity with PyTorch of the trained checkpoints, {count} held-out examples\n\n"
        head += "Verdict: of the row (of the build).\n\n"
        (RESULTS / "parity.md").write_text(head + "\n".join(lines) + "\n")
        rows = {name: [{"build": r.what, "subject": r.subject, "verdict": r.verdict, "numbers": r.numbers} for r in report.rows()]
                for name, report in reports.items()}  # fmt: skip
        (RESULTS / "parity.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
