"""Task accuracy of a bundle, in a process that has no PyTorch: `python -m benchmarks.accuracy BUNDLE --build cpu-int4`.

Exact match of greedy answers on held-out scenes (and on easy-vqa with `--task easy-vqa`); for a dual encoder, top-1
retrieval in pools of 64, both ways.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from benchmarks.train import easyvqa, scenes
from vlm_edge_runtime import DualEncoder, VisionLanguageModel, load

POOL = 64


def exact_match(session: VisionLanguageModel, examples: Sequence[scenes.Example], max_new_tokens: int = 24) -> float:
    """Share of examples whose greedy answer equals the right one, character for character (outer spaces aside)."""
    right = 0
    for example in examples:
        answer = session.generate(example.prompt, images=[example.image], temperature=0.0, max_new_tokens=max_new_tokens)
        right += answer.text.strip() == example.answer
    return right / len(examples)


def retrieval(session: DualEncoder, pools: int) -> dict[str, float]:
    """Top-1 retrieval within pools of 64 pairs with captions that are all different: image → text and text → image."""
    scores = []
    for pool in range(pools):
        pairs = scenes.held_out_captions(POOL, seed=pool)
        images = session.embed_image([image for image, _ in pairs])
        texts = session.embed_text([caption for _, caption in pairs])
        scores.append(images @ texts.T)
    own = np.arange(POOL)
    return {
        "image_to_text": float(np.mean([s.argmax(1) == own for s in scores])),
        "text_to_image": float(np.mean([s.argmax(0) == own for s in scores])),
    }


def measure(bundle: Path, build: str, task: str, count: int) -> dict[str, Any]:
    """Accuracy of one build, with the speed of the same calls (medians over the examples)."""
    with load(bundle, build=build) as session:
        if isinstance(session, DualEncoder):
            pools = max(1, count // POOL)
            return {"build": build, "examples": pools * POOL, **retrieval(session, pools)}
        kind: Literal["smolvlm", "llava"] = "smolvlm" if session.manifest.model_type in ("smolvlm", "idefics3") else "llava"
        data = scenes.held_out_examples(count, model=kind) if task == "scenes" else easyvqa.test_examples(count)
        ttft: list[float] = []
        rates: list[float] = []
        right = 0
        for example in data:
            answer = session.generate(example.prompt, images=[example.image], temperature=0.0, max_new_tokens=24)
            right += answer.text.strip() == example.answer
            ttft.append(session.stats.ttft_s)
            if session.stats.decode_tps:
                rates.append(session.stats.decode_tps)
        return {
            "build": build,
            "examples": len(data),
            "exact_match": right / len(data),
            "ttft_ms": 1e3 * float(np.median(ttft)),
            "decode_tps": float(np.median(rates)) if rates else 0.0,
        }


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--build", default="portable", show_default=True)
@click.option("--task", type=click.Choice(["scenes", "easy-vqa"]), default="scenes", show_default=True)
@click.option("--count", type=click.IntRange(1), default=512, show_default=True, help="Examples, evenly spread.")
def main(bundle: Path, build: str, task: str, count: int) -> None:
    """Prints one JSON line with the accuracy of BUNDLE's build."""
    result = measure(bundle, build, task, count)
    if "torch" in sys.modules:
        raise SystemExit("this measurement is meant for a process without PyTorch, and torch was imported")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
