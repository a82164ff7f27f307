"""Options that several commands share, said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_LOWERING = (
    click.option("--precision", help="Of the builds: one word for all graphs, or vision=int8,projector=fp32,decoder=int4."),
    click.option(
        "--block-size",
        type=click.Choice(["16", "32", "64", "128"]),
        default="32",
        show_default=True,
        help="Weights per quantisation scale in 4/8-bit weight-only graphs.",
    ),
    click.option(
        "--calibrate",
        type=click.Path(exists=True, path_type=Path),
        help="Folder of pictures: int8 activations get static ranges from them.",
    ),
)


def lowering_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--precision, --block-size and --calibrate: how graphs are lowered for a target."""
    for option in reversed(_LOWERING):
        command = option(command)
    return command
