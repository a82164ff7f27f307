"""`vlm-edge inspect`: what a bundle is, without running it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click
import msgspec
from rich.padding import Padding

from vlm_edge_runtime.bundle.manifest import Build, Dim, GraphEntry, KVLayout, Manifest, ParityRecord, TensorSpec
from vlm_edge_runtime.bundle.reader import check_files, open_bundle, read_manifest

from .console import echo_json, size, stdout, table
from .contract_rows import contract_rows
from .graph_runs import graph_run, reasons

_VERDICT = {"PASS": "green", "AMBIGUOUS": "yellow", "FAIL": "red"}


@click.command(name="inspect", short_help="Show what a bundle holds.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--context-length", type=click.IntRange(1), help="Plan the memory for this many tokens (default: the model's).")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows of the KV cache in the plan.")
@click.option("--verify", is_flag=True, help="Check the hash of every file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document: manifest and memory plan.")
def command(bundle: Path, context_length: int | None, batch: int, verify: bool, as_json: bool) -> None:
    """Show BUNDLE: graphs, what runs each one on this machine, shapes, precision, sizes, the memory plan for a context length,
    and the parity verdicts.

    \b
    vlm-edge inspect tiny-llava.vlm
    vlm-edge inspect tiny-llava.vlm --context-length 512 --json
    """
    manifest = read_manifest(bundle)
    if verify:
        check_files(bundle, manifest.files)
        for name in ("portable", *manifest.builds):
            open_bundle(bundle, build=name)
    plans = {name: memory_plan(manifest, name, context_length, batch) for name in ("portable", *manifest.builds)}
    if as_json:
        runs = {
            name: {role: asdict(graph_run(role, graph, build)) for role, graph in graphs.items()}
            for name, graphs, build in _every_build(manifest)
        }
        echo_json({"manifest": msgspec.to_builtins(manifest), "runs": runs, "memory": plans, "verified": verify})
        return
    _head(bundle, manifest, verify)
    for name, graphs, build in _every_build(manifest):
        _graphs(name, graphs, build)
    _plans(plans, {name: layout.dtype if (layout := _layout(manifest, name)) is not None else "–" for name in plans})
    _parity("portable", manifest.parity)
    for build in manifest.builds.values():
        _parity(build.name, build.parity)


def _every_build(manifest: Manifest) -> list[tuple[str, dict[str, GraphEntry], Build | None]]:
    """(name, graphs, build) of the portable graphs and of each build, with the portable graphs that it did not change."""
    builds = [(one.name, {**manifest.graphs, **one.graphs}, one) for one in manifest.builds.values()]
    return [("portable", manifest.graphs, None), *builds]


def _layout(manifest: Manifest, build: str) -> KVLayout | None:
    """The KV cache of a build, or of the portable decoder."""
    chosen = manifest.builds.get(build)
    return (chosen.kv if chosen and chosen.kv else None) or getattr(manifest.contract, "kv", None)


def memory_plan(manifest: Manifest, build: str, context_length: int | None, batch: int) -> dict[str, int]:
    """Bytes that a session of `build` needs for certain: weights once, and the KV cache at its full length, `kv_token` a token.

    Activations come on top and depend on the engine; `vlm-edge bench` measures the peak.
    """
    chosen = manifest.builds.get(build)
    graphs = {**manifest.graphs, **(chosen.graphs if chosen else {})}
    files = {ref.file: ref.bytes for graph in graphs.values() for ref in (graph.model, *graph.data)}
    plan = {"weights": sum(files.values()), "kv_cache": 0, "kv_token": 0, "context_length": 0}
    layout = _layout(manifest, build)
    if layout is not None:
        longest = getattr(manifest.contract, "context_length", 0)
        length = min(context_length or longest, longest)
        plan["context_length"] = length
        plan["kv_token"] = layout.entry_bytes
        plan["kv_cache"] = layout.entry_bytes * length * batch
    plan["total"] = plan["weights"] + plan["kv_cache"]
    return plan


def _head(path: Path, manifest: Manifest, verified: bool) -> None:
    drawn = table(str(path), "", "")
    drawn.add_row("family", f"{manifest.family} ({manifest.model_type}, {manifest.source.architecture})")
    drawn.add_row("source", f"{manifest.source.name} @ {manifest.source.revision[:16]}")
    drawn.add_row("exported", f"{manifest.created} with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    for title, text in contract_rows(manifest.contract):
        drawn.add_row(title, text)
    drawn.add_row("files", ", ".join(ref.file for ref in manifest.files))
    drawn.add_row("hashes", "[green]all checked[/]" if verified else "not checked (pass --verify)")
    stdout.print(drawn)


def _graphs(name: str, graphs: dict[str, GraphEntry], build: Build | None) -> None:
    about = f" for {build.target} ({build.backend})" if build else ""
    columns = ("graph", "precision", "runs with", "nodes", "parameters", "size")
    drawn = table(f"\n{name}{about}", *columns, right=columns[3:])
    runs = {role: graph_run(role, graph, build) for role, graph in graphs.items()}
    readers = Counter(ref.file for graph in graphs.values() for ref in graph.data)
    shared: dict[str, int] = {}
    for role, graph in graphs.items():
        own = graph.model.bytes + sum(ref.bytes for ref in graph.data if readers[ref.file] == 1)
        shared.update({ref.file: ref.bytes for ref in graph.data if readers[ref.file] > 1})
        drawn.add_row(role, graph.precision, str(runs[role]), str(graph.nodes), f"{graph.parameters:,}", size(own))
    if shared:
        drawn.add_row("[dim]weights, shared by the graphs[/]", "", "", "", "", size(sum(shared.values())))
    stdout.print(drawn)
    for line in reasons(runs):
        stdout.print(Padding(line, (0, 0, 0, 2)), highlight=False)
    for role, graph in graphs.items():
        stdout.print(Padding(f"[dim]{role}:[/] {_signature(graph)}", (0, 0, 0, 2)), highlight=False)


def _signature(graph: GraphEntry) -> str:
    def side(specs: list[TensorSpec]) -> str:
        groups: dict[tuple[str, tuple[Dim, ...]], int] = {}
        for spec in specs:  # `present.0.key`, `deepstack.2`: one entry for all layers
            groups[spec.name.split(".")[0], spec.shape] = groups.get((spec.name.split(".")[0], spec.shape), 0) + 1
        return " ".join(
            f"{f'{count} × ' if count > 1 else ''}{name}\\[{','.join(map(str, shape))}]"
            for (name, shape), count in groups.items()
        )

    return f"{side(graph.inputs)} → {side(graph.outputs)}"


def _plans(plans: dict[str, dict[str, int]], types: dict[str, str]) -> None:
    drawn = table(
        "\nMemory plan (activations come on top; `vlm-edge bench` measures the peak)",
        "build",
        "weights",
        "KV in",
        "KV a token",
        "KV cache",
        "at context",
        "sum",
        right=("weights", "KV a token", "KV cache", "at context", "sum"),
    )
    for name, plan in plans.items():
        context = str(plan["context_length"] or "–")
        kept = size(plan["kv_token"]) if plan["kv_token"] else "–"
        drawn.add_row(name, size(plan["weights"]), types[name], kept, size(plan["kv_cache"]), context, size(plan["total"]))
    stdout.print(drawn)


def _parity(name: str, record: ParityRecord | None) -> None:
    if record is None:
        stdout.print(f"\n[bold]parity of {name}[/]: not compared yet (`vlm-edge parity`)")
        return
    colour = _VERDICT[record.verdict]
    drawn = table(
        f"\nparity of {name}: [{colour}]{record.verdict}[/] against {record.reference}, {record.created}",
        "subject",
        "verdict",
        "cases",
        "numbers",
        "note",
        right=("cases",),
    )
    for check in record.checks:
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in check.metric.items())
        note = "" if check.verdict == "PASS" else check.note
        drawn.add_row(check.subject, f"[{_VERDICT[check.verdict]}]{check.verdict}[/]", str(check.cases), numbers, note)
    stdout.print(drawn)
