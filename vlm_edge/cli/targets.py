"""`vlm-edge targets`: what a bundle can be built for."""

from __future__ import annotations

import click
import msgspec

from .console import echo_json, stdout, table


@click.command(name="targets", short_help="List build targets.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(as_json: bool) -> None:
    """List the targets. Each is a TOML file; `--target` of build and export also takes the path of one of your own.

    \b
    vlm-edge targets
    """
    from vlm_edge.targets import targets

    known = targets()
    if as_json:
        echo_json([msgspec.to_builtins(target) for target in known])
        return
    drawn = table("Targets", "name", "backend", "precision", "what it is")
    for target in known:
        precision = " ".join(f"{role}={word}" for role, word in target.precision.items())
        drawn.add_row(target.name, target.backend, precision, target.description)
    stdout.print(drawn)
