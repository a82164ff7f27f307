"""`make demo`: the whole road on the shipped trained model, from a checkpoint to an answer without PyTorch.

Exports tests/checkpoints/tiny-llava, lowers it to 4-bit for the CPU, streams answers about pictures from a process that
never imports torch, and prints accuracy, speed and size beside PyTorch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.train import scenes
from vlm_edge.cli.console import size, table

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests/checkpoints/tiny-llava"
OUT = ROOT / "out/demo"
TARGET = "cpu-int4"
console = Console()


def _vlm_edge(*args: str | Path) -> None:
    """Runs the command line as a user would, and stops the demo when it fails."""
    shown = " ".join(str(a.relative_to(ROOT)) if isinstance(a, Path) else (f'"{a}"' if " " in a else a) for a in args)
    console.print(f"\n[bold]$ vlm-edge {shown}[/]", highlight=False)
    subprocess.run([sys.executable, "-m", "vlm_edge", *map(str, args)], check=True, cwd=ROOT)


def _bundle_accuracy(bundle: Path, build: str, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.accuracy", str(bundle), "--build", build, "--count", str(count)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _pytorch_accuracy(examples: list[scenes.Example]) -> dict[str, Any]:
    """The same greedy answers from transformers' own generate, one example at a time, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    right, ttft, rates = 0, [], []
    for example in examples:
        content = [{"type": "image"}, {"type": "text", "text": example.prompt}]
        clock = Clock()
        began = time.perf_counter()
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[example.image], text=text, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=24, do_sample=False, streamer=clock)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer.strip() == example.answer
        tokens = clock.times[1:]  # the first call hands over the prompt
        ttft.append(tokens[0] - began)
        if len(tokens) > 1:
            rates.append((len(tokens) - 1) / (tokens[-1] - tokens[0]))
    middle = len(ttft) // 2
    return {
        "exact_match": right / len(examples),
        "ttft_ms": 1e3 * sorted(ttft)[middle],
        "decode_tps": sorted(rates)[len(rates) // 2],
    }


@click.command()
@click.option("--count", type=click.IntRange(8), default=128, show_default=True, help="Held-out examples for the accuracies.")
def main(count: int) -> None:
    """Export, lower, run and compare the shipped model."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    bundle = OUT / "tiny-llava.vlm"
    _vlm_edge("export", CHECKPOINT, bundle, "--target", TARGET)

    for number, example in enumerate(scenes.held_out_examples(4, seed=7)):
        picture = OUT / f"scene-{number}.png"
        example.image.resize((256, 256), 0).save(OUT / f"scene-{number}-large.png")
        example.image.save(picture)
        _vlm_edge("run", bundle, "--image", picture, "--prompt", example.prompt)
        console.print(f"[dim]right answer: {example.answer}[/]", highlight=False)

    console.print(f"\n[bold]Accuracy on {count} held-out compositions[/] (PyTorch here, the bundle in processes without it)")
    rows = {
        "PyTorch fp32 (transformers generate)": _pytorch_accuracy(scenes.held_out_examples(count)),
        "portable ONNX fp32": _bundle_accuracy(bundle, "portable", count),
        f"{TARGET} build": _bundle_accuracy(bundle, TARGET, count),
    }
    manifest = json.loads((bundle / "manifest.json").read_text())

    def weights(graphs: dict[str, Any]) -> int:
        refs = [ref for graph in graphs.values() for ref in (graph["model"], *graph["data"])]
        return sum({ref["file"]: ref["bytes"] for ref in refs}.values())

    sizes = {
        "PyTorch fp32 (transformers generate)": 2 * (CHECKPOINT / "model.safetensors").stat().st_size,
        "portable ONNX fp32": weights(manifest["graphs"]),
        f"{TARGET} build": weights({**manifest["graphs"], **manifest["builds"][TARGET]["graphs"]}),
    }
    drawn = table("", "what", "exact match", "TTFT", "tokens/s", "size", right=("exact match", "TTFT", "tokens/s", "size"))
    for name, row in rows.items():
        drawn.add_row(
            name, f"{row['exact_match']:.1%}", f"{row['ttft_ms']:.1f} ms", f"{row['decode_tps']:.0f}", size(sizes[name])
        )
    console.print(drawn)
    console.print(f"pictures and bundle: {OUT.relative_to(ROOT)}")
    loss = rows["PyTorch fp32 (transformers generate)"]["exact_match"] - rows[f"{TARGET} build"]["exact_match"]
    if loss > 0.03:
        raise SystemExit(f"the 4-bit build lost {loss:.1%} of the answers: that is more than quantisation explains")


if __name__ == "__main__":
    main()
