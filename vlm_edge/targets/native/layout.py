"""What rearranges rows, or takes some of them: most of it needs no step, for rows lie where they lay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.attention_mask import BLOCK_IDS
from vlm_edge.passes.graph import attribute_int, attribute_ints, constant, fixed_dim, is_weight, producer, scalar

from .builder import Context
from .errors import NotExpressible
from .panels import vector
from .plan_file import Kind, Ref
from .rowwise import RowWise
from .token_masks import constant_row

_BY_HEAD = (0, 2, 1, 3)


class Layout:
    """Shapes, splits, picks of tokens, and tables that tokens look up."""

    def __init__(self, context: Context, rowwise: RowWise) -> None:
        self.context = context
        self.made = context.made
        self.rowwise = rowwise

    def reshape(self, node: ir.Node) -> None:
        """Heads apart or together, tokens of all rows in one axis: the same rows."""
        rows, shape = self.made.rows(node.inputs[0]), node.outputs[0].shape
        sizes = list(shape) if shape is not None else []
        fixed = [size for size in sizes if isinstance(size, int)]
        leading = len(sizes) - len(fixed)
        ahead = all(not isinstance(size, int) for size in sizes[:leading])
        if not 1 <= leading <= 2 or not ahead or int(np.prod(fixed)) != rows.width:
            raise NotExpressible("a Reshape that mixes tokens")
        self.made.define(node.outputs[0], rows.ref, rows.width, rows.last)

    def transpose(self, node: ir.Node) -> None:
        """[batch, sequence, heads, size] to [batch, heads, sequence, size], and back."""
        rows, turned = self.made.rows(node.inputs[0]), self.context.by_head
        if attribute_ints(node, "perm") != _BY_HEAD:
            raise NotExpressible("a Transpose other than of tokens and heads")
        self.made.define(node.outputs[0], rows.ref, rows.width, rows.last)
        if node.inputs[0] not in turned:
            turned.add(node.outputs[0])

    def split(self, node: ir.Node) -> None:
        """Parts of each row."""
        rows, column = self.made.rows(node.inputs[0]), 0
        dims = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 3
        if attribute_int(node, "axis", 0) not in (-1, dims - 1):
            raise NotExpressible("a Split of tokens")
        for out in node.outputs:
            width = fixed_dim(out, -1)
            if width is None:
                raise NotExpressible("a Split of unknown sizes")
            self.made.define(out, Ref(rows.ref.buffer, rows.ref.column + column), width, rows.last)
            column += width

    def gather(self, node: ir.Node) -> None:
        """The last token's row, or a row of a table by the token's position."""
        source, indices = node.inputs[0], node.inputs[1]
        if source in self.made.values:
            rows, index = self.made.rows(source), constant(indices)
            if index is None or index.size != 1 or int(index.reshape(-1)[0]) != -1 or attribute_int(node, "axis", 0) != 1:
                raise NotExpressible("a Gather of tokens other than the last")
            ref = self.made.floats(rows.width)
            self.made.add(Kind.LAST, rows.width, True, [rows.ref], [ref])
            self.made.define(node.outputs[0], ref, rows.width, True)
            return
        tensor = source.const_value if source is not None and is_weight(source) else None
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT or attribute_int(node, "axis", 0) != 0:
            return  # geometry
        shift = self._position_shift(indices)
        if shift is not None:
            table = vector(np.asarray(tensor.numpy(), np.float32))
            ref = self.made.floats(table.width)
            self.made.add(Kind.LOOKUP, table.width, False, [], [ref], [table], [shift, 0])
            self.made.define(node.outputs[0], ref, table.width, False)
        elif indices is not None and (row := constant_row(self.context.model, indices, len(tensor.numpy()))) is not None:
            self.context.rows_of_all[node.outputs[0]] = np.asarray(tensor.numpy()[row], np.float32)

    def _position_shift(self, value: ir.Value | None) -> int | None:
        """n where `value` = position_ids + n."""
        if value is not None and value is self.context.inputs.get("position_ids"):
            return 0
        node = producer(value, "Add")
        for position, given in (node.inputs, node.inputs[::-1]) if node is not None else ():
            found, inner = scalar(given), self._position_shift(position)
            if found is not None and inner is not None:
                return inner + int(found)
        return None

    def where(self, node: ir.Node) -> None:
        """Rows of one kind for tokens inside a block (a picture's), 0 for tokens that see no picture, or stored places hidden."""
        condition, left, right = node.inputs
        if (filler := scalar(left)) is not None and is_weight(condition):
            self.rowwise.put_where(node, condition, filler, right)
        elif scalar(left) == 0 and condition is not None:
            self.rowwise.gate(node, right, condition, keeps_seeing=False)
        elif scalar(right) == 0 and condition is not None:
            self.rowwise.gate(node, left, condition)
        else:
            self._select(node)

    def _select(self, node: ir.Node) -> None:
        test = node.inputs[0]
        while test is not None and (found := producer(test, "Unsqueeze", "Cast")) is not None:
            test = found.inputs[0]
        inside = producer(test, "Greater")
        if inside is None or inside.inputs[0] is not self.context.inputs.get(BLOCK_IDS) or scalar(inside.inputs[1]) != 0:
            raise NotExpressible("a Where whose condition is not block_ids > 0")
        left, right = self.made.rows(node.inputs[1]), self.made.rows(node.inputs[2])
        if (left.width, left.last) != (right.width, right.last) or left.last:
            raise NotExpressible("a Where of unlike rows")
        ref = self.made.floats(left.width)
        self.made.add(Kind.SELECT, left.width, False, [left.ref, right.ref], [ref])
        self.made.define(node.outputs[0], ref, left.width, False)
