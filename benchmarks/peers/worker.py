"""What every contender's process does, in the same order. Only the standard library: it runs in the environments of all peers.

A contender is a module of this package, run as `python -m benchmarks.peers.NAME {prepare|start|measure} JOB.json`. `prepare`
makes its artefacts; `measure` prints one line `RESULT {…}` with seconds and bytes; `start` goes to the first token alone and
prints which files were read. The environment variable BENCH_BEGAN holds the time at which the process was started, so that a
cold start counts the interpreter and its imports.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

BEGAN = float(os.environ.get("BENCH_BEGAN", time.time()))
MARK = "RESULT "
Job = dict[str, Any]
"""Made by scenario.py: `checkpoint`, `text_checkpoint`, `plain_checkpoint` (folders), `folder` (where artefacts go), `variant`,
`threads`, `runs`, `tiles`, `new_tokens`, `image` (`text`, `ids`, `arrays`: an .npz, `picture`: a .png), `turn` (`text`, `ids`),
`texts`: `short`, `long`, `longest` → prompts (`text`, `ids`), each different, so that no cache of prefixes answers for it."""


class Contender(Protocol):
    """What a worker's module makes of a job. Seconds are wall time; `None` is "this contender has no such thing"."""

    def picture(self) -> float | None:
        """Seconds from the image prompt to its first token, nothing kept from before. None: it takes no images."""

    def turn(self) -> float | None:
        """Seconds to the first token of a second turn after `picture`, which sees the same image."""

    def vision(self) -> float | None:
        """Seconds to encode all tiles of the image once."""

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        """Seconds from a text prompt to each of its new tokens."""

    def facts(self) -> dict[str, Any]:
        """`files`: paths that a device needs; `token_bytes`: bytes of weights that one decoded token reads; `kv_bytes`: bytes
        of one number in its KV cache; `whole`: whether it is a whole vision-language model in one process; `note`;
        `arithmetic`: see `arithmetic`."""


class Clock:
    """Notes when each token comes. Stands before a library's own class of streamers, whose `put` or `write` calls `tick`."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.calls: list[float] = []

    def tick(self) -> None:
        """A token is there."""
        self.calls.append(time.perf_counter() - self.began)

    def put(self, value: Any) -> None:
        """transformers' streamers: the prompt first, then each token."""
        self.tick()

    def end(self) -> None:
        """The answer is whole."""


def clock_of(base: Any, **methods: Any) -> Any:
    """A class of streamers of `base`'s kind that is a `Clock`."""
    return type("StreamerClock", (Clock, base), methods)


def arithmetic(
    products: str | None, attention: str | None, vision: str | None, vision_attention: str | None, known: str
) -> dict[str, str | None]:
    """What a contender multiplies in (`int8`, `bf16`, `fp32`; None: not known), and how that is known.

    `products`: the decoder's matrices with weights; `vision`: the encoder's.
    """
    return {
        "products": products,
        "attention": attention,
        "vision": vision,
        "vision_attention": vision_attention,
        "known": known,
    }


def cpu_flags() -> frozenset[str]:
    """What the first core can do, in Linux's words; nothing elsewhere."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return frozenset(next((line.split(":")[1].split() for line in facts.splitlines() if line.startswith("flags")), []))


def peak_rss_mb() -> float:
    """The process's largest resident set so far, in 10⁶ bytes.

    From /proc where there is one: getrusage's figure begins with what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def files_bytes(paths: Sequence[str | Path]) -> int:
    """Bytes on disk of files, and of what lies in folders."""
    found = [file for path in map(Path, paths) for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in found)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rate(times: Sequence[float]) -> float:
    """Tokens per second after the first one."""
    return (len(times) - 1) / (times[-1] - times[0])


