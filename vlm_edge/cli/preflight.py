"""`vlm-edge preflight`: can a bundle be built for a target, and does it fit the device? Compiles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .build import pictures_in
from .console import echo_json, need_extra, progress, stdout, table
from .options import lowering_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_edge.targets.memory_plan import MemoryPlan
    from vlm_edge.targets.preflight import Problem


@click.command(name="preflight", short_help="Can a bundle be built for a target, and does it fit?")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="Target name or a TOML file of your own; see `vlm-edge targets`.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of the KV cache to plan for (default: the target's longest).")
@click.option("--batch", type=click.IntRange(min=1), help="Rows that decode together (default: the target's most).")
@lowering_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, no progress.")
def command(
    bundle: Path,
    target: str,
    context: int | None,
    batch: int | None,
    precision: str | None,
    block_size: str | None,
    calibrate: Path | None,
    as_json: bool,
) -> int:
    """Lower BUNDLE for a GPU target in memory, look up every node in what its TensorRT imports, and plan the memory.

    Needs neither TensorRT nor a GPU. Exit code 1 when something cannot be built or does not fit.

    \b
    vlm-edge preflight smolvlm.vlm --target jetson-orin-nano-jp62
    vlm-edge preflight smolvlm.vlm --target rtx-4090 --context 8192 --batch 4 --json
    """
    need_extra("build", "onnx", "onnx_ir")
    from vlm_edge.targets.examine import examine

    with progress(quiet=as_json) as listener:
        found = examine(
            bundle,
            target,
            precision=precision,
            block_size=int(block_size) if block_size else None,
            calibration=pictures_in(calibrate) if calibrate else None,
            context=context,
            batch=batch,
            progress=listener,
        )
    plan = found.plan()
    if as_json:
        echo_json(verdict(found.problems, plan))
    else:
        print_problems(found.problems, plan.target)
        print_plan(plan)
    return 0 if plan.fits and not found.problems else 1


def verdict(problems: Sequence[Problem], plan: MemoryPlan) -> dict[str, Any]:
    """Both findings as JSON: problems, and the plan with its sums."""
    sums = {key: getattr(plan, key) for key in ("weights", "activations", "total", "usable", "fits")}
    return {"problems": msgspec.to_builtins(list(problems)), "memory": msgspec.to_builtins(plan) | sums}


def print_problems(problems: Sequence[Problem], target: str) -> None:
    """Every node that cannot be built, with its PyTorch module and the way out."""
    if not problems:
        stdout.print(f"[green]✓[/] every node can be built for {target}", highlight=False)
        return
    drawn = table(f"{len(problems)} things that cannot be built for {target}", "graph", "node", "op", "module", "what", "way out")
    for one in problems:
        drawn.add_row(one.graph, one.node, one.op, one.module or "–", one.limit, one.way_out)
    stdout.print(drawn, highlight=False)


def print_plan(plan: MemoryPlan) -> None:
    """The memory plan as a table: each graph, the cache, compiling, against what the device has."""
    from vlm_edge.targets.memory_plan import gib

    title = f"\nmemory on {plan.target}, context {plan.context}, batch {plan.batch} (upper estimates)"
    drawn = table(title, "", "precision", "weights", "activations", right=("weights", "activations"))
    for graph in plan.graphs:
        drawn.add_row(graph.name, graph.word, gib(graph.engine), gib(graph.activations))
    drawn.add_row("KV cache", "", gib(plan.kv_cache), "")
    drawn.add_row("[bold]running[/]", "", f"[bold]{gib(plan.total)}[/]", "")
    colour = "green" if plan.total <= plan.usable else "red"
    drawn.add_row("memory beside the system", "", f"[{colour}]{gib(plan.usable)}[/]", f"[dim]of {gib(plan.capacity)}[/]")
    if plan.build_most:
        where = "compiling, on the device" if plan.build_on_device else "compiling, on any machine"
        drawn.add_row(where, "", f"{gib(plan.build_least)} –", gib(plan.build_most))
    stdout.print(drawn, highlight=False)
    for note in plan.notes:
        stdout.print(f"[dim]{note}[/]", highlight=False)
    if not plan.fits:
        stdout.print(f"[red]✗[/] it does not fit. {plan.advice}", highlight=False)
