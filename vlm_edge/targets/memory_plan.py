"""Does a build fit its device? Weights, KV cache, activations and the build itself, against the device's memory.

All figures are bytes and upper estimates, from the lowered graphs alone:

- weights: what the graph stores, and what engines were measured to add;
- KV cache: [batch, kv_heads, context, head_dim] for keys and values of every layer, twice where a step writes a second buffer;
- activations: see `activations`; every graph keeps its own;
- compiling: 2 times the largest graph's weights at least, and up to what was measured. It happens on the device for TensorRT, on
  any machine for TensorRT-RTX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec
import onnx_ir as ir

from vlm_edge_runtime.bundle.engine_profile import EngineProfile
from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.errors import TargetError

from .activations import peak_activations
from .precision import Kind, kind_of
from .target import Target

ENGINE_FACTOR = {"int4": 1.3, "nvfp4": 1.3, "int8": 1.1, "int8w": 1.1, "fp8": 1.1, "fp8w": 1.1}
"""Engine over stored weights. Measured with TensorRT-RTX 1.7.1, in MB: int4 97 of 76, int8 94 of 87, fp16 281 of 269."""
FLOAT_FACTOR = 1.05
BUILD_BASE = 400 * 2**20
"""What the builder's process takes before any weight (TensorRT-RTX 1.7.1: 330 MB by the straight line through three ViTs)."""
BUILD_LEAST = 2.0
BUILD_MOST, BUILD_MOST_INT4 = 6.0, 10.0
"""Peak of compiling over stored weights, at least (NVIDIA's documentation) and at most (a 135 M decoder: 1,880 of 269 MB in fp16,

1,076 of 76 MB in int4, the base subtracted). `vlm-edge build` itself was in between: 1,498 MB for the fp16 decoder of a
SmolVLM-256M (269 MB of weights), 1,010 MB for its vision encoder (173 MB).
"""
BYTES = {
    "fp32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "int8": 1.0625,
    "int8w": 1.0625,
    "fp8": 1.0,
    "fp8w": 1.0,
    "nvfp4": 0.5625,
    "int4": 0.5625,
}
"""Bytes of a weight of a matrix product, with a scale in half precision for each block of 32 (16 for nvfp4, in 8 bits)."""
_UPDATES = ("TensorScatter", "GroupQueryAttention")
"""Operators that write new entries into the cache they read."""
_STEP = 64
"""Contexts that would fit are named in multiples of this."""
_WEIGHT = 1024
"""Stored tensors of two dimensions and at least so many elements are weights of products."""


class GraphMemory(msgspec.Struct, kw_only=True, frozen=True):
    """One lowered graph.

    `weights`: stored bytes; `elements`: numbers in its matrices; `activations`: the peak of the values inside at the largest
    profile; `scores`: attention scores that exist only without a fused kernel; `guessed`: values of unknown size; `in_place`:
    whether the cache that it writes is the one it reads. Several profiles of an engine share its weights (see
    tensorrt/profiles.py for when they would not).
    """

    name: str
    role: str
    word: str
    weights: int
    elements: int
    activations: int
    scores: int = 0
    guessed: int = 0
    in_place: bool = True

    @property
    def engine(self) -> int:
        """The weights as an engine stores them."""
        return math.ceil(self.weights * ENGINE_FACTOR.get(self.word, FLOAT_FACTOR))


class MemoryPlan(msgspec.Struct, kw_only=True, frozen=True):
    """What a build needs on its target, in bytes.

    Of decoders for several contexts the one that needs most is counted; `others` is what the rest add when they are used beside
    it (an engine stays loaded, its weights are its own).
    `capacity`: the device's memory; `reserved`: what stays with the system. `build_least`, `build_most`: the process that
    compiles, and `build_on_device` whether that has to fit as well. `advice`: what would fit, where this does not.
    """

    target: str
    capacity: int
    reserved: int
    graphs: list[GraphMemory]
    context: int
    batch: int
    kv_cache: int
    build_least: int
    build_most: int
    build_on_device: bool
    others: int = 0
    notes: list[str] = []
    advice: str = ""

    @property
    def weights(self) -> int:
        """All engines' weights."""
        return sum(graph.engine for graph in self.graphs)

    @property
    def activations(self) -> int:
        """What all graphs need beside weights and cache."""
        return sum(graph.activations for graph in self.graphs)

    @property
    def total(self) -> int:
        """What running needs."""
        return self.weights + self.kv_cache + self.activations

    @property
    def usable(self) -> int:
        """The device's memory beside the system."""
        return self.capacity - self.reserved

    @property
    def fits(self) -> bool:
        """Whether the build can be made and run."""
        return self.total <= self.usable and (not self.build_on_device or self.build_least <= self.usable)


