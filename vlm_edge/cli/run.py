"""`vlm-edge run`: ask a bundle something about images. Loads no PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from vlm_edge_runtime.errors import PromptError

from .console import echo_json, size, stderr, stdout, table


@click.command(name="run", short_help="Ask about images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", "-i", "images", multiple=True, help="Picture file (repeatable; several make a multi-image prompt).")
@click.option("--prompt", "-p", help="The question; '-' reads it from standard input.")
@click.option("--chat", is_flag=True, help="A conversation: one question a line, /image FILE adds a picture, /quit ends.")
@click.option(
    "--labels",
    help="Where images are compared with texts (CLIP, SigLIP, CoCa): comma-separated labels to rank the picture against.",
)
@click.option("--template", default="a photo of a {}", show_default=True, help="How a label becomes a sentence.")
@click.option("--build", help="Which build to run (default: the bundle's first for this device; 'portable' is the reference).")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, tensorrt, tensorrt-rtx or auto.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads (0: physical cores).")
@click.option("--spin/--no-spin", default=True, help="Whether idle threads spin; --no-spin beside other busy processes.")
@click.option("--context-length", type=click.IntRange(1), help="Slots of the KV cache (default: what the model has).")
@click.option("--max-new-tokens", "-n", type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0))
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True))
@click.option("--min-p", type=click.FloatRange(0, 1))
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True))
@click.option("--num-beams", type=click.IntRange(1), help="Beam search over so many sequences; 1 turns the bundle's own off.")
@click.option("--length-penalty", type=float, help="Beams: above 0 favours long answers, below 0 short ones.")
@click.option("--no-repeat-ngram-size", type=click.IntRange(0), help="No sequence of so many tokens twice (0: off).")
@click.option("--min-new-tokens", type=click.IntRange(0), help="Shortest answer.")
@click.option(
    "--prompt-lookup",
    "prompt_lookup_num_tokens",
    type=click.IntRange(0),
    metavar="N",
    help="Draft up to N tokens a step from what the prompt or the answer repeats: the same greedy answer, sooner (0: off).",
)
@click.option("--seed", type=int, help="Same seed, same answer.")
@click.option("--stop", multiple=True, help="End the answer before this text (repeatable).")
@click.option("--raw", is_flag=True, help="Use the prompt as it is, without the chat template.")
@click.option("--stats", "show_stats", is_flag=True, help="Print TTFT, tokens/s and cache hits afterwards.")
@click.option(
    "--image-option",
    "image_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override a preprocessing option (repeatable), e.g. do_image_splitting=false for one tile an image.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of streamed text.")
@click.option("--no-verify", is_flag=True, help="Skip checking the hashes of the bundle's files.")
def command(
    bundle: Path,
    images: tuple[str, ...],
    prompt: str | None,
    chat: bool,
    labels: str | None,
    template: str,
    build: str | None,
    device: str,
    threads: int,
    spin: bool,
    context_length: int | None,
    no_verify: bool,
    show_stats: bool,
    as_json: bool,
    image_options: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Ask BUNDLE about pictures; the answer streams to standard output.

    \b
    vlm-edge run tiny-llava.vlm --image scene.png --prompt "Describe the image."
    echo "How many circles are there?" | vlm-edge run tiny-llava.vlm --image scene.png --prompt -
    vlm-edge run tiny-llava.vlm --image scene.png --chat
    vlm-edge run tiny-clip.vlm --image scene.png --labels "red circle,blue square"
    """
    from vlm_edge_runtime import ContrastiveCaptioner, DualEncoder, load

    if prompt == "-":
        prompt = sys.stdin.read().strip()
    session = load(
        bundle,
        device=device,
        build=build,
        threads=threads,
        spin=spin,
        context_length=context_length,
        image_options=_options(image_options),
        verify=not no_verify,
    )
    with session:
        if isinstance(session, DualEncoder) or (labels and isinstance(session, ContrastiveCaptioner)):
            _classify(session, images, labels or prompt, template, as_json)
            return
        if labels:
            raise click.UsageError(
                f"--labels is for bundles that compare images with texts; {bundle} generates text: use --prompt."
            )
        options = {key: value for key, value in sampling.items() if value not in (None, ())}
        raw = bool(options.pop("raw", False))
        if chat:
            _chat(session, images, prompt, options)
        elif prompt is None:
            raise click.UsageError("nothing to ask: pass --prompt TEXT, --prompt - (standard input) or --chat.")
        elif as_json:
            answer = session.generate(prompt, images=list(images) or None, raw=raw, **options)
            echo_json(
                {
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "finish_reason": answer.finish_reason,
                    **({} if answer.score is None else {"score": answer.score}),
                    "stats": session.stats.to_dict(),
                }
            )
        else:
            _stream(session.stream(prompt, images=list(images) or None, raw=raw, **options))
        if show_stats:
            _show(session)


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` pairs; a value is JSON where it parses as such, else a text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise click.UsageError(f"--image-option {pair!r}: write it as NAME=VALUE, e.g. do_image_splitting=false.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _stream(pieces: Any) -> None:
    """Writes pieces as they come; Ctrl-C ends the answer, not the session."""
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    finally:
        pieces.close()
        click.echo()


def _chat(session: Any, images: tuple[str, ...], first: str | None, options: dict[str, Any]) -> None:
    """A conversation on the terminal. Every turn reuses what earlier turns left in the KV cache."""
    conversation = session.chat(**options)
    pending = list(images)
    interactive = sys.stdin.isatty()
    while True:
        if first is not None:
            line, first = first, None
        else:
            if interactive:
                stderr.print("[bold]>[/] ", end="")
            line = sys.stdin.readline()
            if not line:
                return
            line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/image"):
            picture = line.removeprefix("/image").strip()
            if not Path(picture).is_file():
                stderr.print(f"[red]no such picture: {picture or '(no name)'}[/]")
                continue
            pending.append(picture)
            continue
        if not line:
            continue
        try:
            _stream(conversation.stream(line, images=pending or None))
        except KeyboardInterrupt:
            stderr.print("[dim](stopped)[/]")
        pending = []


def _classify(session: Any, images: tuple[str, ...], labels: str | None, template: str, as_json: bool) -> None:
    if not images or not labels:
        raise PromptError("this bundle compares images with texts: pass at least one --image, and --labels 'first,second,…'.")
    names = [name.strip() for name in labels.split(",") if name.strip()]
    results = {image: session.classify(image, names, template=template) for image in images}
    if as_json:
        echo_json({image: [{"label": r.label, "score": r.score} for r in ranked] for image, ranked in results.items()})
        return
    for image, ranked in results.items():
        drawn = table(image, "label", "score", right=("score",))
        for result in ranked:
            drawn.add_row(result.label, f"{result.score:.4f}")
        stdout.print(drawn)


def _show(session: Any) -> None:
    stats = session.stats.to_dict()
    drawn = table("", "", "", right=("",))
    for key, value in stats.items():
        text = size(value) if key.endswith("_bytes") else f"{value:.4g}" if isinstance(value, float) else str(value)
        drawn.add_row(key, text)
    stderr.print(drawn)
