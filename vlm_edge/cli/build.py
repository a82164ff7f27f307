"""`vlm-edge build`: lower the portable graphs of a bundle for one or more targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vlm_edge_runtime.bundle.manifest import Build
from vlm_edge_runtime.errors import TargetError

from .console import echo_json, need_extra, progress, size, stdout, table
from .graph_runs import graph_run, reasons
from .options import cache_option, compiling_options, lowering_options, numbers

if TYPE_CHECKING:
    from vlm_edge.targets.backend import CompileOptions

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@click.command(name="build", short_help="Bundle → build for a target.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    help="Target name or a TOML file of your own (repeatable); see `vlm-edge targets`.",
)
@lowering_options
@cache_option
@compiling_options
@click.option("--name", help="Name of the build (default: the target's name).")
@click.option("--overwrite", is_flag=True, help="Replace a build of the same name.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, no progress.")
def command(
    bundle: Path,
    targets: tuple[str, ...],
    precision: str | None,
    block_size: str | None,
    calibrate: Path | None,
    kv: Literal["float", "int8"] | None,
    sm: str | None,
    context: str | None,
    max_batch: int | None,
    profiles: Literal["auto", "one", "two"],
    make_engines: bool,
    name: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Lower the portable graphs of BUNDLE for a target. Needs no PyTorch, so a device can do it too.

    For TensorRT the graphs are then compiled: for GeForce RTX on any machine, for a Jetson on the Jetson, where the same command
    goes on from the graphs that are there. What is compiled already is not compiled again.

    \b
    vlm-edge build tiny-llava.vlm --target cpu-int4
    vlm-edge build tiny-llava.vlm --target cpu-int4 --precision vision=fp32,decoder=int4 --name cpu-int4-fp32vision
    vlm-edge build tiny-llava.vlm --target cpu-int4 --kv int8 --name cpu-int4-kv8
    vlm-edge build tiny-llava.vlm --target rtx-40 --sm 86,89,120
    """
    need_extra("build", "onnx", "onnx_ir")
    if name and len(targets) > 1:
        raise click.UsageError("--name fits one --target only.")
    with progress(quiet=as_json) as listener:
        from vlm_edge.targets.backend import CompileOptions

        compiling = CompileOptions(
            sm=numbers(sm, "--sm"),
            context=numbers(context, "--context"),
            max_batch=max_batch,
            profiles=profiles,
            make=make_engines,
        )
        builds = build_targets(bundle, targets, precision, block_size, calibrate, name, overwrite, listener, compiling, kv)
    if as_json:
        import msgspec

        echo_json(msgspec.to_builtins(builds))
        return
    for made in builds:
        columns = ("graph", "precision", "runs with", "nodes", "size")
        drawn = table(f"{bundle}  build {made.name}", *columns, right=columns[3:])
        runs = {role: graph_run(role, graph, made) for role, graph in made.graphs.items()}
        for role, graph in made.graphs.items():
            taken = graph.model.bytes + sum(ref.bytes for ref in graph.data)
            drawn.add_row(role, graph.precision, str(runs[role]), str(graph.nodes), size(taken))
        stdout.print(drawn)
        for line in reasons(runs):
            stdout.print(line, highlight=False)
        if made.engines:
            drawn = table(f"{bundle}  engines of {made.name}", "engine", "SM", "profiles", "builder", "size", right=("size",))
            for one in made.engines:
                uses = " ".join(profile.use for profile in one.profiles)
                builder = f"{one.builder} {one.builder_version}"
                drawn.add_row(one.graph, " ".join(map(str, one.sm)), uses, builder, size(one.file.bytes))
            stdout.print(drawn)


def build_targets(
    bundle: Path,
    targets: Sequence[str],
    precision: str | None,
    block_size: str | None,
    calibrate: Path | None,
    name: str | None,
    overwrite: bool,
    listener: Any,
    compiling: CompileOptions | None = None,
    kv: Literal["float", "int8"] | None = None,
) -> list[Build]:
    """Builds each target in turn. Shared with `vlm-edge export --target`."""
    from vlm_edge.targets.build import build

    pictures = pictures_in(calibrate) if calibrate else None
    return [
        build(
            bundle,
            target,
            precision=precision,
            block_size=int(block_size) if block_size else None,
            calibration=pictures,
            compiling=compiling,
            kv=kv,
            name=name,
            overwrite=overwrite,
            progress=listener,
        )
        for target in targets
    ]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, or one picture. Raises TargetError where there is none."""
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.suffix.lower() in _PICTURES)
    if not found:
        raise TargetError(f"no picture ({', '.join(sorted(_PICTURES))}) in {folder}: calibration needs some tens of them.")
    return found
