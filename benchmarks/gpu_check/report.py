"""The findings as JSON and as Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .models import SHAPES, decoder_bytes

Row = dict[str, Any]


def save(folder: Path, name: str, document: Mapping[str, Any], kit: Path, work: Path) -> list[Path]:
    """Writes `name`.json and `name`.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    files[0].write_text(json.dumps(document, indent=2) + "\n")
    files[1].write_text(markdown(document, _weights(work)))
    return files


def markdown(document: Mapping[str, Any], weights: Mapping[str, Mapping[str, int]]) -> str:
    """Everything that was found. `weights`: shape → build → bytes of decoder weights that a step reads."""
    steps: Sequence[Row] = document["steps"]
    machine: Row = next((step["result"] for step in steps if step["name"] == "machine" and step.get("result")), {})
    lines = [f"# {machine.get('gpu', 'unknown GPU')}, {document['date']}", ""]
    if document["mode"] == "cpu":
        lines += [
            "**No GPU was used: this is the flow on the CPU provider with a tiny model. No figure here says anything.**",
            "",
        ]
    lines += [f"Command: `{document['command']}`", "", f"Commit: {document['commit']}", ""]
    lines += _machine(machine) + _parity(steps) + _speed(steps, machine, weights) + _probe(steps) + _rest(steps)
    return "\n".join(lines) + "\n"


def _machine(machine: Mapping[str, Any]) -> list[str]:
    if not machine:
        return ["The machine's facts could not be taken; see the steps below.", ""]
    rates = f"read bandwidth {machine['read_bandwidth'] / 1e9:.0f} GB/s, matrix rate {machine['matrix_rate'] / 1e12:.1f} TFLOP/s"
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return [f"{machine['nvidia_smi']}; SM {machine['sm']}; {rates} (both measured with PyTorch)", "", packages, ""]


def _parity(steps: Sequence[Row]) -> list[str]:
    rows = [
        (step["name"].removesuffix(": parity"), step["result"])
        for step in steps
        if step["work"] == "parity" and step.get("result")
    ]
    if not rows:
        return []
    lines = ["## Parity with the portable graphs on this machine's CPU", "", "| build | verdict | right answers (reference) | "]
    lines[-1] += "largest relative difference | smallest cosine |"
    lines.append("|---|---|---|---|---|")
    for name, found in rows:
        right = f"{found['right']} ({found['reference_right']}) of {found['examples']}"
        lines.append(f"| {name} | {found['verdict']} | {right} | {found['relative']:.1e} | {found['cosine']:.6f} |")
    return [*lines, ""]


def _speed(steps: Sequence[Row], machine: Mapping[str, Any], weights: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines: list[str] = []
    for shape in SHAPES:
        found: dict[str, list[Row]] = {}
        for step in steps:
            if step["work"] in ("ours", "peer") and step.get("result") and step["name"].startswith(f"{shape} "):
                found.setdefault(re.sub(r": round \d+$", "", step["name"]).removeprefix(f"{shape} "), []).append(step["result"])
        if not found:
            continue
        one = next(iter(found.values()))[0]
        lines += [f"## {shape}: {SHAPES[shape].source}", ""]
        lines += [
            f"Random weights, one tile, {one['prompt_tokens']:.0f} prompt tokens, {one['new_tokens']:.0f} new ones; medians.",
            "",
        ]
        heads = ["", "rounds", "TTFT ms", "of it preprocessing ms", "vision ms", "prefill ms", "ms per token", "tokens/s"]
        heads += ["% of read bandwidth", "% of matrix rate in prefill"]
        lines.append("| " + " | ".join(heads) + " |")
        lines.append("|---" * 10 + "|")
        for name, rounds in found.items():
            row = {
                key: statistics.median(each[key] for each in rounds)
                for key in rounds[0]
                if key.endswith("_s") or key == "prompt_tokens"
            }
            lines.append(_line(name, len(rounds), row, shape, machine, weights.get(shape, {})))
        reasons = {each["uncaptured"] for rounds in found.values() for each in rounds if each.get("uncaptured")}
        lines += ["", *[f"Steps without CUDA graphs: {reason}" for reason in sorted(reasons)], ""]
    return lines


def _line(
    name: str, rounds: int, row: Mapping[str, float], shape: str, machine: Mapping[str, Any], weights: Mapping[str, int]
) -> str:
    known = SHAPES[shape]
    build = next((label for label in weights if label in name), None)
    read = weights[build] if build is not None else 2 * known.decoder_parameters
    read += int(known.kv_bytes_per_token * row["prompt_tokens"])
    flops = 2 * known.decoder_parameters * row["prompt_tokens"]
    bandwidth = rate = "–"
    if machine and row["tpot_s"] > 0 and row["prefill_s"] > 0:
        bandwidth = f"{100 * read / row['tpot_s'] / machine['read_bandwidth']:.0f}"
        rate = f"{100 * flops / row['prefill_s'] / machine['matrix_rate']:.0f}"
    times = " | ".join(f"{1e3 * row[key]:.1f}" for key in ("ttft_s", "preprocess_s", "vision_s", "prefill_s"))
    speed = f"{1 / row['tpot_s']:.0f}" if row["tpot_s"] > 0 else "–"
    return f"| {name} | {rounds} | {times} | {1e3 * row['tpot_s']:.2f} | {speed} | {bandwidth} | {rate} |"


def _probe(steps: Sequence[Row]) -> list[str]:
    step = next((one for one in steps if one["work"] == "rtx-default-load" and one.get("result")), None)
    if step is None:
        return []
    found = step["result"]
    verdict = "loads" if found["loads"] else f"does not load ({found['said'][-1] if found['said'] else 'no reason given'})"
    return ["## TensorRT-RTX's default engine", "", f"Built for no named GPU by {found['version']}, it {verdict}.", ""]


def _rest(steps: Sequence[Row]) -> list[str]:
    lines = ["## Steps", "", "| step | state | s | what was said |", "|---|---|---|---|"]
    for step in steps:
        said = " ".join(str(step.get("message", "")).split()).replace("|", "/")[:300]
        lines.append(f"| {step['name']} | {step['state']} | {step['seconds']:.1f} | {said} |")
    return [*lines, ""]


def _weights(work: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name in SHAPES:
        bundle = work / "shapes" / f"{name}.vlm"
        if (bundle / "manifest.json").is_file():
            labels = [path.name for path in (bundle / "builds").iterdir() if path.is_dir()]
            found[name] = {label: decoder_bytes(bundle, label) for label in labels}
    return found
