"""`vlm-edge parity`: compare a bundle with the original; the exit code is the verdict."""

from __future__ import annotations

from pathlib import Path

import click

from .console import echo_json, need_extra, progress, stdout, table

_COLOUR = {"PASS": "green", "AMBIGUOUS": "yellow", "FAIL": "red"}


@click.command(name="parity", short_help="Prove that the answers are still right.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", help="The checkpoint (folder or hub id). Without it builds are compared with the portable graphs.")
@click.option("--build", "builds", multiple=True, help="Compare only this build (repeatable; default: portable and all builds).")
@click.option(
    "--dataset",
    type=click.Path(exists=True, path_type=Path),
    help="JSON lines of {image, prompt, answer}: task accuracy decides about quantised builds.",
)
@click.option(
    "--accuracy-points",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Task accuracy, in points of 100, that a quantised build may lose on --dataset.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--bisect", "with_bisect", is_flag=True, help="Name the first node whose output leaves the tolerance.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the report as one self-contained page.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output, no progress.")
@click.option("--store/--no-store", default=True, show_default=True, help="Record the verdicts in the bundle's manifest.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint. Off unless you ask.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    reference: str | None,
    builds: tuple[str, ...],
    dataset: Path | None,
    accuracy_points: float,
    max_new_tokens: int,
    with_bisect: bool,
    html: Path | None,
    as_json: bool,
    store: bool,
    trust_remote_code: bool,
) -> int:
    """Compare every graph and the whole model of BUNDLE with the original. Exit code: 0 PASS, 1 FAIL, 2 AMBIGUOUS.

    \b
    vlm-edge parity tiny-llava.vlm --reference tests/checkpoints/tiny-llava --html parity.html
    vlm-edge parity tiny-llava.vlm --build cpu-int4          (on a device: no PyTorch needed)
    """
    if reference:
        need_extra("export", "torch", "transformers")
    need_extra("build", "onnx", "onnx_ir")
    from vlm_edge.parity import bisect_bundle, compare, load_dataset

    with progress(quiet=as_json) as listener:
        report = compare(
            bundle,
            reference,
            builds=list(builds) or None,
            dataset=load_dataset(dataset) if dataset else None,
            max_new_tokens=max_new_tokens,
            accuracy_points=accuracy_points,
            store=store,
            progress=listener,
            trust_remote_code=trust_remote_code,
        )
    culprits = bisect_bundle(bundle, reference, report, trust_remote_code=trust_remote_code) if with_bisect else []
    if html:
        report.to_html(html)
    if as_json:
        echo_json({"report": report.to_builtins(), "bisect": [culprit.to_builtins() for culprit in culprits]})
        return report.exit_code
    if report.note:
        stdout.print(f"[yellow]{report.note}[/]", highlight=False)
    for build in report.builds:
        drawn = table(f"{build.name}: [{_COLOUR[build.verdict]}]{build.verdict}[/] against {build.reference}", "", "", "", "")
        for row in report.rows():
            if row.what == build.name:
                note = "" if row.verdict == "PASS" else row.note
                drawn.add_row(f"  {row.subject}", f"[{_COLOUR[row.verdict]}]{row.verdict}[/]", row.numbers, note)
        stdout.print(drawn)
    for culprit in culprits:
        stdout.print(f"[red]first bad node[/] {culprit}")
    if html:
        stdout.print(f"page: {html}")
    stdout.print(f"[bold {_COLOUR[report.verdict]}]{report.verdict}[/]")
    return report.exit_code
