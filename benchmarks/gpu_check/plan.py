"""What is done, in which order, and how long each step may take."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .models import BUILDS, TRAINED

Facts = dict[str, Any]
"""What the step "machine" found."""

RTX = {86: "rtx-30", 89: "rtx-40", 120: "rtx-50"}
"""Targets of TensorRT-RTX by compute capability."""
FULL = {90: "h100-h200"}
"""Targets of the full TensorRT that are built for this machine's compute capability."""
PROMPT, ANSWER, RUNS = 1024, 128, 5


@dataclass(slots=True, frozen=True)
class Step:
    """One process. `needs`: steps that must have succeeded. `without`: why it is left out on a machine, or None.

    `least_s`: where less is left of the whole time it is not begun.
    """

    name: str
    work: str
    options: dict[str, Any]
    limit_s: float
    about: str
    least_s: float = 5.0
    needs: tuple[str, ...] = ()
    without: Callable[[Facts], str | None] = field(default=lambda facts: None)
    environment: dict[str, str] = field(default_factory=dict)


def plan(kit: Path, work: Path, *, cpu: bool = False, trained: Sequence[str] | None = None) -> list[Step]:
    """The steps in order: what proves most comes first, repetitions last. `work`: bundles are copied there and built."""
    shapes = ["tiny"] if cpu else ["smolvlm-256m", "smolvlm-2b"]
    names = list(TRAINED if trained is None else trained)
    place, device = ("cpu", "cpu") if cpu else ("auto", "cuda")
    prompt, answer, runs = (48, 6, 1) if cpu else (PROMPT, ANSWER, RUNS)
    steps = [Step("machine", "machine", {"device": device}, 45, "what the GPU is, its bandwidth and matrix rate as measured")]
    steps += _probes(work)
    steps += [step for name in names for step in _parity(name, kit, work, place)]
    for name in shapes:
        steps += _shape(name, kit, work, place, device, (prompt, answer, runs), 1)
    if not cpu:
        steps += [step for name in names for step in _tensorrt(name, kit, work)]
        steps += _tensorrt_speed("smolvlm-256m", work, (prompt, answer, runs))
        for name in shapes:
            steps.append(_peer(name, kit, device, (prompt, answer, runs), 1, compiled=True))
        for name in shapes:
            steps += _shape(name, kit, work, place, device, (prompt, answer, runs), 2)
    return steps


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps whose names match one of the patterns, and what they need."""
    if not only:
        return list(steps)
    wanted = {step.name for step in steps if any(fnmatch.fnmatch(step.name, pattern) for pattern in only)}
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= set(step.needs)
    return [step for step in steps if step.name in wanted or step.name == "machine"]


def _probes(work: Path) -> list[Step]:
    engine = {"file": str(work / "default.engine")}
    return [
        Step(
            "rtx default engine: build",
            "rtx-default-build",
            engine,
            30,
            "TensorRT-RTX without a named GPU, in a process that sees none",
            environment={"CUDA_VISIBLE_DEVICES": ""},
        ),
        Step(
            "rtx default engine: load",
            "rtx-default-load",
            engine,
            20,
            'whether the engine for "8.0, 8.6, 8.9, 12.0 and later" loads here',
            needs=("rtx default engine: build",),
        ),
    ]


def _parity(name: str, kit: Path, work: Path, place: str) -> list[Step]:
    bundle, steps = str(work / "trained" / f"{name}.vlm"), []
    for build, precision in BUILDS.items():
        if precision is not None and name == "tiny-clip":
            continue  # it has no decoder
        made = f"{name} {build}: build"
        options = {"bundle": bundle, "target": "cuda-desktop", "name": build, "precision": precision}
        steps.append(Step(made, "build", options, 30, "lowered for ONNX Runtime CUDA on this machine"))
        check = {"bundle": bundle, "build": build, "place": place, "exact": precision is None}
        check["examples"] = str(kit / "trained" / f"{name}.examples")
        steps.append(
            Step(f"{name} {build}: parity", "parity", check, 45, "against the portable graphs on the CPU", needs=(made,))
        )
    return steps


def _shape(name: str, kit: Path, work: Path, place: str, device: str, size: tuple[int, int, int], number: int) -> list[Step]:
    """One round of a shape's contenders, in turn."""
    bundle, steps = str(work / "shapes" / f"{name}.vlm"), []
    large = name.endswith("2b")
    fill = f"{name}: fill"
    if number == 1:
        about = "random weights for the graphs that travelled without"
        steps.append(Step(fill, "fill", {"bundle": bundle, "parts": "builds"}, 90 if large else 30, about, least_s=15))
    prompt, answer, runs = size
    options = {"bundle": bundle, "place": place, "prompt_tokens": prompt, "new_tokens": answer, "runs": runs}

    def ours(build: str, graphs: bool) -> Step:
        label = "" if graphs else " without CUDA graphs"
        return Step(
            f"{name} ort-cuda {build}{label}: round {number}",
            "ours",
            {**options, "build": build},
            60 if large else 40,
            "TTFT, vision, prefill and time per token",
            least_s=15,
            needs=(fill,),
            environment={"VLM_EDGE_CUDA_GRAPH": "1" if graphs else "0"},
        )

    steps.append(ours("cuda-fp16", True))
    steps.append(_peer(name, kit, device, size, number, compiled=False))
    steps.append(ours("cuda-int4", True))
    if number == 1 and place != "cpu":
        steps.append(ours("cuda-fp16", False))
    return steps