def measure(make: Callable[[Job], Contender], job: Job) -> dict[str, Any]:
    """Everything about one contender that one process can say. Figures are medians over the job's runs."""
    found: dict[str, Any] = {}
    began = time.perf_counter()
    contender = make(job)
    found["load_s"] = time.perf_counter() - began
    found.update(_image(contender, job))
    if job["tiles"] == 1:
        found.update(_texts(contender, job))
    found["rss_long_mb"] = peak_rss_mb()
    facts = contender.facts()
    files = facts.pop("files")
    found.update(size_mb=files_bytes(files) / 1e6, files=[str(file) for file in files], mapped=mapped_files(), **facts)
    if not facts["whole"]:  # half a model's memory and size say nothing beside a whole one's
        for name in ("rss_mb", "rss_long_mb", "size_mb", "cold_s", "cold_disk_mb"):
            found.pop(name, None)
    return found


def _image(contender: Contender, job: Job) -> dict[str, Any]:
    first = contender.picture()
    if first is None:
        return {}
    found: dict[str, Any] = {"cold_s": time.time() - BEGAN, "cold_disk_mb": read_mb()}
    if job["tiles"] > 1:  # tens of seconds for some: the first answer is the one that counts
        steps: list[tuple[str, Callable[[], float | None]]] = [("turn_s", contender.turn)]
        taken: dict[str, list[float]] = {"ttft_s": [first]}
    else:
        steps = [("vision_s", contender.vision), ("ttft_s", contender.picture), ("turn_s", contender.turn)]
        taken = {}
    for _ in range(job["runs"] if job["tiles"] == 1 else 1):
        for name, step in steps:
            value = step()
            if value is not None:
                taken.setdefault(name, []).append(value)
    found.update({name: statistics.median(values) for name, values in taken.items()})
    if "vision_s" in found:
        found["vision_ms"] = 1e3 * found.pop("vision_s") / job["tiles"]
    found["rss_mb"] = peak_rss_mb()
    return found


def _texts(contender: Contender, job: Job) -> dict[str, Any]:
    """`short` and `long` prompts are answered at some length, of the `longest` only the first token is taken."""
    found: dict[str, Any] = {}
    for name, prompts in job["texts"].items():
        times = [contender.text(prompt, job["new_tokens"] if name != "longest" else 1) for prompt in prompts]
        length = len(prompts[0]["ids"])
        found[f"prefill_{name}_tps"] = length / statistics.median(each[0] for each in times)
        if name != "longest":
            found[f"decode_{name}_tps"] = statistics.median(rate(each) for each in times)
    return found


def read_mb() -> float:
    """What this process has read from the disk so far, in 10⁶ bytes; pages that were in memory already do not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512 / 1e6


def start(make: Callable[[Job], Contender], job: Job) -> dict[str, Any]:
    """As far as the first token, as a user's first start would come: what it read is in memory afterwards, and is named.

    Python says which files it opens, for which a start that is measured has no time; some import systems read all sources.
    """
    opened: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened.add(arguments[0])

    sys.addaudithook(hook)  # for the rest of this process, which ends soon
    contender = make(job)
    if contender.picture() is None:
        contender.text(job["texts"]["short"][0], 1)
    read = {str(Path(name).resolve()) for name in list(opened) if Path(name).is_file()}
    read = {name for name in read if not name.startswith(("/proc/", "/sys/", "/dev/"))}
    return {"files": [str(file) for file in contender.facts()["files"]], "mapped": sorted(read | set(mapped_files()))}


def mapped_files() -> list[str]:
    """Files that this process has mapped (libraries, weights) or imported: a cold start waits for the disk unless they are read

    before it.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    mapped = {parts[5] for line in lines if len(parts := line.split(maxsplit=5)) == 6 and parts[5].startswith("/")}
    modules = [vars(module) for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    imported = {file for each in modules for name in ("__file__", "__cached__") if isinstance(file := each.get(name), str)}
    return sorted(mapped | {file for file in imported if Path(file).is_file()})


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages; one that is missing is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(make: Callable[[Job], Contender], prepare: Callable[[Job], None], packages: Sequence[str]) -> None:
    """The command line of a worker."""
    what, path = sys.argv[1:]
    job: Job = json.loads(Path(path).read_text())
    if what == "prepare":
        prepare(job)
        return
    found = start(make, job) if what == "start" else {**measure(make, job), "versions": versions(*packages)}
    sys.stdout.write("\n" + MARK + json.dumps(found) + "\n")
    sys.stdout.flush()
