"""`vlm-edge`: the group of commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from vlm_edge import __version__
from vlm_edge_runtime.errors import VlmEdgeError

# Command → what `vlm-edge --help` says of it. The command itself lies in the module of the same name.
COMMANDS = {
    "export": "Split a checkpoint, export it to portable ONNX and check it against PyTorch.",
    "build": "Lower a bundle's portable graphs for a target (4-bit, 8-bit, fused kernels).",
    "preflight": "Say what a target cannot build, and whether it fits the device's memory.",
    "run": "Ask a bundle something about images; the answer streams.",
    "inspect": "Show what a bundle holds: graphs, sizes, memory plan, parity verdicts.",
    "bench": "Measure TTFT, tokens/s, vision time and memory of a bundle.",
    "parity": "Prove that a bundle still answers as the PyTorch original does.",
    "families": "List the fusion families and model types that can be exported.",
    "targets": "List the targets a bundle can be built for.",
}

# 0, 1 and 2 are parity's verdicts (PASS, FAIL, AMBIGUOUS), so errors keep clear of them.
EXIT_ERROR = 3
EXIT_USAGE = 64
EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    """Loads a command's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"vlm_edge.cli.{name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{hint} Commands: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its short help.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlm-edge")
def group() -> None:
    """Put any vision-language model on an edge device, and prove that its answers are still right.

    \b
    vlm-edge export ./my-llava my-llava.vlm --target cpu-int4
    vlm-edge run my-llava.vlm --image photo.jpg --prompt "What is on the table?"
    vlm-edge parity my-llava.vlm --reference ./my-llava
    """


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exit codes: 0 done, 3 an error with a message, 64 wrong usage, 130 interrupted;

    `vlm-edge parity` exits with its verdict instead (0 PASS, 1 FAIL, 2 AMBIGUOUS).
    """
    try:
        result = group.main(args=list(args) if args is not None else None, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted; nothing half-written was left behind.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) went away: not an error of ours
        sys.exit(0)
    except VlmEdgeError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(EXIT_ERROR)
    sys.exit(result if isinstance(result, int) else 0)
