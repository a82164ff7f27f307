"""`vlm-edge targets`: what a bundle can be built for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click
import msgspec

from .console import echo_json, stdout, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_edge.targets import Target

_GROUPS = {
    "ort-cpu": "CPU, by ONNX Runtime",
    "ort-cuda": "GPU, by ONNX Runtime CUDA",
    "tensorrt-rtx": "GeForce RTX, by TensorRT-RTX (engines are compiled on any machine)",
    "tensorrt": "Jetson and data centre, by TensorRT (engines are compiled on the device)",
}
_PLAIN = ("fp32", "fp16", "bf16")


@click.command(name="targets", short_help="List build targets.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output: everything that is known of each.")
def command(name: str | None, as_json: bool) -> None:
    """List the targets, or say all of one (NAME, or the path of a TOML file of your own, which `--target` takes as well).

    \b
    vlm-edge targets
    vlm-edge targets rtx-4090 --json
    """
    from vlm_edge.targets import load_target, targets

    known = [load_target(name)] if name else targets()
    if as_json:
        found = [msgspec.to_builtins(target) for target in known]
        echo_json(found[0] if name else found)
        return
    for backend, title in _GROUPS.items():
        some = [target for target in known if target.backend == backend]
        if some:
            (_gpus if some[0].device else _cpus)(title, some)
    if name and known[0].device:
        _details(known[0])


def _cpus(title: str, known: Sequence[Target]) -> None:
    drawn = table(title, "name", "precision", "runs well on", "what it is")
    drawn.columns[0].no_wrap = True
    for target in known:
        drawn.add_row(target.name, _words(target), ", ".join(target.architectures), target.description)
    stdout.print(drawn, highlight=False)


def _gpus(title: str, known: Sequence[Target]) -> None:
    right = ("memory", "GB/s")
    drawn = table(f"\n{title}", "name", "SM", "TensorRT", "built as", "can also", *right, right=right)
    drawn.columns[0].no_wrap = drawn.columns[2].no_wrap = True
    for target in known:
        device, _ = target.gpu()
        drawn.add_row(
            target.name,
            " ".join(f"{sm // 10}.{sm % 10}" for sm in device.sm),
            device.tensorrt or "–",
            _words(target),
            " ".join(word for word in device.precisions if word not in _PLAIN),
            f"{device.memory_gib:g} GiB",
            f"{device.bandwidth_gbs:g}",
        )
    stdout.print(drawn, highlight=False)
    cards = [card for target in known for card in target.cards]
    if cards:
        stdout.print(f"[dim]by name as well, with a memory of their own: {', '.join(cards)}[/]", highlight=False)


def _details(target: Target) -> None:
    device, context = target.gpu()
    stdout.print(
        f"context buckets {', '.join(map(str, context.buckets))} tokens, up to {context.max_batch} rows", highlight=False
    )
    stdout.print(f"precisions of the hardware: {', '.join(device.precisions)}", highlight=False)
    native = ", ".join(device.imports) or "none of the operators of opset 23 and 24"
    stdout.print(f"opset {device.opset} at most; imports {native}", highlight=False)
    shared = ", which the CPU shares," if device.memory_shared else ""
    stdout.print(f"{device.reserved_gib:g} GiB of the memory{shared} stay with the system", highlight=False)


def _words(target: Target) -> str:
    """The precision that most graphs have, and what differs: `fp16, decoder int4`."""
    most = Counter(target.precision.values()).most_common(1)[0][0]
    return ", ".join([most, *(f"{role} {word}" for role, word in target.precision.items() if word != most)])
