"""Writes the precision of every value into the graph, as strongly typed engines want it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .base import Changes, GraphPass
from .dtypes import infer_dtypes, inner_graphs
from .graph import add_initializer, constant, insert, is_weight, lazy_tensor, like, substitute
from .islands import PRECISION, Half, Islands, exact_values, is_float, island_nodes, largest

__all__ = ["FULL_INPUTS", "FULL_OUTPUTS", "PRECISION", "Half", "Islands", "StrongTypes"]

FULL_INPUTS = frozenset({"pixel_values", "audio_features", "flattened_patches", "interpolation_weights", "states"})
"""Float inputs that the host makes: fp32 in every build."""
FULL_OUTPUTS = frozenset({"logits", "image_logits", "pixels", "image_embeds", "text_embeds", "attention"})
"""Float outputs that the host reads: fp32 in every build. All other float inputs and outputs are of the graph's half type."""

HALVES: dict[Half, tuple[ir.DataType, npt.DTypeLike]] = {
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}
LARGEST: dict[Half, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
"""The largest finite number of each type."""
TYPED = "vlm_edge.float_type"
"""Metadata of a model that is strongly typed: `fp16` or `bf16`."""
_FLOAT = ir.DataType.FLOAT
_MASKED = 1e30
"""Constants beyond this stand for minus infinity in masks."""
_SMALL = 64
"""Stored tensors up to this many elements (scalars above all) are converted at once."""
_AS_GIVEN = frozenset({"Shape", "Size"})
"""Read a value's shape, not its numbers."""
_FIXED = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that are fp32 by the operator's definition, by index."""
_FULL_ONLY = frozenset({"ConstantOfShape", "Range", "EyeLike", "LSTM", "GRU", "RNN", "CumSum"})
"""Float results of these are fp32: made from whole numbers, or long sums."""


class StrongTypes(GraphPass):
    """fp32 graph → fp16 (or bf16) graph with fp32 islands and a Cast wherever the two meet.

    TensorRT-RTX always, and TensorRT in its strongly typed mode, compute every layer in the precision that the graph says; there
    is nothing to choose later. fp32 stay: positions, rotary tables and masks (whatever comes from whole numbers alone; fp16
    counts to 2,048), the `islands`, nodes with metadata PRECISION, weights that fp16 cannot hold (each with a note), what
    follows the last product up to an fp32 output, recurrent cells, and loops. Masks are clipped to the
    half type's lowest number before they are cast, so that a row without any key cannot become NaN.

    Float inputs and outputs become half except those named in `full_inputs` and `full_outputs`; integer ones stay. Weights are
    converted when they are saved. An `Attention` node takes its softmax in whatever its kernel does (fp32 in TensorRT's and
    ONNX Runtime's).
    """

    name: ClassVar[str] = "strong_types"

    def __init__(
        self,
        half: Half = "fp16",
        islands: Islands | None = None,
        *,
        full_inputs: Collection[str] = FULL_INPUTS,
        full_outputs: Collection[str] = FULL_OUTPUTS,
    ) -> None:
        self.half = half
        self.islands = islands if islands is not None else Islands()
        self.full_inputs, self.full_outputs = full_inputs, full_outputs

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        if TYPED in model.metadata_props:
            return changes
        graph = model.graph
        infer_dtypes(graph)
        full = island_nodes(graph, self.islands, self.full_outputs)
        writer = _Writer(graph, self.half, exact_values(graph), changes)
        full |= writer.overflowing(node for node in graph if node not in full)
        for value in graph.inputs:
            if is_float(value) and value.name not in self.full_inputs:
                value.type = ir.TensorType(writer.dtype)
        for node in list(graph):
            writer.type_node(node, full)
        writer.close(self.full_outputs)
        model.metadata_props[TYPED] = self.half
        return changes


class _Writer:
    """Gives nodes their types in graph order; each value is cast once to each type."""

    def __init__(self, graph: ir.Graph, half: Half, exact: set[ir.Value], changes: Changes) -> None:
        self.graph, self.exact, self.changes = graph, exact, changes
        self.half = half
        self.dtype, self.numpy = HALVES[half]
        self.limit = LARGEST[half]
        self.casts: dict[tuple[ir.Value, ir.DataType, object], ir.Value] = {}

    def overflowing(self, nodes: Iterable[ir.Node]) -> set[ir.Node]:
        """Nodes with a weight that the half type cannot hold; each is noted. Numbers of masks are not among them."""
        found: set[ir.Node] = set()
        known: dict[ir.Value, float] = {}
        for node in nodes:
            for value in node.inputs:
                if value is None or not is_weight(value) or not is_float(value):
                    continue
                if value not in known:
                    known[value] = largest(value)
                if known[value] <= self.limit or self._is_mask(value, known[value]):
                    continue
                found.add(node)
                label, reach = node.name or node.outputs[0].name, f"{value.name} reaches {known[value]:g}"
                self.changes.note(f"{label}: stays fp32: {reach}, {self.half} ends at {self.limit:g}")
        return found

    def _is_mask(self, value: ir.Value, top: float) -> bool:
        return top >= _MASKED and constant(value) is not None

    def type_node(self, node: ir.Node, full: set[ir.Node]) -> None:
        if branches := inner_graphs(node):
            if node.op_type == "If" and not any(out in self.exact for out in node.outputs):
                self._branches(node, branches, full)
            else:
                self._subgraphs(node)
            return
        if node.op_type in _AS_GIVEN and not node.domain:
            return
        wide = node in full or (not node.domain and node.op_type in _FULL_ONLY) or any(out in self.exact for out in node.outputs)
        if not any(is_float(out) for out in node.outputs):  # a comparison, an index: in the type of what it reads
            wide |= all(value in self.exact or is_weight(value) for value in node.inputs if value is not None and _real(value))
        dtype = _FLOAT if wide else self.dtype
        if node.op_type == "Cast" and not node.domain:
            self._cast_node(node, dtype)
            return
        fixed = _FIXED.get(node.op_type, ()) if not node.domain else ()
        for index, value in enumerate(node.inputs):
            if value is not None and index not in fixed and value.dtype in (_FLOAT, self.dtype) and value.dtype != dtype:
                node.replace_input_with(index, self.as_type(value, dtype, node))
        for out in node.outputs:
            if is_float(out):
                out.type = ir.TensorType(dtype)
        if not wide and any(out.dtype == self.dtype for out in node.outputs):
            self.changes.add(f"nodes in {self.half}")
        elif wide and node in full:
            self.changes.add("nodes in fp32 islands")

    def _cast_node(self, node: ir.Node, dtype: ir.DataType) -> None:
        out = node.outputs[0]
        if not is_float(out):
            return
        source = node.inputs[0]
        if source is not None and source.dtype == dtype and not out.is_graph_output():
            substitute(out, source)
            self.graph.remove(node, safe=True)
            return
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        out.type = ir.TensorType(dtype)

    def _branches(self, node: ir.Node, branches: list[ir.Graph], full: set[ir.Node]) -> None:
        """The nodes of both branches of an If are typed like all others; its float results are half."""
        for branch in branches:
            for inner in list(branch):
                self.type_node(inner, full)
            for index, value in enumerate(branch.outputs):
                if value.dtype == _FLOAT:
                    maker = value.producer()
                    assert maker is not None and maker.graph is branch  # an If hands on what its branch computes
                    cast = ir.node("Cast", [value], {"to": int(self.dtype)})
                    branch.insert_after(maker, cast)
                    like(cast.outputs[0], value).type = ir.TensorType(self.dtype)
                    cast.outputs[0].name = f"{value.name}.{self.half}"
                    branch.outputs[index] = cast.outputs[0]
        for out in node.outputs:
            if is_float(out):
                out.type = ir.TensorType(self.dtype)

    def _subgraphs(self, node: ir.Node) -> None:
        """A loop computes in fp32, what its body reads from outside included; so does a branch that makes a mask."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self.dtype:
                node.replace_input_with(index, self.as_type(value, _FLOAT, node))
        for inner in _inner_nodes(node):
            own = inner.graph
            for index, value in enumerate(inner.inputs):
                outside = value is not None and value.dtype == self.dtype and value.graph is not own
                if outside and value is not None:
                    inner.replace_input_with(index, self.as_type(value, _FLOAT, node))
        if node.op_type != "If":
            self.changes.note(f"{node.name or node.outputs[0].name}: {node.op_type} stays fp32, what it repeats included")

    def as_type(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` in another type, cast just before the first node that needs it so."""
        if (value, dtype, self.graph) in self.casts:
            return self.casts[value, dtype, self.graph]
        key = (value, dtype, before.graph)
        if key not in self.casts:
            if is_weight(value):
                key = (value, dtype, self.graph)  # stored outside of all branches
                self.casts[key] = self._weight(value, dtype)
            else:
                source = value
                if dtype == self.dtype and value in self.exact and value.dtype == _FLOAT:
                    source = self._clipped(value, before)
                cast = insert(before, "Cast", [source], {"to": int(dtype)}).outputs[0]
                like(cast, value).type = ir.TensorType(dtype)
                cast.name = f"{value.name}.{'fp32' if dtype == _FLOAT else self.half}.{len(self.casts)}"
                self.casts[key] = cast
                self.changes.add("casts")
        return self.casts[key]

    def _clipped(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """A mask, not below the half type's lowest number. Other exact values (rotary tables) pass as they are."""
        if not _reaches_mask(value):
            return value
        lowest = self.graph.initializers.get("mask.lowest")
        if lowest is None:
            lowest = add_initializer(self.graph, "mask.lowest", np.array(-self.limit, np.float32))
        clipped = like(insert(before, "Max", [value, lowest]).outputs[0], value)
        clipped.name = f"{value.name}.clipped.{len(self.casts)}"
        return clipped

    def _weight(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        tensor, numpy, limit = value.const_value, self.numpy, self.limit
        assert tensor is not None and dtype == self.dtype
        name = f"{value.name}.{self.half}"

        def convert() -> npt.NDArray[np.generic]:
            return np.asarray(np.clip(np.asarray(tensor.numpy(), np.float32), -limit, limit)).astype(numpy)

        shape = tuple(int(size) for size in tensor.shape.numpy())
        self.changes.add(f"weights in {self.half}")
        if tensor.size <= _SMALL:
            return add_initializer(self.graph, name, ir.Tensor(convert(), dtype=dtype, name=name))
        return add_initializer(self.graph, name, lazy_tensor(name, dtype, shape, convert))

    def close(self, full_outputs: Collection[str]) -> None:
        """Outputs in the types of the contract; weights that nothing reads any more go."""
        for index, value in enumerate(list(self.graph.outputs)):
            if value.dtype not in (_FLOAT, self.dtype):
                continue
            dtype = _FLOAT if value.name in full_outputs else self.dtype
            if value.is_graph_input():
                value.type = ir.TensorType(dtype)
            elif value.dtype != dtype:
                self._output(index, value, dtype)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def _output(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        name, maker = value.name, value.producer()
        assert maker is not None
        cast = ir.node("Cast", [value], {"to": int(dtype)})
        self.graph.insert_after(maker, cast)
        out = like(cast.outputs[0], value)
        out.type = ir.TensorType(dtype)
        self.graph.outputs[index] = out
        value.name, out.name = f"{name}.{'half' if value.dtype == self.dtype else 'full'}", name
        self.changes.add("casts")


def _real(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _inner_nodes(node: ir.Node) -> list[ir.Node]:
    return [one for graph in inner_graphs(node) for inner in graph for one in (inner, *_inner_nodes(inner))]


def _reaches_mask(value: ir.Value) -> bool:
    """Whether a constant that stands for minus infinity goes into a value."""
    todo, seen = [value], set[ir.Value]()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_weight(current):
            array = constant(current)
            if array is not None and array.dtype == np.float32 and array.size and float(np.abs(array).max()) >= _MASKED:
                return True
        elif (node := current.producer()) is not None:
            todo += [given for one in (node, *_inner_nodes(node)) for given in one.inputs if given is not None]
    return False
