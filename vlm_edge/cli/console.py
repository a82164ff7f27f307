"""What the commands share: the console, progress drawn from library events, tables, sizes, JSON output."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vlm_edge_runtime.errors import VlmEdgeError

stdout = Console()
stderr = Console(stderr=True)


def need_extra(extra: str, *modules: str) -> None:
    """Raises one clear error when a command needs packages that this installation does not have."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise VlmEdgeError(
            f"this command needs {', '.join(missing)}, which this installation does not have: "
            f"pip install 'vlm-edge[{extra}]' (a device that only runs bundles does not need it)."
        )


def echo_json(value: Any) -> None:
    """One JSON document on standard output, and nothing else there."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def size(count: float) -> str:
    """Bytes for people: 1 MB = 10⁶ bytes, as disks and model cards count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style; `right` names the columns that hold numbers."""
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return drawn


class DrawnProgress:
    """`vlm_edge.progress.Progress` on a terminal: one line per step, with a bar where the step has a length."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}

    def start(self, step: str, total: float | None = None) -> None:
        self._began[step] = time.perf_counter()
        self._tasks[step] = self._bars.add_task(step, total=total)

    def advance(self, step: str, amount: float = 1.0) -> None:
        self._bars.advance(self._tasks[step], amount)

    def done(self, step: str, detail: str = "") -> None:
        self._finish(step, f"[green]✓[/] {step}", detail)

    def failed(self, step: str, reason: str) -> None:
        self._finish(step, f"[red]✗[/] {step}", "")  # the reason follows as the command's error message

    def _finish(self, step: str, label: str, detail: str) -> None:
        task = self._tasks.pop(step, None)
        if task is not None:
            self._bars.remove_task(task)
        seconds = time.perf_counter() - self._began.pop(step, time.perf_counter())
        self._bars.console.print(f"{label}  [dim]{seconds:.1f} s  {detail}[/]", highlight=False)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Any]:
    """A progress listener drawn on standard error; silent when `quiet` (as `--json` asks for)."""
    from vlm_edge.progress import Silent

    if quiet:
        yield Silent()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as bars:
        yield DrawnProgress(bars)
