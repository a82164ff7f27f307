"""Matrix products with stored weights: what MatMulNBits and MatMul hold, stacked and paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.graph import MICROSOFT, attribute_int, fixed_dim, is_weight, only_consumer, rank

from .errors import NotExpressible
from .panels import PANEL, Quantised, floating, quantised, vector
from .plan_file import Weight

_BLOCKS = (32, 64, 128)


@dataclass(slots=True, frozen=True)
class Product:
    """`source` times the weights of `parts`, one after another, in the order of `order` (None: as they are).

    `nodes`: the graph's nodes that it stands for. `pairs`: for a gated product, how many gates there are.
    """

    source: ir.Value
    parts: tuple[ir.Node, ...]
    depth: int
    width: int
    bits: int
    block: int
    nodes: tuple[ir.Node, ...]
    biases: tuple[ir.Value | None, ...]
    order: npt.NDArray[np.int64] | None = None
    pairs: int = 0

    @property
    def out(self) -> ir.Value:
        """What comes out, bias included (of a single product)."""
        return self.nodes[-1].outputs[0]

    def paired(self, gate: npt.NDArray[np.int64], up: npt.NDArray[np.int64], nodes: tuple[ir.Node, ...]) -> Product:
        """Panels of 16 gates and of what they let through in turn."""
        count = -(-len(gate) // PANEL) * PANEL
        order = np.full((count // PANEL, 2, PANEL), -1, np.int64)
        for side, rows in enumerate((gate, up)):
            filled = np.full(count, -1, np.int64)
            filled[: len(rows)] = rows
            order[:, side] = filled.reshape(-1, PANEL)
        return replace(self, order=order.reshape(-1), pairs=len(gate), nodes=self.nodes + nodes)

    def weight(self) -> Weight:
        """The stacked weights as panels."""
        order = self.order if self.order is not None else np.arange(self.width)
        if not self.bits:
            return floating(self.depth, order, lambda: np.concatenate([_array(one.inputs[1]) for one in self.parts], axis=1))
        blocks = -(-self.depth // self.block)

        def codes() -> npt.NDArray[np.generic]:
            return np.concatenate([_array(one.inputs[1]).reshape(-1, blocks, self.block * self.bits // 8) for one in self.parts])

        def scales() -> npt.NDArray[np.generic]:
            return np.concatenate([_array(one.inputs[2]).reshape(-1, blocks) for one in self.parts])

        return quantised(Quantised(self.bits, self.block, self.depth, codes, scales), order)

    def bias_weight(self) -> Weight | None:
        """The biases in the same order, zeros where there are none; None without any."""
        if all(one is None for one in self.biases):
            return None
        widths = [_sizes(one)[1] for one in self.parts]
        given = zip(self.biases, widths, strict=True)
        whole = np.concatenate([np.zeros(width) if one is None else _array(one).reshape(-1) for one, width in given])
        if self.order is not None:
            whole = np.where(self.order >= 0, whole[self.order], 0)
        return vector(whole.astype(np.float32))


def product(node: ir.Node | None) -> Product | None:
    """A product with a stored weight, or None. Raises NotExpressible for a form of weights that has no kernel."""
    if node is None or len(node.inputs) < 2 or node.inputs[0] is None or not is_weight(node.inputs[1]):
        return None
    if node.op_type == "MatMul" and not node.domain:
        if rank(node.inputs[1]) != 2 or node.inputs[1].dtype != ir.DataType.FLOAT:  # type: ignore[union-attr]
            return None
        depth, width = _sizes(node)
        end, bias = _added(node, width)
        return Product(node.inputs[0], (node,), depth, width, 0, 0, tuple(dict.fromkeys((node, end))), (bias,))
    if node.op_type != "MatMulNBits" or node.domain != MICROSOFT:
        return None
    bits, block = attribute_int(node, "bits", 4), attribute_int(node, "block_size", 0)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise NotExpressible("weights with zero points")
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise NotExpressible("weights with a group index")
    if bits not in (4, 8) or block not in _BLOCKS:
        raise NotExpressible(f"{bits}-bit weights in blocks of {block}")
    depth, width = _sizes(node)
    return Product(node.inputs[0], (node,), depth, width, bits, block, (node,), (_bias(node),))


def stacked(products: Sequence[Product]) -> Product | None:
    """Products of one source as one, where their weights are alike."""
    first = products[0]
    if any(
        (one.source, one.depth, one.bits, one.block) != (first.source, first.depth, first.bits, first.block) for one in products
    ):
        return None
    return replace(
        first,
        parts=tuple(part for one in products for part in one.parts),
        width=sum(one.width for one in products),
        nodes=tuple(node for one in products for node in one.nodes),
        biases=tuple(bias for one in products for bias in one.biases),
    )


def _sizes(node: ir.Node) -> tuple[int, int]:
    if node.op_type == "MatMulNBits":
        return attribute_int(node, "K", 0), attribute_int(node, "N", 0)
    shape = node.inputs[1].const_value.shape.numpy()  # type: ignore[union-attr]
    return int(shape[0]), int(shape[1])


def _added(node: ir.Node, width: int) -> tuple[ir.Node, ir.Value | None]:
    """(the last node, the bias): the Add of a stored vector right after a MatMul, if there is one."""
    add = only_consumer(node.outputs[0])
    if add is not None and add.op_type == "Add" and not add.domain:
        bias = next((one for one in add.inputs if one is not None and is_weight(one) and rank(one) == 1), None)
        if bias is not None and fixed_dim(bias, 0) == width:
            return add, bias
    return node, None


def _bias(node: ir.Node) -> ir.Value | None:
    if len(node.inputs) < 6:
        return None
    bias = node.inputs[5]
    if bias is not None and not is_weight(bias):
        raise NotExpressible("a bias that is computed")
    return bias


def _array(value: ir.Value | None) -> npt.NDArray[np.generic]:
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise NotExpressible("a weight that is not stored")
    return np.asarray(tensor.numpy())
