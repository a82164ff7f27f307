"""The check before a build: can the target's TensorRT import every node of a lowered graph? Needs no TensorRT.

Each node is looked up in the table of what that version imports (`import_table`): operator, element types, ranks, attributes,
which inputs must be stored. Everything that cannot be built is found at once, before anything is compiled.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cache

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from vlm_edge.passes.graph import constant, fixed_dim, is_weight, producer, rank
from vlm_edge_runtime.errors import TargetError

from .device import Device
from .import_table import ImportTable, Limit, load_table, table_for, table_names
from .target import Target

SCOPE = "vlm_edge.scope"
"""The exporter's note on a node: the PyTorch module it was traced in."""
_NATIVE = ("Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization")
_HARDWARE = {
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "nvfp4",
}
"""Element types that not every device computes in, as targets call them."""
_OUTSIDE = ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL", "UINT8")
"""Element types that a network's inputs and outputs may have."""
_FAR = 6
"""How many nodes away the module of a node without a note of its own is looked for."""


class Problem(msgspec.Struct, kw_only=True, frozen=True):
    """Something in a lowered graph that the target cannot build.

    `node` and `op` name the node, `module` the PyTorch module it came from (with `near ` before it, the module of its
    neighbours; empty where nothing is known), `limit` what is broken, `way_out` what would help.
    """

    graph: str
    node: str
    op: str
    module: str
    limit: str
    way_out: str


def preflight(model: ir.Model, target: Target, graph: str) -> list[Problem]:
    """Everything in a lowered graph that the target's TensorRT would refuse, in the graph's order; empty when it can be built.

    `graph` names it in the report. Graphs for ONNX Runtime have no such limits. Types, ranks and sizes that are not known before
    the graph runs are taken to be right. Raises TargetError where nothing is known of the target's TensorRT.
    """
    if not target.backend.startswith("tensorrt"):
        return []
    device = target.gpu()[0]
    return list(_Check(model, device, table_for(target.backend, device), graph).problems())


def refuse(problems: Sequence[Problem], target: Target) -> None:
    """Raises TargetError that sums the problems up: each kind once, with its number, first place and way out."""
    if not problems:
        return
    kinds = Counter((one.graph, one.op, one.limit) for one in problems)
    first = {(one.graph, one.op, one.limit): one for one in reversed(problems)}
    told = []
    for kind, count in kinds.items():
        one = first[kind]
        place = f" in {one.module}" if one.module else ""
        told.append(f"{one.graph}: {one.op} {one.node!r}{place}{f' and {count - 1} more' if count > 1 else ''}: {one.limit}")
        told[-1] += f" ({one.way_out})" if one.way_out else ""
    raise TargetError(
        f"{len(problems)} node{'s' if len(problems) > 1 else ''} cannot be built for {target.name}: {'; '.join(told)}. "
        "Choose another precision or target, or report this model."
    )


