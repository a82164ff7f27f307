"""Reading and editing onnx-ir graphs: the few verbs that all passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

MICROSOFT = "com.microsoft"
_SMALL = 4096
"""Constants up to this many elements are read by value; larger ones are weights and stay on the disk."""


def producer(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that computes `value` if it is one of these ops of this domain, else None."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != domain or (op_types and node.op_type not in op_types):
        return None
    return node


def consumers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, each once."""
    return list(dict.fromkeys(usage.node for usage in value.uses()))


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, or None when there are several, none, or it is a graph output as well."""
    if value.is_graph_output():
        return None
    found = consumers(value)
    return found[0] if len(found) == 1 and len(value.uses()) == 1 else None


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is a stored tensor (an initializer that the caller of the graph cannot replace)."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A small stored tensor as an array; None for weights and computed values."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        node = producer(value, "Constant")
        attribute = node.attributes.get("value") if node is not None else None
        tensor = attribute.as_tensor() if attribute is not None else None
    if tensor is None or tensor.size > _SMALL:
        return None
    return np.asarray(tensor.numpy())


def scalar(value: ir.Value | None) -> float | None:
    """The value of a one-element constant, else None."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions where known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def fixed_dim(value: ir.Value | None, axis: int) -> int | None:
    """The size of one dimension when it is a number known before the graph runs."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def same_shape(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether both shapes are known and provably equal: the same numbers, the same named dimensions."""
    if left is None or right is None or left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return False
    return all(_same_dim(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def _same_dim(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    if isinstance(left, int) or isinstance(right, int):
        return left == right
    return left.value is not None and left.value == right.value


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default when absent."""
    return node.attributes[name].as_int() if name in node.attributes else default


def attribute_float(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or its default when absent."""
    return node.attributes[name].as_float() if name in node.attributes else default


def attribute_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An attribute holding a list of integers, or None."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else None


def last_axis_slice(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(source, start, end) when `value` is source[..., start:end] by one Slice with stored bounds, else None."""
    node = producer(value, "Slice")
    if node is None or len(node.inputs) < 4:
        return None
    source, size, dims = node.inputs[0], fixed_dim(node.inputs[0], -1), rank(node.inputs[0])
    bounds = [constant(given) for given in node.inputs[1:]]
    if source is None or size is None or dims is None or any(given is None or given.size != 1 for given in bounds):
        return None
    start, end, axis, *step = (int(given.reshape(-1)[0]) for given in bounds if given is not None)
    if axis not in (-1, dims - 1) or step not in ([], [1]):
        return None
    start, end = (min(bound if bound >= 0 else bound + size, size) for bound in (start, end))
    return source, start, end


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol | npt.NDArray[Any]) -> ir.Value:
    """Stores a tensor under `name` (or `name_1`, … when taken) and returns its value."""
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    stored = ir.tensor(np.ascontiguousarray(tensor), name=unique) if isinstance(tensor, np.ndarray) else tensor
    value = ir.Value(
        name=unique, const_value=stored, type=ir.TensorType(stored.dtype), shape=ir.Shape(tuple(stored.shape.numpy()))
    )
    graph.register_initializer(value)
    return value


def lazy_tensor(name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], npt.NDArray[Any]]) -> ir.LazyTensor:
    """A stored tensor that is computed when it is written, and again if it is read; never kept."""

    def evaluate() -> ir.TensorProtocol:
        array = np.ascontiguousarray(make())
        if tuple(array.shape) != tuple(shape):
            raise ValueError(f"{name}: computed shape {array.shape}, announced {tuple(shape)}")
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
    name: str | None = None,
) -> ir.Node:
    """Creates a node just before another one, in the same graph."""
    graph = before.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"node {before.name} belongs to no graph")
    node = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
    graph.insert_before(before, node)
    if domain:
        graph.opset_imports.setdefault(domain, 1)
    return node


def like(value: ir.Value, pattern: ir.Value) -> ir.Value:
    """Gives `value` the type and shape of another one."""
    value.type, value.shape = pattern.type, pattern.shape
    return value


def typed(value: ir.Value, dtype: ir.DataType | None, shape: Iterable[int | str | ir.SymbolicDim | None]) -> ir.Value:
    """Gives `value` an element type and a shape."""
    value.type = ir.TensorType(dtype) if dtype is not None else None
    value.shape = ir.Shape(shape)
    return value


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Everything that read `old` reads `new`; a graph output keeps its public name."""
    was_output, name = old.is_graph_output(), old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if was_output:
        old.name = None if name is None else f"{name}.replaced"
        new.name = name


def remove_dead(graph: ir.Graph, *roots: ir.Node) -> int:
    """Removes these nodes and what only they needed, as far as nothing reads them. Returns how many went."""
    removed, todo = 0, list(roots)
    while todo:
        node = todo.pop()
        if node.graph is not graph or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        todo += [source for value in node.inputs if value is not None and (source := value.producer()) is not None]
        graph.remove(node, safe=True)
        removed += 1
    return removed