def graph_memory(model: ir.Model, name: str, role: str, word: str, profiles: Sequence[EngineProfile]) -> GraphMemory:
    """What one lowered graph needs. `word`: its precision; `profiles`: the sizes it is compiled for."""
    shapes = [{key: one.max for key, one in profile.shapes.items()} for profile in profiles] or [{}]
    peaks = [peak_activations(model, one) for one in shapes]
    stored = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    matrices = [one for one in stored if len(one.shape) > 1 and one.size >= _WEIGHT]
    scales = sum(one.size for one in _scales(model))
    return GraphMemory(
        name=name,
        role=role,
        word=word,
        weights=math.ceil(sum(one.size * one.dtype.itemsize for one in stored)),
        elements=sum(one.size for one in matrices) - scales,
        activations=max(peak.bytes for peak in peaks),
        scores=max(peak.scores for peak in peaks),
        guessed=max(peak.guessed for peak in peaks),
        in_place=_in_place(model),
    )


def memory_plan(
    graphs: Sequence[GraphMemory], target: Target, *, kv: KVLayout | None, context: int, batch: int, longest: int = 0
) -> MemoryPlan:
    """Adds the graphs up. `kv`: the decoder's cache, None without one; `context`: its tokens, of each of `batch` rows;

    `longest`: what the model can attend to at most. Raises TargetError for a target that describes no GPU.
    """
    device = target.gpu()[0]
    counted = list(_counted(graphs))
    decoder = next((one for one in counted if one.role == "decoder"), None)
    entry = _kv_entry(kv, decoder) * batch if kv is not None else 0
    compiled = target.backend.startswith("tensorrt")
    builds = [_build(one) for one in counted] if compiled else []  # one after another
    least, most = (max((build[which] for build in builds), default=0) for which in (0, 1))
    plan = MemoryPlan(
        target=target.name,
        capacity=device.memory_bytes,
        reserved=device.memory_bytes - device.usable_bytes,
        graphs=counted,
        context=context,
        batch=batch,
        kv_cache=entry * context,
        build_least=least,
        build_most=most,
        build_on_device=target.backend == "tensorrt",
        others=sum(one.engine + one.activations for one in graphs) - sum(one.engine + one.activations for one in counted),
    )
    return msgspec.structs.replace(
        plan, notes=list(_notes(plan)), advice="" if plan.fits else _advice(plan, target, entry, longest)
    )


def refuse_memory(plan: MemoryPlan) -> None:
    """Raises TargetError for a plan that does not fit, naming what would."""
    if plan.fits:
        return
    if plan.total > plan.usable:
        what = f"{gib(plan.weights)} of weights, {gib(plan.kv_cache)} of KV cache ({plan.context} tokens × {plan.batch})"
        need = f"running needs {gib(plan.total)}: {what} and {gib(plan.activations)} of activations"
    else:
        need = f"compiling on the device needs at least {gib(plan.build_least)}"
    has = f"{gib(plan.usable)} of memory beside the system ({gib(plan.capacity)} in all)"
    raise TargetError(f"{plan.target} has {has}, and {need}. {plan.advice}")


