"""What merging visual tokens costs: `python -m benchmarks.token_merging`.

Exports each trained checkpoint whose tokens can be merged with nothing, a quarter, a half and three quarters of them merged away
(`vlm-edge export --merge-visual-tokens`), and asks each bundle's portable graphs the same held-out questions. Exact match of
greedy answers, character for character; by kind of question, too. The models are small: an image (or tile) is 4 or 16 tokens,
each of which knows something that no other does, where a large model's hundreds repeat each other. Nothing is trained after the
merge; what goes first is where things stand, which these decoders read off a token's place in the row.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.train import scenes
from vlm_edge.cli.console import progress, stdout, table
from vlm_edge_runtime import VisionLanguageModel, load
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import read_manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
WORK = ROOT / "out/token_merging"
MODELS = ("tiny-llava", "tiny-smolvlm", "tiny-minigpt_v2")
SHARES = (0, 25, 50, 75)


def questions(model: str, count: int) -> list[scenes.Example]:
    """Held-out scenes at the size that the model takes."""
    kind: Literal["llava", "smolvlm"] = "smolvlm" if model == "tiny-smolvlm" else "llava"
    return scenes.held_out_examples(count, model=kind)


def kind(prompt: str) -> str:
    """What a question asks for: a description, a number, a place, whether something is there, or a property."""
    if prompt.startswith(("describe", "what do you see")):
        return "describe"
    return {"how": "how many", "where": "where", "is": "is there"}.get(prompt.split()[0], "what")


def measure(bundle: Path, examples: Sequence[scenes.Example]) -> dict[str, Any]:
    """Exact match over all examples and by kind; how many tokens an image (or tile) has, and a prompt on average."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    prompt_tokens = 0
    with load(bundle, device="cpu", build="portable") as session:
        assert isinstance(session, VisionLanguageModel)  # as all of MODELS are
        for example in examples:
            answer = session.generate(example.prompt, images=[example.image], temperature=0.0, max_new_tokens=24)
            by_kind[kind(example.prompt)].append(answer.text.strip() == example.answer)
            prompt_tokens += session.stats.prompt_tokens
    right = [one for found in by_kind.values() for one in found]
    manifest = read_manifest(bundle)
    assert isinstance(manifest.contract, GenerativeContract)
    image = manifest.contract.modality("image")
    assert image is not None
    tokens = manifest.graphs[image.graphs[-1]].outputs[0].shape[1]
    return {
        "tokens": tokens,
        "prompt_tokens": prompt_tokens / len(examples),
        "exact_match": sum(right) / len(right),
        "standard_error": math.sqrt(sum(right) / len(right) * (1 - sum(right) / len(right)) / len(right)),
        "by_kind": {asked: sum(found) / len(found) for asked, found in sorted(by_kind.items())},
    }


def rows(results: dict[str, dict[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    """One line of the table for each model and share; the loss in points of exact match against nothing merged."""
    lines: list[tuple[str, ...]] = []
    for model, found in results.items():
        whole = found["0"]["exact_match"]
        for share, one in found.items():
            kinds = ", ".join(f"{asked} {100 * value:.0f}" for asked, value in one["by_kind"].items())
            lost = "" if share == "0" else f"{100 * (one['exact_match'] - whole):+.1f}"
            exact = f"{100 * one['exact_match']:.1f} % (± {100 * one['standard_error']:.1f})"
            lines.append((model, f"{share} %", str(one["tokens"]), f"{one['prompt_tokens']:.0f}", exact, lost, kinds))
    return lines


def _export(checkpoint: Path, bundle: Path, share: int) -> None:
    from vlm_edge.export import export  # PyTorch, which measuring has no need of

    bundle.parent.mkdir(parents=True, exist_ok=True)
    with progress(quiet=True) as listener:
        export(checkpoint, bundle, overwrite=True, progress=listener, merge_visual_tokens=f"{share}%")


@click.command()
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Held-out questions per model.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="One of the checkpoints (default: all).")
@click.option("--reuse", is_flag=True, help="Bundles that lie in out/token_merging already are not exported again.")
@click.option("--save/--no-save", default=True, help="Write JSON and Markdown into benchmarks/results.")
def main(count: int, models: tuple[str, ...], reuse: bool, save: bool) -> None:
    """Accuracy of the trained checkpoints with 0, 25, 50 and 75 % of their visual tokens merged."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models or MODELS:
        results[model] = {}
        examples = questions(model, count)
        for share in SHARES:
            bundle = WORK / f"{model}-{share}.vlm"
            if not (reuse and bundle.exists()):
                _export(ROOT / "tests/checkpoints" / model, bundle, share)
            results[model][str(share)] = measure(bundle, examples)
            stdout.print(f"{model}, {share} % merged: {100 * results[model][str(share)]['exact_match']:.1f} %", highlight=False)
    heads = ("model", "merged away", "tokens per image or tile", "tokens of a prompt", "exact match", "points", "by kind, %")
    found = rows(results)
    drawn = table(f"Merged visual tokens, {count} held-out questions", *heads)
    for row in found:
        drawn.add_row(*row)
    stdout.print(drawn)
    if save:
        lines = ["| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *found)]
        title = (
            f"### Exact match with merged visual tokens, {count} held-out questions\n\n`python -m benchmarks.token_merging`\n\n"
        )
        (RESULTS / "token_merging.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
        content = {"questions": count, "models": results}
        (RESULTS / "token_merging.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
