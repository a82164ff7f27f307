"""`vlm-edge families`: the fusion families and the model types that are known to each."""

from __future__ import annotations

from collections import defaultdict

import click
import msgspec

from .console import echo_json, stdout, table


@click.command(name="families", short_help="List families and model types.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(as_json: bool) -> None:
    """List what can be exported: a checkpoint's config.json names its model_type.

    \b
    vlm-edge families
    """
    from vlm_edge.families.registry import entries, families

    if as_json:
        echo_json([msgspec.to_builtins(entry) for entry in entries()])
        return
    types = defaultdict(list)
    for entry in entries():
        types[entry.family].append(f"{entry.model_type} ({entry.architecture})" if entry.architecture else entry.model_type)
    drawn = table("Families", "family", "model types")
    for family in families():
        drawn.add_row(family, ", ".join(sorted(types[family])))
    stdout.print(drawn)