class _Check:
    """One graph against one table."""

    def __init__(self, model: ir.Model, device: Device, table: ImportTable, graph: str) -> None:
        self.model, self.device, self.table, self.graph = model, device, table, graph
        self.opset = model.graph.opset_imports.get("", 0)

    def problems(self) -> Iterator[Problem]:
        """See `preflight`."""
        if self.opset > self.device.opset:
            what = f"the graph is of opset {self.opset}; {self.table.name} reads up to {self.device.opset} here"
            yield self._problem(None, "opset", what, f"lower it to opset {self.device.opset}")
        for value in (*self.model.graph.inputs, *self.model.graph.outputs):
            if value.dtype is not None and value.dtype.name not in _OUTSIDE:
                what = f"{value.name} is {value.dtype.name}; inputs and outputs may be {', '.join(_OUTSIDE)}"
                yield self._problem(None, "input or output", what, "cast it inside the graph")
        functions = {(function.domain, function.name) for function in self.model.functions.values()}
        inner = (node for function in self.model.functions.values() for node in function.all_nodes())
        for node in (*self.model.graph.all_nodes(), *inner):
            if (node.domain, node.op_type) not in functions:
                yield from self._of(node)

    def _of(self, node: ir.Node) -> Iterator[Problem]:
        op = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        if op not in self.table.ops or (op in _NATIVE and op not in self.device.imports):
            name = "this target" if op in self.table.ops else self.table.name
            yield self._problem(node, op, f"{name} does not import it", self._instead(op))
            return
        limit = self.table.limits.get(op, Limit())
        way = limit.way_out
        for index in limit.typed:
            yield from self._typed(node, op, index, way)
        if op in ("Cast", "CastLike", "QuantizeLinear"):
            yield from self._cast_to(node, op)
        for what in _broken(node, limit, self.opset):
            yield self._problem(node, op, f"{what}; {limit.why}" if limit.why else what, way)

    def _typed(self, node: ir.Node, op: str, index: int, way: str) -> Iterator[Problem]:
        value = _input(node, index)
        if value is None or value.dtype is None:
            return
        allowed = self.table.types_of(op)
        if value.dtype.name not in allowed:
            given = f"input {index}{_called(node, index)} is {value.dtype.name}"
            yield self._problem(node, op, f"{given}; {self.table.name} takes {', '.join(sorted(allowed))}", way or _cast(value))
        yield from self._hardware(node, op, value.dtype)

    def _cast_to(self, node: ir.Node, op: str) -> Iterator[Problem]:
        out = node.outputs[0].dtype
        if out is None:
            return
        known = self.table.types_of("DequantizeLinear" if op == "QuantizeLinear" else op)
        if out.name not in known:
            what = f"its result is {out.name}; {self.table.name} makes {', '.join(sorted(known))}"
            yield self._problem(node, op, what, "use one of those types")
        yield from self._hardware(node, op, out)

    def _hardware(self, node: ir.Node, op: str, dtype: ir.DataType) -> Iterator[Problem]:
        word = _HARDWARE.get(dtype)
        if word is not None and word not in self.device.precisions:
            has = ", ".join(self.device.precisions)
            yield self._problem(node, op, f"the device has no {word} (SM {_sm(self.device)})", f"build it in one of: {has}")

    def _instead(self, op: str) -> str:
        """What else to do with an operator that is not imported: another form of it, or a version that has it."""
        having = [
            table.name for table in map(load_table, table_names()) if op in table.ops and table.version != self.table.version
        ]
        newer = f"imported by {' and '.join(having)}" if having else ""
        return "; ".join(part for part in (self.table.missing.get(op, ""), newer) if part) or "no version imports it"

    def _problem(self, node: ir.Node | None, op: str, limit: str, way_out: str) -> Problem:
        name = "" if node is None else node.name or str(node.outputs[0].name)
        module = "" if node is None else module_of(node)
        return Problem(graph=self.graph, node=name, op=op, module=module, limit=limit, way_out=way_out)


def module_of(node: ir.Node) -> str:
    """The PyTorch module that a node was traced in; for a node that a pass made, `near ` and the nearest one that is known."""
    seen, todo = {node}, deque([(node, 0)])
    while todo:
        current, far = todo.popleft()
        if found := _scope(current):
            return found if current is node else f"near {found}"
        if far == _FAR:
            continue
        around = [value.producer() for value in current.inputs if value is not None]
        around += [use.node for value in current.outputs for use in value.uses()]
        for other in around:
            if other is not None and other not in seen:
                seen.add(other)
                todo.append((other, far + 1))
    return ""


def _scope(node: ir.Node) -> str:
    if own := node.metadata_props.get(SCOPE):
        return own
    names = node.metadata_props.get("pkg.torch.onnx.name_scopes", "").strip("[]").split(",")[:-1]  # the last is the call itself
    return names[-1].strip().strip("'\"") if names else ""