def gib(count: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _counted(graphs: Sequence[GraphMemory]) -> Iterator[GraphMemory]:
    """All graphs, but of the decoders (one for each context) only the one that needs most."""
    decoders = [one for one in graphs if one.role == "decoder"]
    yield from (one for one in graphs if one.role != "decoder")
    if decoders:
        yield max(decoders, key=lambda one: one.engine + one.activations)


def _kv_entry(kv: KVLayout, decoder: GraphMemory | None) -> int:
    """Bytes of one token of one row."""
    copies = 1 if decoder is None or decoder.in_place else 2
    return kv.entry_bytes * copies


def _build(graph: GraphMemory) -> tuple[int, int]:
    most = BUILD_MOST_INT4 if graph.word in ("int4", "nvfp4") else BUILD_MOST
    return BUILD_BASE + math.ceil(BUILD_LEAST * graph.weights), BUILD_BASE + math.ceil(most * graph.weights)


def _notes(plan: MemoryPlan) -> Iterator[str]:
    scores = max((graph.scores for graph in plan.graphs), default=0)
    if scores:
        beyond = ", which would not fit" if plan.total + scores > plan.usable else ""
        yield f"attention without a fused kernel would need {gib(scores)} more{beyond}"
    if plan.others:
        beyond = ", which would not fit" if plan.total + plan.others > plan.usable else ""
        yield f"engines of other contexts, used in the same process, take {gib(plan.others)} more{beyond}"
    guessed = sum(graph.guessed for graph in plan.graphs)
    if guessed:
        yield f"{guessed} values have no size before the graphs run; each is counted as the largest value its node reads"
    if plan.build_on_device and plan.build_most > plan.usable >= plan.build_least:
        yield f"compiling may need up to {gib(plan.build_most)}: add swap, and stop the desktop before it"


def _advice(plan: MemoryPlan, target: Target, entry: int, longest: int) -> str:
    found = []
    left = plan.usable - (plan.total - plan.kv_cache)
    building = plan.build_on_device and plan.build_least > plan.usable
    fitting = min(left // entry, longest or plan.context) // _STEP * _STEP if entry and not building else 0
    if fitting >= _STEP:
        found.append(f"a context of {fitting} tokens")
    if plan.batch > 1 and entry and not building and plan.total - plan.kv_cache * (plan.batch - 1) // plan.batch <= plan.usable:
        found.append(f"{plan.context} tokens with one row at a time")
    if lower := _lower_precision(plan, target):
        found.append(lower)
    if not found:
        return "Nothing smaller that this target can build would fit: choose a device with more memory, or a smaller model."
    return f"What would fit: {', or '.join(found)}."


def _lower_precision(plan: MemoryPlan, target: Target) -> str:
    """The finest precision of the graph with the most weights that would make the plan fit."""
    graph = max(plan.graphs, key=lambda one: one.engine, default=None)
    if graph is None:
        return ""
    kind: Kind = kind_of(graph.role)
    own = graph.weights / graph.elements if graph.elements else 0.0
    rest = graph.weights - graph.elements * min(own, BYTES.get(graph.word, own))
    for word in sorted(target.words[kind], key=lambda one: -BYTES[one]):
        if BYTES[word] >= own:
            continue
        weights = math.ceil(rest + graph.elements * BYTES[word])
        smaller = msgspec.structs.replace(graph, word=word, weights=weights)
        least = max(_build(one)[0] for one in (smaller, *(other for other in plan.graphs if other is not graph)))
        changed = plan.total - graph.engine + smaller.engine
        if changed <= plan.usable and (not plan.build_on_device or least <= plan.usable):
            return f"{graph.role} in {word} ({gib(changed)} in all)"
    return ""


def _in_place(model: ir.Model) -> bool:
    """Whether every cache output is its input, updated; a copy otherwise."""
    written = [value for value in model.graph.outputs if str(value.name).startswith("present.")]
    makers = [value.producer() for value in written]
    return all(maker is not None and maker.op_type in _UPDATES for maker in makers)


def _scales(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Scales of several dimensions: no weights of products themselves."""
    seen: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        if node.op_type in ("DequantizeLinear", "QuantizeLinear") and len(node.inputs) > 1:
            scale = node.inputs[1]
            tensor = scale.const_value if scale is not None and scale not in seen else None
            if scale is not None and tensor is not None and len(tensor.shape) > 1 and tensor.size >= _WEIGHT:
                seen.add(scale)
                yield tensor
