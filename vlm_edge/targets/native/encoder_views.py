"""Values of one image as places of numbers: what only moves them (Reshape, Transpose, Slice …) is done when a plan is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.evaluate import session_of
from vlm_edge.passes.graph import attribute_int, attribute_ints

from .errors import NotExpressible
from .plan_file import Buffer

_SHIFT = 40
"""Bits of a place that count numbers inside its source; those above say which source it is."""

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]


class View:
    """A value that is computed: where each of its numbers lies, in the value's shape for a single image.

    Rows that lie in one buffer as they are, from a column on, are told by where the first is and how far apart they lie.
    """

    __slots__ = ("_places", "first", "shape", "stride")

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places
        self.shape: tuple[int, ...] = places.shape
        self.first = self.stride = 0

    @classmethod
    def of_rows(cls, first: int, stride: int, shape: tuple[int, ...]) -> View:
        """Rows of `shape[-1]` numbers, `stride` apart."""
        made = cls.__new__(cls)
        made._places, made.first, made.stride, made.shape = None, first, stride, shape
        return made

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape))

    @property
    def places(self) -> Places:
        """In the value's shape; made when asked for where it is rows as they are."""
        if self._places is not None:
            return self._places
        rows = np.arange(self.size // self.shape[-1], dtype=np.int64)[:, None] * self.stride
        return (self.first + rows + np.arange(self.shape[-1], dtype=np.int64)).reshape(self.shape)

    def start(self, width: int) -> int | None:
        """The first place, where the view is rows of `width` numbers as they are."""
        return self.first if self._places is None and self.shape[-1] == width else None

    def sources(self) -> list[int]:
        """The numbers of the sources it lies in."""
        return [self.first >> _SHIFT] if self._places is None else [int(one) for one in np.unique(self._places >> _SHIFT)]


Known = View | Array
"""What a value is: a view of what is computed, or a constant."""


@dataclass(slots=True)
class Sources:
    """What places lead to: buffers of the plan, and constants."""

    found: list[Buffer | Array] = field(default_factory=list)

    def view(self, source: Buffer | Array, shape: tuple[int, ...]) -> View:
        """A new source, all of it, in that shape."""
        self.found.append(source)
        return View.of_rows(len(self.found) - 1 << _SHIFT, shape[-1] if shape else 1, shape or (1,))

    def columns(self, buffer: Buffer, column: int, shape: tuple[int, ...]) -> View:
        """A new source, of which each row gives `shape[-1]` numbers from a column on."""
        self.found.append(buffer)
        return View.of_rows((len(self.found) - 1 << _SHIFT) + column, buffer.width, shape)

    def whole(self, view: View, width: int) -> tuple[Buffer, int] | None:
        """(buffer, column) where the view's rows of `width` numbers are those of one buffer, from a column on, in order."""
        rows, start = view.size // width, view.start(width)
        places = None if start is not None else view.places.reshape(rows, width)
        first = start if start is not None else int(view.places.reshape(-1)[0])
        source, column = self.found[first >> _SHIFT], first & ((1 << _SHIFT) - 1)
        if not isinstance(source, Buffer) or source.rows != rows or column + width > source.width:
            return None
        if places is not None:
            wanted = first + np.arange(rows)[:, None] * source.width + np.arange(width)
            if not np.array_equal(places, wanted):
                return None
        return source, column

    def runs(self, view: View) -> list[tuple[Buffer | Array, int, npt.NDArray[np.int32]]]:
        """(source, length, [pairs, 2]) for each source of a view: where so many numbers that follow each other go to, and

        where they lie.
        """
        flat = view.places.reshape(-1)
        edges = np.flatnonzero(np.diff(flat) != 1) + 1
        begins = np.concatenate([[0], edges])
        lengths = np.diff(np.concatenate([begins, [len(flat)]]))
        numbers = flat[begins] >> _SHIFT
        found = []
        for number in np.unique(numbers):
            own = numbers == number
            length = int(np.gcd.reduce(lengths[own]))
            starts = [
                (int(begin) + step, int(flat[begin] & ((1 << _SHIFT) - 1)) + step)
                for begin, size in zip(begins[own], lengths[own], strict=True)
                for step in range(0, int(size), length)
            ]
            found.append((self.found[int(number)], length, np.asarray(starts, np.int32)))
        return found


def folded(node: ir.Node, given: list[Array | None], opsets: dict[str, int]) -> list[Array]:
    """The outputs of a node whose inputs are all constants."""
    inputs = [
        None if one is None else ir.Value(name=f"in{i}", const_value=ir.tensor(one, name=f"in{i}")) for i, one in enumerate(given)
    ]
    for value, array in zip(inputs, given, strict=True):
        if value is not None and array is not None:
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)  # type: ignore[union-attr]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    copy = ir.node(node.op_type, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs))
    for i, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
        new.name, new.type = f"out{i}", old.type
    graph = ir.Graph([], [], nodes=[copy], name="folded", opset_imports=opsets)
    for value in inputs:
        if value is not None:
            graph.register_initializer(value)
    graph.outputs.extend(new for old, new in zip(node.outputs, copy.outputs, strict=True) if old.name)
    return [np.asarray(one) for one in session_of(ir.Model(graph, ir_version=10)).run(None, {})]


