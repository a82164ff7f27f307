"""`vlm-edge export`: checkpoint → bundle, and straight on to builds when targets are named."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from .console import echo_json, need_extra, progress, size, stdout, table
from .options import cache_option, lowering_options


@click.command(name="export", short_help="Checkpoint → portable bundle.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="Also build for this target (repeatable); see `vlm-edge targets`.")
@lowering_options
@cache_option
@click.option("--revision", help="Branch, tag or commit of a hub checkpoint.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint. Off unless you ask.")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare every graph with PyTorch on several shapes.")
@click.option(
    "--merge-visual-tokens",
    metavar="SHARE|COUNT",
    help="Merge visual tokens that are alike: 50% away, or 64 kept, of each image or tile. Faster prefill, other answers.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, no progress.")
def command(
    source: str,
    out: Path,
    targets: tuple[str, ...],
    precision: str | None,
    block_size: str | None,
    calibrate: Path | None,
    kv: Literal["float", "int8"] | None,
    revision: str | None,
    trust_remote_code: bool,
    check: bool,
    merge_visual_tokens: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Split SOURCE into its graphs, export them to portable ONNX, check them against PyTorch, write the bundle OUT.

    SOURCE is a local checkpoint folder or a hub id. The family is found from config.json's model_type.

    \b
    vlm-edge export tests/checkpoints/tiny-llava tiny-llava.vlm --target cpu-int4
    vlm-edge export HuggingFaceTB/SmolVLM-256M-Instruct smolvlm.vlm --target cpu-int4 --precision vision=int8,decoder=int4
    """
    need_extra("export", "torch", "transformers", "onnxscript")
    from vlm_edge.targets import load_target

    for target in targets:  # what is wrong is said before minutes of tracing, not after
        chosen = load_target(target)
        if kv == "int8" and chosen.backend != "ort-cpu":
            raise click.UsageError(
                f"--kv int8 is for native decoders on the CPU, and {chosen.name} is not built for one: leave it out."
            )
    if (precision or kv) and not targets:
        raise click.UsageError(f"{'--precision' if precision else '--kv'} says how a build is quantised: name one with --target.")
    with progress(quiet=as_json) as listener:
        from vlm_edge.export import export

        manifest = export(
            source,
            out,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            check=check,
            progress=listener,
            merge_visual_tokens=merge_visual_tokens,
        )
        if targets:
            from .build import build_targets

            build_targets(out, targets, precision, block_size, calibrate, None, overwrite, listener, kv=kv)
    from vlm_edge_runtime.bundle.reader import read_manifest

    manifest = read_manifest(out)
    if as_json:
        import msgspec

        echo_json(msgspec.to_builtins(manifest))
        return
    drawn = table(
        f"{out}  ({manifest.family}, {manifest.model_type})",
        "graph",
        "nodes",
        "parameters",
        "size",
        right=("nodes", "parameters", "size"),
    )
    for role, graph in manifest.graphs.items():
        drawn.add_row(role, str(graph.nodes), f"{graph.parameters:,}", size(graph.model.bytes))
    data = {ref.file: ref.bytes for graph in manifest.graphs.values() for ref in graph.data}
    drawn.add_row("[dim]weights, stored once[/]", "", "", size(sum(data.values())))
    stdout.print(drawn)
    for name in manifest.builds:
        stdout.print(f"Try it:  [bold]vlm-edge run {out} --build {name} --image PICTURE --prompt QUESTION[/]", highlight=False)
