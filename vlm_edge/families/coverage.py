"""What is verified of each system: `systems.toml` names them, `coverage.json` is what the tests found. No torch here."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from vlm_edge_runtime.errors import UnsupportedModelError

SYSTEMS = Path(__file__).with_name("systems.toml")
RESULTS = Path(__file__).with_name("coverage.json")
BUILDS = ("portable", "cpu-fp32", "cpu-int8", "cpu-int4")

Status = Literal["verified", "runs", "failed", "missing"]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file with an unknown key is refused."""


class System(_Strict):
    """One line of systems.toml; its head explains the fields."""

    name: str
    family: str
    model_type: str
    paper: str = ""
    checkpoint: str = ""
    trained: str = ""
    prompts: list[str] = []
    images: int = 2
    missing: str = ""

    @property
    def checkpoints(self) -> list[str]:
        """Those that the tests verify it with."""
        return [name for name in (self.checkpoint, self.trained) if name]


class BuildResult(_Strict):
    """One precision of one checkpoint against PyTorch.

    `verdict` is parity's; `logits` the largest difference over the largest logit, `tolerance` what is allowed (None: quantised,
    judged by `kl` or by accuracy); `identical` of `texts` greedy answers equal PyTorch's token for token; `reference_accuracy`
    and `accuracy` are shares of right answers where the checkpoint is trained.
    """

    verdict: Literal["PASS", "AMBIGUOUS", "FAIL"]
    tolerance: float | None = None
    logits: float | None = None
    kl: float | None = None
    identical: int = 0
    texts: int = 0
    cosine: float | None = None
    reference_accuracy: float | None = None
    accuracy: float | None = None
    note: str = ""


class CheckpointResult(_Strict):
    """What the tests found for one checkpoint. `graphs`: the largest scaled difference of any graph at export."""

    weights: Literal["random", "trained"]
    graphs: dict[str, float]
    graph_tolerance: float
    builds: dict[str, BuildResult]


class SystemResult(_Strict):
    """A system with what was found of it."""

    system: System
    checkpoints: dict[str, CheckpointResult]

    @property
    def status(self) -> Status:
        """`verified`: float32 equals PyTorch, every build answers; `runs`: it answers, a float32 comparison is undecided."""
        if not self.checkpoints:
            return "missing"
        exact = [found.builds[name].verdict for found in self.checkpoints.values() for name in BUILDS[:2] if name in found.builds]
        if "FAIL" in exact or not exact:
            return "failed"
        return "verified" if set(exact) == {"PASS"} else "runs"


def systems() -> list[System]:
    """Every system, in the file's order. Raises UnsupportedModelError when the file is damaged."""
    try:
        table = tomllib.loads(SYSTEMS.read_text(encoding="utf-8"))
        return msgspec.convert(table.get("system", []), list[System])
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UnsupportedModelError(f"{SYSTEMS} cannot be read: {error}") from None


def results() -> dict[str, CheckpointResult]:
    """What the tests found, by checkpoint; empty where they were never run."""
    if not RESULTS.is_file():
        return {}
    return msgspec.json.decode(RESULTS.read_bytes(), type=dict[str, CheckpointResult])


def coverage() -> list[SystemResult]:
    """Every system with its results."""
    found = results()
    return [SystemResult(system=one, checkpoints={n: found[n] for n in one.checkpoints if n in found}) for one in systems()]


def cell(result: BuildResult) -> str:
    """A build's result in a few words, for tables."""
    if result.accuracy is not None and result.reference_accuracy is not None:
        return f"{100 * result.reference_accuracy:.1f} → {100 * result.accuracy:.1f} %"
    if result.tolerance is not None and result.logits is not None:
        return f"{result.logits:.0e} ≤ {result.tolerance:.0e}, {result.identical}/{result.texts} texts"
    if result.kl is not None:
        return f"KL {result.kl:.2g}, {result.identical}/{result.texts} texts"
    if result.cosine is not None:
        return f"cosine {result.cosine:.4f}"
    return result.verdict


def markdown() -> str:
    """The table of README.md: one row per system."""
    lines = ["| system | family | verified with | float32 against PyTorch | cpu-int8 | cpu-int4 |", "|---|---|---|---|---|---|"]
    for one in coverage():
        named = f"[{one.system.name}](https://arxiv.org/abs/{one.system.paper})" if one.system.paper else one.system.name
        if one.status == "missing":
            lines.append(f"| {named} | `{one.system.family}` | – | not covered: {one.system.missing or 'not tested yet'} | | |")
            continue
        for found in one.checkpoints.values():
            cells = [cell(found.builds[name]) if name in found.builds else "–" for name in BUILDS[1:]]
            lines.append(f"| {named} | `{one.system.family}` | {found.weights} weights | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
