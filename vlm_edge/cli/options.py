"""Options that several commands share, said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_LOWERING = (
    click.option(
        "--precision", help="Of the builds: one word (each graph gets the nearest it can have), or vision=int8,decoder=int4."
    ),
    click.option(
        "--block-size",
        type=click.Choice(["16", "32", "64", "128"]),
        help="Weights per quantisation scale in 4/8-bit weight-only graphs (32 on the CPU, 128 on GPUs unless you say).",
    ),
    click.option(
        "--calibrate",
        type=click.Path(exists=True, path_type=Path),
        help="Folder of pictures: int8 activations get static ranges from them. Native kernels measure ranges while they run and "
        "take channels' maxima and means from the pictures (of the first 32).",
    ),
)


_COMPILING = (
    click.option("--sm", help="Compute capabilities that engines are for, as 86,89 (default: the target's); one engine for all."),
    click.option("--context", help="Cache sizes in tokens, one decoder each, as 1024,4096 (default: the target's)."),
    click.option("--max-batch", type=click.IntRange(min=1), help="Rows that decode together at most (default: the target's)."),
    click.option(
        "--profiles",
        type=click.Choice(["auto", "one", "two"]),
        default="auto",
        show_default=True,
        help="Optimisation profiles of a decoder's engine: prefill and decode apart, or together.",
    ),
    click.option(
        "--engines/--no-engines", "make_engines", default=True, help="Compile engines, or make and check the graphs alone."
    ),
)


def cache_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--kv: in what decoders on the CPU keep keys and values."""
    return click.option(
        "--kv",
        type=click.Choice(["float", "int8"]),
        help="KV cache of native decoders on the CPU: float16 (float32 beside fp32 weights), or int8 with a float16 scale for 32 "
        "numbers: 53 % of float16's memory. Static keys of cross-attention stay float32 (default: the target's, float).",
    )(command)


def compiling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--sm, --context, --max-batch, --profiles and --no-engines: what is compiled for a target with engines."""
    for option in reversed(_COMPILING):
        command = option(command)
    return command


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """`86,89` → (86, 89). Raises a usage error that names the option."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{option} takes whole numbers between commas, got '{text}'.") from None


def lowering_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--precision, --block-size and --calibrate: how graphs are lowered for a target."""
    for option in reversed(_LOWERING):
        command = option(command)
    return command