def moved(node: ir.Node, x: View, given: list[Array | None]) -> list[View] | None:
    """The outputs of a node that only moves the numbers of its first input; None for other nodes.

    `given`: the constants among its inputs. Raises NotExpressible for a form that is not known.
    """
    places, op = x.places, node.op_type
    if node.domain:
        return None
    if op == "Identity":
        return [View(places)]
    if op == "Reshape":
        return [View(_reshaped(places, _needed(node, given, 1), attribute_int(node, "allowzero", 0)))]
    if op == "Flatten":
        axis = attribute_int(node, "axis", 1)
        return [View(places.reshape(int(np.prod(places.shape[:axis])), -1))]
    if op == "Transpose":
        return [View(np.transpose(places, attribute_ints(node, "perm")))]
    if op == "Unsqueeze":
        return [View(np.expand_dims(places, tuple(int(axis) for axis in _needed(node, given, 1))))]
    if op == "Squeeze":
        axes = given[1] if len(given) > 1 else None
        return [View(np.squeeze(places, None if axes is None else tuple(int(axis) for axis in axes)))]
    if op == "Slice":
        return [View(_sliced(node, places, given))]
    if op == "Gather":
        return [View(np.take(places, _needed(node, given, 1), axis=attribute_int(node, "axis", 0)))]
    if op == "Expand":
        shape = np.broadcast_shapes(places.shape, tuple(int(size) for size in _needed(node, given, 1)))
        return [View(np.broadcast_to(places, shape))]
    if op == "Tile":
        return [View(np.tile(places, tuple(int(times) for times in _needed(node, given, 1))))]
    if op == "Split":
        return _split(node, places, given)
    return None


def _needed(node: ir.Node, given: list[Array | None], index: int) -> Array:
    found = given[index] if index < len(given) else None
    if found is None:
        raise NotExpressible(f"{node.op_type} by what is computed")
    return found


def _reshaped(places: Places, shape: Array, allow_zero: int) -> Places:
    sizes = [int(size) for size in shape]
    if not allow_zero:
        sizes = [places.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return places.reshape(sizes)


def _sliced(node: ir.Node, places: Places, given: list[Array | None]) -> Places:
    starts, ends = (_needed(node, given, index) for index in (1, 2))
    axes = given[3] if len(given) > 3 and given[3] is not None else np.arange(len(starts))
    steps = given[4] if len(given) > 4 and given[4] is not None else np.ones(len(starts), np.int64)
    chosen = [slice(None)] * places.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise NotExpressible("a Slice that goes backwards")
        chosen[int(axis)] = slice(int(start), int(end), int(step))
    return places[tuple(chosen)]


def _split(node: ir.Node, places: Places, given: list[Array | None]) -> list[View]:
    axis, sizes = attribute_int(node, "axis", 0), given[1] if len(given) > 1 else None
    if sizes is None:  # the last one may be smaller
        each = -(-places.shape[axis] // len(node.outputs))
        sizes = np.full(len(node.outputs), each)
    return [View(part) for part in np.split(places, np.cumsum(sizes)[:-1], axis=axis)]