def _broken(node: ir.Node, limit: Limit, opset: int) -> Iterator[str]:
    """Each demand of `limit` that a node does not meet, in words."""
    if limit.opset is not None and opset > limit.opset:
        yield f"its form of opset {opset} is not read (up to {limit.opset} is)"
    for index in limit.absent:
        if _input(node, index) is not None:
            yield f"input {index}{_called(node, index)} is given"
    for index in limit.given:
        if _input(node, index) is None:
            yield f"input {index}{_called(node, index)} is missing"
    for index in limit.constant:
        value = _input(node, index)
        if value is not None and not _stored(value):
            yield f"input {index}{_called(node, index)} is computed, not stored in the graph"
    for key, ranks in limit.rank.items():
        dims = rank(_input(node, int(key)))
        if dims is not None and dims not in ranks:
            yield f"input {key}{_called(node, int(key))} has {dims} dimensions, not {' or '.join(map(str, ranks))}"
    for key, axes in limit.static.items():
        value = _input(node, int(key))
        open_ = [axis for axis in axes if rank(value) is not None and fixed_dim(value, axis) is None]
        if open_:
            yield f"input {key}{_called(node, int(key))} has no fixed size on axis {', '.join(map(str, open_))}"
    for index in limit.graph_input:
        value = _input(node, index)
        if value is not None and not value.is_graph_input():
            yield f"input {index}{_called(node, index)} is not an input of the graph"
    for index in limit.graph_output:
        if not node.outputs[index].is_graph_output():
            yield f"output {index} is not an output of the graph"
    yield from _values(node, limit)
    yield from _attributes(node, limit)
    if limit.outputs is not None and len(used := [out for out in node.outputs if out.name]) > limit.outputs:
        yield f"{len(used)} outputs are used, {limit.outputs} can be"


def _values(node: ir.Node, limit: Limit) -> Iterator[str]:
    for key, bound in limit.below.items():
        array = constant(_input(node, int(key)))
        if array is not None and array.size and array.max() >= bound:
            yield f"input {key}{_called(node, int(key))} is {array.max()}; it must be below {bound}"
    for index in limit.zero:
        value = _input(node, index)
        stored = value.const_value if value is not None and is_weight(value) else None
        if stored is not None and np.any(np.asarray(stored.numpy()).astype(np.float32)):
            yield f"input {index}{_called(node, index)} is not zero"
    shapes = {
        tuple(value.shape) for index in limit.alike if (value := _input(node, index)) is not None and value.shape is not None
    }
    if len(shapes) > 1 and all(isinstance(size, int) for shape in shapes for size in shape):
        yield f"inputs {' and '.join(map(str, limit.alike))} have unlike shapes ({' and '.join(map(str, sorted(shapes)))})"


def _attributes(node: ir.Node, limit: Limit) -> Iterator[str]:
    for name, allowed in limit.attributes.items():
        if name not in node.attributes:
            continue
        value = node.attributes[name].value
        for one in value if isinstance(value, list | tuple) else (value,):
            if one not in allowed:
                yield f"attribute {name} is {one}; it can be {', '.join(map(str, allowed))}"
                break
    for name in limit.no_attributes:
        if name in node.attributes:
            yield f"attribute {name} is written down"
    for name, index in limit.unless.items():
        if name in node.attributes and node.attributes[name].value and _input(node, index) is not None:
            yield f"attribute {name} and input {index}{_called(node, index)} exclude each other"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.name != "" else None


def _stored(value: ir.Value) -> bool:
    return is_weight(value) or producer(value, "Constant") is not None


def _cast(value: ir.Value) -> str:
    return "cast it to float or INT32 first" if value.dtype is not None and value.dtype.is_integer() else "use another type"


def _sm(device: Device) -> str:
    return ", ".join(f"{sm // 10}.{sm % 10}" for sm in device.sm)


@cache
def _schema_inputs(op: str, domain: str) -> tuple[str, ...]:
    try:
        return tuple(one.name for one in onnx.defs.get_schema(op, domain=domain).inputs)
    except onnx.defs.SchemaError:
        return ()


def _called(node: ir.Node, index: int) -> str:
    names = _schema_inputs(node.op_type, node.domain)
    return f" ({names[index]})" if index < len(names) else ""
