"""Cancels pairs of layout nodes, so that passes may insert Transpose and Reshape freely around what they replace."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import attribute_int, attribute_ints, constant, like, only_consumer, producer, remove_dead, same_shape, substitute

_NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")


class CancelLayout(GraphPass):
    """Transpose after its own inverse, Reshape of a Reshape, and Reshape to the shape that is already there.

    A normalisation of the last axis does not care in which order the other axes come, so a Transpose and its inverse also
    cancel around one (Qwen 3's and Gemma 3's norms of queries and keys).

    A chain of Reshapes is one Reshape with the last shape, unless that shape copies dimensions from its input (a 0 with
    `allowzero=0`). Equality of shapes must be provable: the same numbers and the same named dimensions.
    """

    name: ClassVar[str] = "cancel_layout"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        again = True
        while again:
            again = False
            for node in list(model.graph):
                if node.graph is None or node.domain:
                    continue
                what = None
                if node.op_type == "Transpose":
                    what = _transpose(node)
                elif node.op_type == "Reshape":
                    what = _reshape(node)
                if what:
                    changes.add(what)
                    remove_dead(model.graph, node)
                    again = True
        return changes


def _transpose(node: ir.Node) -> str | None:
    inner, last = producer(node.inputs[0], "Transpose"), attribute_ints(node, "perm")
    if last is None:
        return None
    if last == tuple(range(len(last))):
        source = node.inputs[0]
    elif inner is None and (what := _around_norm(node, last)) is not None:
        return what
    else:
        first = attribute_ints(inner, "perm") if inner is not None else None
        if inner is None or first is None or [first[axis] for axis in last] != list(range(len(last))):
            return None
        source = inner.inputs[0]
    if source is None:
        return None
    substitute_kept(node.outputs[0], source)
    return "transposes" if not node.outputs[0].uses() else None


def _around_norm(node: ir.Node, last: tuple[int, ...]) -> str | None:
    """Transpose⁻¹(norm(Transpose(x))) → norm(x), for a norm of the last axis that nothing else reads."""
    norm = producer(node.inputs[0], *_NORMS)
    if norm is None or only_consumer(norm.outputs[0]) is not node or attribute_int(norm, "axis", -1) not in (-1, len(last) - 1):
        return None
    inner = producer(norm.inputs[0], "Transpose")
    first = attribute_ints(inner, "perm") if inner is not None else None
    if inner is None or first is None or last[-1] != len(last) - 1 or [first[axis] for axis in last] != list(range(len(last))):
        return None
    if node.outputs[0].is_graph_output() or inner.inputs[0] is None:
        return None
    norm.replace_input_with(0, inner.inputs[0])
    like(norm.outputs[0], inner.inputs[0])
    substitute(node.outputs[0], norm.outputs[0])
    remove_dead(inner.graph, inner) if isinstance(inner.graph, ir.Graph) else None
    return "transposes around a norm"


def _reshape(node: ir.Node) -> str | None:
    out, source = node.outputs[0], node.inputs[0]
    if source is None or out.is_graph_output():
        return None
    if same_shape(out, source):
        substitute(out, source)
        return "reshapes to the same shape"
    inner = producer(source, "Reshape")
    if inner is None or inner.inputs[0] is None:
        return None
    if same_shape(out, inner.inputs[0]):
        substitute(out, inner.inputs[0])
        return "reshapes there and back"
    if copies_dims(node):
        return None
    node.replace_input_with(0, inner.inputs[0])
    remove_dead(inner.graph, inner) if isinstance(inner.graph, ir.Graph) else None
    return "reshapes of reshapes"


def copies_dims(reshape: ir.Node) -> bool:
    """Whether a Reshape takes some dimension over from its input (a 0 in its shape while `allowzero` is off)."""
    if attribute_int(reshape, "allowzero", 0):
        return False
    shape = constant(reshape.inputs[1])
    return shape is None or bool((shape == 0).any())


def substitute_kept(old: ir.Value, new: ir.Value) -> None:
    """Like `substitute`, but leaves graph outputs alone (a graph input cannot take an output's name)."""
    if not old.is_graph_output():
        substitute(old, new)
