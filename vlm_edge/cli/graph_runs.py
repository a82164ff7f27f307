"""What runs each graph of a build on this machine: ONNX Runtime, the native kernels, a compiled engine; and why."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import Build, GraphEntry

ONNX_RUNTIME = "ONNX Runtime"
_BACKENDS = {
    "ort-cpu": ONNX_RUNTIME,
    "ort-cuda": f"{ONNX_RUNTIME}, CUDA",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}


@dataclass(slots=True, frozen=True)
class GraphRun:
    """`runtime`: what runs a graph. `kernels`: the instruction set of its native kernels on this machine, "" for other runtimes.

    `why`: why it is not the native kernels, where the build says so.
    """

    runtime: str
    kernels: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.runtime} ({self.kernels})" if self.kernels else self.runtime


def graph_run(role: str, graph: GraphEntry, build: Build | None) -> GraphRun:
    """What runs graph `role` of `build` (None: of the portable graphs).

    A graph that the build took over unchanged runs as the build's other graphs do. The build's option "ROLE.kernels" holds
    "native" or "onnxruntime: the reason".
    """
    if graph.format == "plan":
        return GraphRun("native", kernels=_native.kernels()[0])
    if build is None:
        return GraphRun(ONNX_RUNTIME)
    said = str(build.options.get(f"{role}.kernels", ""))
    return GraphRun(_BACKENDS.get(build.backend, build.backend), why=said.partition(": ")[2])


def reasons(runs: dict[str, GraphRun]) -> list[str]:
    """One line for each graph that could have had native kernels and has not."""
    return [f"{role} runs with {run}: {run.why}" for role, run in runs.items() if run.why]
