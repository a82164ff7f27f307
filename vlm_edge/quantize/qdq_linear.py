"""8-bit matrix products and convolutions as Q/DQ nodes: int8 and fp8, with calibrated activations or weights only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, fixed_dim, insert, is_weight, like, producer, rank, typed
from vlm_edge.passes.islands import PRECISION

from .qdq_formats import FP8, INT8, NumberFormat, store_per_channel, stored_scales
from .weight_only import logits_products

_AXES = {"MatMul": 1, "Conv": 0}
"""The axis of output channels of each operator's weight."""
_SMALLEST = 8


class LinearQDQ(GraphPass):
    """`op(x, W)` → `op(DQ(Q(x)), DQ(W'))` for MatMul and Conv with stored weights; symmetric, one scale per output channel of W.

    The form that TensorRT turns into 8-bit kernels: it refuses zero points, wants one scale for a whole activation, and takes
    the output in the type of the scales. `thresholds` gives, per value name, the magnitude of an activation's largest code;
    None leaves activations alone (weights only). Inside attention scores, normalisations and softmax nothing is quantised, for
    they have no stored weights. The product that makes the logits stays as it is unless `head`; `keep_first` and `keep_last`
    layers, and those whose input was not calibrated, stay too, each with a note.

    A convolution with quantised activations is an fp32 island: TensorRT-RTX 1.7.1 turns its scales to fp32 anyway, with a warning
    for each; the engine is of the same size.

    Weights only: TensorRT-RTX keeps the codes in the engine; that full TensorRT does (and does not fold them into fp16) is not
    known here. Format: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
    """

    name: ClassVar[str] = "linear_qdq"

    def __init__(
        self,
        form: NumberFormat,
        thresholds: Mapping[str, float] | None,
        *,
        body: bool = True,
        head: bool = False,
        keep_first: int = 0,
        keep_last: int = 0,
        half: npt.DTypeLike = np.float16,
    ) -> None:
        """`half`: the type that the scales will be stored in. `body` False quantises the head alone."""
        if form not in (INT8, FP8):
            raise ValueError(f"the format must be int8 or fp8, found {form.name}")
        self.form, self.thresholds = form, thresholds
        self.body, self.head = body, head
        self.keep_first, self.keep_last = keep_first, keep_last
        self.half = half

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        stored: dict[ir.Value, ir.Value] = {}
        quantised: dict[tuple[ir.Value, bool], ir.Value] = {}
        heads = logits_products(graph)
        layers = [found for found in linear_nodes(graph) if found[0] not in heads]
        kept = layers[: self.keep_first] + (layers[-self.keep_last :] if self.keep_last else [])
        for _, weight in kept:
            changes.note(f"{weight.name}: kept (first {self.keep_first}, last {self.keep_last} layers)")
        chosen = layers[self.keep_first : len(layers) - self.keep_last] if self.body else []
        if self.head:
            chosen += [(node, node.inputs[1]) for node in heads if node.inputs[1] is not None]
        for node, weight in chosen:
            source = node.inputs[0]
            assert source is not None
            if self.thresholds is not None and source.name not in self.thresholds:
                changes.note(f"{weight.name}: stays as it is: its input was not calibrated")
                continue
            if weight not in stored:
                try:
                    stored[weight] = self._weight(graph, node, weight)
                except ValueError as error:
                    changes.note(f"{weight.name}: stays as it is: {error}")
                    continue
            if self.thresholds is not None:
                wide = node.op_type == "Conv"
                if (source, wide) not in quantised:
                    quantised[source, wide] = self._activation(graph, node, source, self.thresholds[str(source.name)])
                node.replace_input_with(0, quantised[source, wide])
            node.replace_input_with(1, stored[weight])
            if self.thresholds is not None and node.op_type == "Conv":
                _in_fp32(node)
            changes.add(self.form.name + (" head" if node in heads else "") + ("" if self.thresholds is not None else " weights"))
        for weight in stored:
            if not weight.uses():
                graph.initializers.pop(str(weight.name), None)
        return changes

    def _weight(self, graph: ir.Graph, before: ir.Node, weight: ir.Value) -> ir.Value:
        axis = _AXES[before.op_type]
        codes, scales = store_per_channel(graph, weight, self.form, axis, self.half)
        return like(insert(before, "DequantizeLinear", [codes, scales], {"axis": axis}).outputs[0], weight)

    def _activation(self, graph: ir.Graph, before: ir.Node, value: ir.Value, threshold: float) -> ir.Value:
        scale = stored_scales(np.array([max(threshold, 0.0) / self.form.top]), self.half)[0]
        stored = _scalar(graph, f"{value.name}.scale", np.array(scale, np.float32), ir.DataType.FLOAT)
        zero = _scalar(graph, f"{value.name}.zero", np.zeros((), self.form.numpy), self.form.onnx)  # says the type of the codes
        codes = insert(before, "QuantizeLinear", [value, stored, zero]).outputs[0]
        typed(codes, self.form.onnx, value.shape or [])
        return like(insert(before, "DequantizeLinear", [codes, stored, zero]).outputs[0], value)


def _in_fp32(conv: ir.Node) -> None:
    """Marks a quantised convolution, its DequantizeLinear nodes and the QuantizeLinear before them."""
    makers = [producer(value, "DequantizeLinear") for value in conv.inputs[:2]]
    makers += [producer(maker.inputs[0], "QuantizeLinear") for maker in makers if maker is not None]
    for node in (conv, *makers):
        if node is not None:
            node.metadata_props[PRECISION] = "fp32"


def linear_nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """(node, its stored fp32 weight) of all MatMul and Conv nodes with one, in graph order.

    A matrix of fewer than 8 rows or columns is left out: nothing is gained, and TensorRT refuses a single scale for blocks.
    """
    for node in graph:
        if node.domain or node.op_type not in _AXES or len(node.inputs) < 2:
            continue
        source, weight = node.inputs[:2]
        if source is None or weight is None or not is_weight(weight) or is_weight(source) or weight.dtype != ir.DataType.FLOAT:
            continue
        if node.op_type == "Conv" or (
            rank(weight) == 2 and min(fixed_dim(weight, 0) or 0, fixed_dim(weight, 1) or 0) >= _SMALLEST
        ):
            yield node, weight


def activations_to_calibrate(graph: ir.Graph) -> list[str]:
    """Names of the values whose ranges `LinearQDQ` needs."""
    return list(dict.fromkeys(str(node.inputs[0].name) for node, _ in linear_nodes(graph) if node.inputs[0] is not None))


def _scalar(graph: ir.Graph, name: str, array: npt.NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
    return add_initializer(graph, name, ir.Tensor(array, dtype=dtype, name=name))
