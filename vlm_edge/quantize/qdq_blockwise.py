"""Weight-only 4 bits (and blocked 8 bits) as DequantizeLinear in front of a matrix product."""

from __future__ import annotations

from typing import ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, insert, lazy_tensor, like

from .blockwise import BlockFormat, Scheme, choose_scales, quantize
from .qdq_formats import INT8, at_least_opset, read_weight, store_per_channel, stored_scales
from .qdq_linear import linear_nodes
from .weight_only import logits_products

BLOCKS = (128, 64, 32)
"""Weights per scale that TensorRT's parser was seen to take."""
OPSET = 21
"""Where DequantizeLinear learnt blocks and 4 bits."""


class BlockwiseDQ(GraphPass):
    """`MatMul(x, W)` → `MatMul(x, DequantizeLinear(W int4 [K, N], scales [K / block, N], axis 0))`: symmetric, no zero points.

    One graph for TensorRT (int4 weight-only products) and ONNX Runtime, which fuses the pair to MatMulNBits. Scales are
    positive (TensorRT's documents ask for it) and rounded to `half` before the codes are chosen. Where `block_size` does not
    divide K, the largest smaller block that does is taken; where none does, the weight is stored in int8 with one scale per
    output channel. `body` None quantises the head alone, `head` None leaves the product of the logits as it is.
    """

    name: ClassVar[str] = "blockwise_dq"

    def __init__(
        self,
        body: Literal[4, 8] | None = 4,
        head: Literal[4, 8] | None = None,
        *,
        block_size: int = 128,
        scheme: Scheme = "mse",
        half: npt.DTypeLike = np.float16,
    ) -> None:
        """`body`, `head`: bits. Raises ValueError for a block size that TensorRT does not take."""
        if block_size not in BLOCKS:
            raise ValueError(f"block_size must be one of {BLOCKS}, found {block_size}")
        self.bits: dict[bool, Literal[4, 8] | None] = {False: body, True: head}
        self.block_size, self.scheme, self.half = block_size, scheme, half

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        heads = logits_products(graph)
        stored: dict[tuple[ir.Value, int], ir.Value] = {}
        for node, weight in list(linear_nodes(graph)):
            bits = self.bits[node in heads]
            if node.op_type != "MatMul" or bits is None:
                continue
            if (weight, bits) not in stored:
                try:
                    stored[weight, bits] = self._store(graph, node, weight, bits, changes)
                except ValueError as error:
                    changes.note(f"{weight.name}: stays as it is: {error}")
                    continue
            node.replace_input_with(1, stored[weight, bits])
            changes.add(f"int{bits}" + (" head" if node in heads else ""))
        if stored:
            at_least_opset(graph, OPSET)
        for weight, _ in stored:
            if not weight.uses():
                graph.initializers.pop(str(weight.name), None)
        return changes

    def _store(self, graph: ir.Graph, before: ir.Node, weight: ir.Value, bits: Literal[4, 8], changes: Changes) -> ir.Value:
        read, (depth, width) = read_weight(weight)
        block = next((one for one in BLOCKS if one <= self.block_size and depth % one == 0), None)
        if block is None:
            changes.note(f"{weight.name}: int8 with one scale per channel: no block of {BLOCKS} divides its {depth} rows")
            codes, scales = store_per_channel(graph, weight, INT8, 1, self.half)
            return like(insert(before, "DequantizeLinear", [codes, scales], {"axis": 1}).outputs[0], weight)
        form = BlockFormat(bits=bits, block_size=block, symmetric=True, scheme=self.scheme, positive=True)
        found, _ = choose_scales(read().T, form)
        rows = stored_scales(found, self.half)

        def make() -> npt.NDArray[np.generic]:
            unsigned = quantize(read().T, rows, None, form).reshape(width, depth)
            signed = (unsigned.astype(np.int16) - form.levels // 2).astype(np.int8)
            return np.ascontiguousarray(signed.T).astype(ml_dtypes.int4 if bits == 4 else np.int8)

        name = f"{weight.name}.int{bits}"
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        codes = add_initializer(graph, name, lazy_tensor(name, dtype, (depth, width), make))
        scales = add_initializer(graph, f"{name}.scales", np.ascontiguousarray(rows.T))
        node = insert(before, "DequantizeLinear", [codes, scales], {"axis": 0, "block_size": block})
        return like(node.outputs[0], weight)
