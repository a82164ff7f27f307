"""`vlm-edge families`: the fusion families, the systems they carry and what was verified of each, and the known model types."""

from __future__ import annotations

from collections import defaultdict

import click
import msgspec

from .console import echo_json, stdout, table

_COLOURS = {"verified": "green", "runs": "yellow", "failed": "red", "missing": "dim"}


@click.command(name="families", short_help="What can be exported, and what was verified of it.")
@click.option("--family", "only", help="This family only.")
@click.option("--types", is_flag=True, help="List the known model types instead.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(only: str | None, types: bool, as_json: bool) -> None:
    """List the systems, by family, with what the tests verified of each.

    A checkpoint's config.json names its model_type; any checkpoint of a listed type can be exported. "float32" is the largest
    difference of a logit from PyTorch (allowed: 1e-4 of the largest logit) and how many greedy answers are equal token for
    token; quantised builds show the accuracy of PyTorch → the build where the weights are trained, else the mean KL
    divergence in nats (random weights have no accuracy to lose).

    \b
    vlm-edge families
    vlm-edge families --family projector
    vlm-edge families --types
    vlm-edge families --json
    """
    from vlm_edge.families import coverage, registry

    if only is not None and only not in registry.families():
        raise click.BadParameter(f"there is no family '{only}'; there are: {', '.join(registry.families())}.")
    systems = [one for one in coverage.coverage() if only in (None, one.system.family)]
    entries = [entry for entry in registry.entries() if only in (None, entry.family)]
    if as_json:
        listed = [{**msgspec.to_builtins(one), "status": one.status} for one in systems]
        echo_json({"systems": listed, "model_types": [msgspec.to_builtins(entry) for entry in entries]})
        return
    if types:
        named = defaultdict(list)
        for entry in entries:
            named[entry.family].append(f"{entry.model_type} ({entry.architecture})" if entry.architecture else entry.model_type)
        drawn = table("Model types", "family", "model types")
        for family, members in sorted(named.items()):
            drawn.add_row(family, ", ".join(sorted(members)))
        stdout.print(drawn)
        return
    drawn = table("Systems", "system", "family", "status", "weights", "cpu-fp32", "cpu-int8", "cpu-int4")
    for one in systems:
        status = f"[{_COLOURS[one.status]}]{one.status}[/]"
        for found in one.checkpoints.values():
            cells = [coverage.cell(found.builds[name]) if name in found.builds else "–" for name in coverage.BUILDS[1:]]
            drawn.add_row(one.system.name, one.system.family, status, found.weights, *cells)
        if not one.checkpoints:
            drawn.add_row(one.system.name, one.system.family, status, one.system.missing or "not tested yet", "", "", "")
    stdout.print(drawn)
