"""The TensorRT engine over stand-ins (`host_device`), for toy decoders lowered by the passes of TensorRT builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from host_device import HostDevice, HostProgram
from host_kernels import HostKernels
from toy_bench import Bench
from toy_decoder import Toy

from vlm_edge.passes.attention_mask import MASK
from vlm_edge.targets.device import Device as TargetDevice
from vlm_edge.targets.tensorrt.pipeline import lower_exactly
from vlm_edge.targets.tensorrt.seam import platform_tag
from vlm_edge_runtime.bundle.engine_files import graph_digest
from vlm_edge_runtime.bundle.manifest import (
    Build,
    EngineEntry,
    FileRef,
    GenerativeContract,
    GraphEntry,
    KVLayout,
    Manifest,
    SequentialPositions,
    Source,
    TensorSpec,
)
from vlm_edge_runtime.bundle.reader import Bundle, file_sha256
from vlm_edge_runtime.engines import EngineOptions
from vlm_edge_runtime.engines.cuda_device import Device
from vlm_edge_runtime.engines.tensorrt import TensorRTEngine
from vlm_edge_runtime.engines.tensorrt_program import Profile, Program

VERSION = "9.9.9"
NATIVE = ["Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"]


def target_device(native: bool) -> TargetDevice:
    """A device whose TensorRT has the native cache update, or TensorRT 10.3's operators."""
    return TargetDevice(
        sm=[86],
        tensorrt=">=10.3",
        opset=24 if native else 20,
        imports=NATIVE if native else [],  # type: ignore[arg-type]
        precisions=["fp32"],
        memory_gib=8,
        reserved_gib=1,
        bandwidth_gbs=100,
    )


class HostRuntime:
    """Loads "engines" that are ONNX files for ONNX Runtime on the CPU."""

    def __init__(self, native: bool, chunk: int | None = None, captures: bool = True) -> None:
        self.native, self.chunk, self.captures = native, chunk, captures
        self.loaded: dict[str, HostProgram] = {}
        self.version_checks: list[str] = []

    def check_version(self, built_with: str, where: str, again: str) -> None:
        self.version_checks.append(built_with)

    def load(self, path: Path, device: Device, *, key: str, again: str) -> Program:
        program = HostProgram(str(path), device, captures=self.captures)  # type: ignore[arg-type]
        program.in_place = self.native
        if self.chunk is not None and "inputs_embeds" in program.tensors and program.tensors["inputs_embeds"].is_input:
            hidden = program.tensors["inputs_embeds"].shape[-1]
            program.profiles = [Profile({"inputs_embeds": (1, 1, hidden)}, {"inputs_embeds": (64, self.chunk, hidden)})]
        self.loaded[path.name] = program
        return program


def toy_engine(
    folder: Path,
    kernels: HostKernels | None,
    toy: Toy,
    *,
    native: bool = True,
    buckets: Sequence[int] = (64,),
    options: EngineOptions | None = None,
    chunk: int | None = None,
    captures: bool = True,
    device: Device | None = None,
) -> TensorRTEngine:
    """The engine for a toy's decoder, lowered as for TensorRT with a cache updated in place (`native`) or by ScatterND."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {"embed_tokens": _lowered(folder, "embed_tokens", toy.embed_model(), "embedding", native, None)}
    portable = {
        "embed_tokens": _entry(folder, "embed_tokens", ir.load(_written(folder, "p_embed.onnx", toy.embed_model()))),
        "decoder": _entry(folder, "decoder", ir.load(_written(folder, "p_decoder.onnx", toy.portable_model()))),
    }
    capacities: list[int | None] = list(buckets) if toy.cached else [None]
    for capacity in capacities:
        name = f"decoder.c{capacity}" if capacity else "decoder"
        graphs[name] = _lowered(folder, name, toy.portable_model(), "decoder", native, capacity)
    engines = [engine_entry(name, entry) for name, entry in graphs.items()]
    kv = KVLayout(layers=toy.layers if toy.cached else 0, kv_heads=toy.kv_heads, head_dim=toy.size)
    contract = GenerativeContract(
        family="projector",
        modalities=[],
        positions=SequentialPositions(),
        kv=kv,
        hidden_size=toy.hidden,
        vocab_size=toy.vocab,
        context_length=256,
        eos_token_ids=[],
        pad_token_id=0,
    )
    build = Build(name="toy", target="toy", backend="tensorrt", precision={}, graphs=graphs, engines=engines, kv=kv)
    manifest = Manifest(
        name="toy",
        model_type="toy",
        source=Source(name="toy", revision="", architecture=""),
        versions={},
        created="",
        contract=contract,
        files=[],
        graphs=portable,
        builds={"toy": build},
    )
    bundle = Bundle(folder, manifest, build, portable | graphs)
    runtime = HostRuntime(native, chunk, captures)
    return TensorRTEngine(bundle, device or HostDevice(kernels, folder), runtime, options)


def toy_bench(engine: TensorRTEngine, toy: Toy) -> Bench:
    """The helpers of the other engines' tests."""
    return Bench(engine, toy)


def device_of(engine: TensorRTEngine) -> HostDevice:
    """The stand-in for the GPU."""
    assert isinstance(engine.device, HostDevice)
    return engine.device


def _lowered(folder: Path, name: str, model: bytes, kind: str, native: bool, capacity: int | None) -> GraphEntry:
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(model)).SerializeToString()
    graph = ir.load(_written(folder, f"portable.{name}.onnx", inferred))
    for node in graph.graph:
        if node.op_type == "Attention":
            node.metadata_props[MASK] = "causal"  # as the exporter says
    lower_exactly(graph, kind, target_device(native), capacity=capacity)  # type: ignore[arg-type]
    return _entry(folder, name, graph, save=True)


def _entry(folder: Path, name: str, graph: ir.Model, *, save: bool = False) -> GraphEntry:
    return graph_entry(folder, f"{name}.onnx" if save else f"p.{name}.onnx", name.split(".")[0], graph)


def graph_entry(folder: Path, file: str, role: str, graph: ir.Model) -> GraphEntry:
    """Saves a graph in a bundle's folder; its manifest entry."""
    ir.save(ir.external_data.load_to_model(graph), folder / file)
    return GraphEntry(
        role=role,
        model=_ref(folder, file),
        inputs=[_spec(value) for value in graph.graph.inputs],
        outputs=[_spec(value) for value in graph.graph.outputs],
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None and value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(name=str(value.name), dtype=np.dtype(value.dtype.numpy()).name, shape=shape)


def engine_entry(name: str, entry: GraphEntry) -> EngineEntry:
    """An "engine" that is the graph's ONNX file itself; `decoder.c64` is the decoder's with 64 cache entries."""
    capacity = int(name.partition(".c")[2]) if ".c" in name else None
    return EngineEntry(
        role=entry.role,
        graph=name,
        file=entry.model,
        sm=[86],
        builder="tensorrt",
        builder_version=VERSION,
        platform=platform_tag(),
        graph_sha256=graph_digest(entry),
        key=name,
        capacity=capacity,
    )


def _ref(folder: Path, file: str) -> FileRef:
    path = folder / file
    return FileRef(file=file, sha256=file_sha256(path), bytes=path.stat().st_size)


def _written(folder: Path, file: str, data: bytes) -> Path:
    (folder / file).write_bytes(data)
    return folder / file