def _peer(name: str, kit: Path, device: str, size: tuple[int, int, int], number: int, *, compiled: bool) -> Step:
    prompt, answer, runs = size
    options = {"known": str(kit / "shapes" / f"{name}.json"), "device": device, "compiled": compiled}
    options |= {"prompt_tokens": prompt, "new_tokens": answer, "runs": min(runs, 3)}
    label = "torch.compile, static cache" if compiled else "eager"
    return Step(
        f"{name} transformers {label}: round {number}", "peer", options, 120 if compiled else 60, "beside ours", least_s=20
    )


def _tensorrt(name: str, kit: Path, work: Path) -> list[Step]:
    """TensorRT's two libraries, each where it has a target for this GPU."""
    bundle, steps = str(work / "trained" / f"{name}.vlm"), []
    for library, targets, module in (("tensorrt-rtx", RTX, "tensorrt-rtx-cu13"), ("tensorrt", FULL, "tensorrt")):
        made = f"{name} {library}: build"
        without = _without(library, targets, module)
        options = {"bundle": bundle, "target": targets, "name": library, "sm": "machine"}
        steps.append(Step(made, "build", options, 60, "engines for this GPU, compiled here", without=without, least_s=15))
        check = {"bundle": bundle, "build": library, "place": "auto", "exact": True}
        check["examples"] = str(kit / "trained" / f"{name}.examples")
        about = "against the portable graphs on the CPU"
        steps.append(Step(f"{name} {library}: parity", "parity", check, 45, about, needs=(made,), without=without))
    return steps


def _tensorrt_speed(name: str, work: Path, size: tuple[int, int, int]) -> list[Step]:
    """A shape through TensorRT: its portable graphs are filled, lowered and compiled here."""
    bundle, steps = str(work / "shapes" / f"{name}.vlm"), []
    prompt, answer, runs = size
    for library, targets, module in (("tensorrt-rtx", RTX, "tensorrt-rtx-cu13"), ("tensorrt", FULL, "tensorrt")):
        without, fill, made = _without(library, targets, module), f"{name} {library}: fill", f"{name} {library}: build"
        about = "random weights for the portable graphs"
        steps.append(Step(fill, "fill", {"bundle": bundle, "parts": "portable"}, 40, about, without=without, least_s=60))
        options = {"bundle": bundle, "target": targets, "name": library, "sm": "machine"}
        steps.append(Step(made, "build", options, 180, "engines for this GPU", needs=(fill,), without=without, least_s=60))
        check = {"bundle": bundle, "build": library, "place": "auto", "prompt_tokens": prompt, "new_tokens": answer, "runs": runs}
        about = "TTFT, vision, prefill and time per token"
        steps.append(Step(f"{name} {library}: round 1", "ours", check, 60, about, needs=(made,), without=without, least_s=15))
    return steps


def _without(library: str, targets: dict[int, str], module: str) -> Callable[[Facts], str | None]:
    def reason(facts: Facts) -> str | None:
        if facts.get("packages", {}).get(module, "not installed") == "not installed":
            return f"{library} is not installed here"
        sm = int(facts.get("sm", 0))
        return None if sm in targets else f"there is no {library} target for SM {sm // 10}.{sm % 10}"

    return reason


def on_this_machine(step: Step, facts: Facts) -> dict[str, Any]:
    """The step's options with what depends on the machine filled in."""
    options = dict(step.options)
    if options.get("sm") == "machine":
        options["sm"] = int(facts["sm"])
        options["target"] = options["target"][options["sm"]]
    return options
