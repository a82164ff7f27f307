"""Token embedding tables in half precision or quantised."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import (
    MICROSOFT,
    add_initializer,
    attribute_int,
    fixed_dim,
    insert,
    is_weight,
    lazy_tensor,
    like,
    rank,
    remove_dead,
    substitute,
)

from .blockwise import BlockFormat, Codes, Floats, choose_scales, pack, quantize, row_chunks

Storage = Literal["fp16", "int8", "int4"]
_SMALLEST = 1 << 12
"""Tables with fewer values (position tables of small models, constants) are not worth a conversion."""


class EmbeddingStorage(GraphPass):
    """`Gather(table, ids)` with a stored fp32 table → the same from fp16 (Gather, Cast) or 4/8 bits (GatherBlockQuantized).

    A lookup reads a few rows, so this is about the size of the file and of the memory, not about time: half precision halves
    it at an error of 2⁻¹¹ relative. A table with values beyond fp16's range stays fp32, with a note.
    """

    name: ClassVar[str] = "embedding_storage"

    def __init__(self, storage: Storage, block_size: int = 32) -> None:
        self.storage = storage
        self.form = None if storage == "fp16" else BlockFormat(bits=8 if storage == "int8" else 4, block_size=block_size)

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in [n for n in model.graph if n.op_type == "Gather" and not n.domain]:
            table = node.inputs[0]
            if table is None or not is_weight(table) or rank(table) != 2 or attribute_int(node, "axis", 0) != 0:
                continue
            tensor = table.const_value
            if tensor is None or table.dtype != ir.DataType.FLOAT or tensor.size < _SMALLEST or len(table.uses()) != 1:
                continue
            if self.form is None:
                largest = max(float(np.abs(part).max()) for part in _parts(tensor))
                if not largest < float(np.finfo(np.float16).max):
                    changes.note(f"{table.name}: stays fp32: its largest value {largest:g} is beyond fp16")
                    continue
                out = _half(model.graph, node, table, tensor)
            else:
                if (fixed_dim(table, 1) or 0) % self.form.block_size:
                    changes.note(
                        f"{table.name}: stays fp32: width {fixed_dim(table, 1)} is no multiple of {self.form.block_size}"
                    )
                    continue
                out = _blocks(model.graph, node, table, tensor, self.form)
            like(out, node.outputs[0])
            substitute(node.outputs[0], out)
            remove_dead(model.graph, node)
            del model.graph.initializers[str(table.name)]
            changes.add(f"tables in {self.storage}")
        return changes


def _parts(tensor: ir.TensorProtocol) -> list[Floats]:
    array = np.asarray(tensor.numpy())
    return [array[part] for part in row_chunks(*array.shape)]


def _half(graph: ir.Graph, node: ir.Node, table: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    name = f"{table.name}.fp16"
    shape = tuple(int(size) for size in tensor.shape.numpy())
    half = lazy_tensor(name, ir.DataType.FLOAT16, shape, lambda: np.asarray(tensor.numpy()).astype(np.float16))
    rows = insert(node, "Gather", [add_initializer(graph, name, half), node.inputs[1]], {"axis": 0}, name=node.name).outputs[0]
    rows.type, rows.shape = ir.TensorType(ir.DataType.FLOAT16), node.outputs[0].shape
    return insert(node, "Cast", [rows], {"to": int(ir.DataType.FLOAT)}).outputs[0]


def _blocks(graph: ir.Graph, node: ir.Node, table: ir.Value, tensor: ir.TensorProtocol, form: BlockFormat) -> ir.Value:
    name = f"{table.name}.int{form.bits}"
    rows, width = (int(size) for size in tensor.shape.numpy())
    scales, _ = choose_scales(np.asarray(tensor.numpy(), np.float32), form)

    def codes() -> Codes:
        found = quantize(np.asarray(tensor.numpy(), np.float32), scales, None, form)
        return pack(found.reshape(rows, -1), form.bits)

    stored = add_initializer(graph, name, lazy_tensor(name, ir.DataType.UINT8, (rows, width * form.bits // 8), codes))
    zero = np.full((rows, form.blocks(width)), form.levels // 2, np.uint8)
    inputs = [stored, node.inputs[1], add_initializer(graph, f"{name}.scales", scales)]
    inputs.append(add_initializer(graph, f"{name}.zeros", pack(zero, form.bits)))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block_size, "bits": form.bits}
    return insert(node, "GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=node.name).outputs[0]
