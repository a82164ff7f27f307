"""Matrix products of an encoder with stored weights, with what follows each of them: bias, scale per channel, activation, sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.graph import consumers, only_consumer

from .panels import BLOCK, PANEL, floating, vector
from .patterns import Activation, activation
from .plan_file import BufferKind, Format, Weight
from .products import Product, product
from .products import stacked as side_by_side

Floats = npt.NDArray[np.float32]
Constants = Callable[[ir.Value | None], npt.NDArray[np.generic] | None]
"""The constant that a value is, or None."""


@dataclass(slots=True, frozen=True)
class Linear:
    """`node`'s product: matrices [depth, width] side by side, from `source`; `out` is what it gives once bias and scale are in.

    `blocks`: the same where a pass has stored weights in 4 or 8 bits per block. `factor`: what outputs are scaled with.
    """

    source: ir.Value
    out: ir.Value
    depth: int
    width: int
    matrices: tuple[Callable[[], Floats], ...]
    biases: tuple[Floats | None, ...]
    nodes: tuple[ir.Node, ...]
    blocks: Product | None = None
    factor: Floats | None = None

    @property
    def codes(self) -> BufferKind:
        """In what its source has to be, unless all is floats or `bytes`."""
        return BufferKind.CODES if self.blocks is not None else BufferKind.FLOATS

    def bias(self, more: Floats | None = None) -> Floats | None:
        """The bias of all outputs plus `more`; None without any."""
        if all(one is None for one in self.biases) and more is None:
            return None
        width = self.width // len(self.biases)
        whole = np.concatenate([np.zeros(width, np.float32) if one is None else one for one in self.biases])
        whole = whole if self.factor is None else whole * self.factor
        return np.asarray(whole if more is None else whole + more, np.float32)

    def matrix(self) -> Floats:
        """All weights [depth, width]."""
        whole = np.concatenate([one() for one in self.matrices], axis=1)
        return np.asarray(whole if self.factor is None else whole * self.factor, np.float32)

    def weights(self, more: Floats | None = None) -> list[Weight | None]:
        """The weight and the bias of a step, in floats or as they are stored."""
        bias = self.bias(more)
        matrix = self.blocks.weight() if self.blocks is not None else floating(self.depth, np.arange(self.width), self.matrix)
        return [matrix, None if bias is None else vector(bias[None])]

    def bytes(self, more: Floats | None = None) -> Weight:
        """Weights in 8 bits with one scale per output, and bias, as one."""
        return byte_matrix(self.depth, self.width, self.matrix, self.bias(more))


def linear(node: ir.Node, constant: Constants) -> Linear | None:
    """A product with constant weights, the bias behind it taken in, and the scale per channel where weights are floats."""
    source = node.inputs[0] if node.inputs else None
    if source is None or len(node.inputs) < 2:
        return None
    if node.op_type == "MatMulNBits":
        found = product(node)
        if found is None:
            return None
        bias = found.bias_weight()
        stored = None if bias is None else np.asarray(bias.make(), np.float32).reshape(-1)
        return _followed(Linear(source, node.outputs[0], found.depth, found.width, (), (stored,), (node,), found), constant)
    weight = constant(node.inputs[1])
    if node.op_type != "MatMul" or node.domain or weight is None or weight.ndim != 2:
        return None
    depth, width = weight.shape
    if constant(source) is not None:
        return None
    value = node.inputs[1]
    plain = Linear(source, node.outputs[0], depth, width, (lambda: np.asarray(constant(value), np.float32),), (None,), (node,))
    return _followed(plain, constant)


def _followed(one: Linear, constant: Constants) -> Linear:
    user = only_consumer(one.out)
    if user is not None and user.op_type == "Add" and not user.domain and one.biases[0] is None:
        bias = _of_channels(user, one, constant)
        if bias is not None:
            one = replace(one, out=user.outputs[0], biases=(bias,), nodes=(*one.nodes, user))
            user = only_consumer(one.out)
    if user is not None and user.op_type == "Mul" and not user.domain and one.blocks is None:
        factor = _of_channels(user, one, constant)
        if factor is not None:
            one = replace(one, out=user.outputs[0], factor=factor, nodes=(*one.nodes, user))
    return one


def _of_channels(node: ir.Node, one: Linear, constant: Constants) -> Floats | None:
    """The other operand of an elementwise node, one number per output."""
    other = next((value for value in node.inputs if value is not one.out), None)
    array = constant(other)
    if array is None or array.size != one.width or array.shape[-1] != one.width:
        return None
    return np.asarray(array, np.float32).reshape(-1)


def stacked(products: Sequence[Linear]) -> Linear:
    """Products of one source side by side."""
    first = products[0]
    blocks = side_by_side([one.blocks for one in products if one.blocks is not None]) if first.blocks is not None else None
    factor = None
    if any(one.factor is not None for one in products):
        factor = np.concatenate([np.ones(one.width, np.float32) if one.factor is None else one.factor for one in products])
    return replace(
        first,
        width=sum(one.width for one in products),
        matrices=tuple(matrix for one in products for matrix in one.matrices),
        biases=tuple(bias for one in products for bias in one.biases),
        nodes=tuple(node for one in products for node in one.nodes),
        blocks=blocks,
        factor=factor,
    )


def alike(products: Sequence[Linear]) -> bool:
    """Whether products of one source can stand side by side: they store weights in the same way."""
    forms = {(one.depth, one.width, one.blocks is None, one.blocks and (one.blocks.bits, one.blocks.block)) for one in products}
    return len(forms) == 1


def activated(value: ir.Value) -> Activation | None:
    """The activation function that is all that reads `value`."""
    users = reached = consumers(value)
    for _ in range(8):
        for user in reached:
            found = activation(user.outputs[0])
            if found is not None and found.source is value:
                return found if set(users) <= set(found.nodes) and not value.is_graph_output() else None
        reached = [one for user in reached for one in consumers(user.outputs[0])]
    return None


def byte_matrix(depth: int, width: int, matrix: Callable[[], Floats], bias: Floats | None) -> Weight:
    """float32 [depth, width] in 8 bits, one scale per output: scales, bias, sums of codes, codes (`ByteMatrix` in kernels.h)."""
    panels = -(-width // PANEL)
    rows = -(-depth // BLOCK) * BLOCK
    size = panels * (3 * PANEL * 4 + rows * PANEL)

    def make() -> npt.NDArray[np.generic]:
        whole = np.zeros((rows, panels * PANEL), np.float32)
        whole[:depth, :width] = matrix()
        scales = np.abs(whole).max(axis=0) / 127
        codes = np.rint(np.nan_to_num(whole / np.where(scales > 0, scales, 1))).astype(np.int8)  # a NaN is in the scale too
        filled = np.zeros(panels * PANEL, np.float32)
        filled[:width] = 0 if bias is None else bias
        sums = codes.sum(axis=0, dtype=np.int32)
        packed = codes.reshape(rows // 4, 4, panels, PANEL).transpose(2, 0, 3, 1)
        parts = [scales.astype(np.float32), filled, sums, np.ascontiguousarray(packed)]
        return np.concatenate([np.ascontiguousarray(one).view(np.uint8).reshape(-1) for one in parts])

    return Weight(Format.BYTES, depth, width, size, make)
