"""Weights stored once: one data file beside all portable graphs, in which equal tensors share their bytes.

External data as ONNX defines it (`location`, `offset`, `length` per tensor); the location is relative to the model file, so
several models in one folder may read one file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

INLINE_BYTES = 1024
"""A tensor up to this size stays inside its model file: shapes, scalars, small norms."""

_ALIGN = 4096
"""Offsets are multiples of a memory page, so that a reader may map tensors straight from the file."""

_TRANSPOSE_BYTES = 64 << 10
"""Only matrices from this size are looked up as the transpose of a stored one."""


@dataclass(frozen=True, slots=True)
class _Stored:
    offset: int
    length: int
    shape: tuple[int, ...]


class WeightFile:
    """A growing data file. `with WeightFile(folder, name) as weights: weights.save(model, "decoder.onnx")`.

    `save` moves a model's large tensors into the data file and writes the model beside it. A tensor that is already there costs
    nothing; a matrix whose transpose is already there (tied `lm_head` and embedding table) becomes a `Transpose` of it.
    """

    def __init__(self, folder: Path, name: str = "weights.onnx.data") -> None:
        self._folder = folder
        self.path = folder / name
        self._stream = self.path.open("wb")
        self._known: dict[str, _Stored] = {}
        self._shapes: set[tuple[int, ...]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def save(self, model: ir.Model, file: str) -> bool:
        """Writes `model` as `file` in the folder, tensor by tensor. Returns whether it reads the data file at all."""
        reads = False
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE_BYTES:
                continue
            reads = True
            array = np.ascontiguousarray(tensor.numpy())
            key = _key(array, tensor.dtype)
            turned = self._turned(array, tensor.dtype) if key not in self._known else None
            if turned is not None:
                _read_transposed(model, value, self._external(turned, tensor, f"{value.name}.stored"))
                continue
            if key not in self._known:
                self._known[key] = self._append(array)
                self._shapes.add(tuple(array.shape))
            value.const_value = self._external(self._known[key], tensor, value.name)
        self._stream.flush()
        ir.save(model, self._folder / file)
        return reads

    def _append(self, array: np.ndarray) -> _Stored:
        offset = -(-self._stream.tell() // _ALIGN) * _ALIGN
        self._stream.write(b"\0" * (offset - self._stream.tell()))
        self._stream.write(array.reshape(-1).view(np.uint8).data)
        return _Stored(offset, array.nbytes, tuple(array.shape))

    def _turned(self, array: np.ndarray, dtype: ir.DataType) -> _Stored | None:
        """The stored matrix that `array` is the transpose of."""
        if array.ndim != 2 or array.nbytes < _TRANSPOSE_BYTES or tuple(array.shape[::-1]) not in self._shapes:
            return None
        return self._known.get(_key(np.ascontiguousarray(array.T), dtype))

    def _external(self, stored: _Stored, tensor: ir.TensorProtocol, name: str | None) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.path.name,
            stored.offset,
            stored.length,
            tensor.dtype,
            shape=ir.Shape(stored.shape),
            name=name or "",
            base_dir=self._folder,
        )


def _key(array: np.ndarray, dtype: ir.DataType) -> str:
    digest = hashlib.sha256(f"{dtype.name}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read_transposed(model: ir.Model, value: ir.Value, stored: ir.ExternalTensor) -> None:
    """Replaces an initializer by the transpose of a stored one."""
    source = ir.Value(name=stored.name, shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    model.graph.register_initializer(source)
    node = ir.node("Transpose", [source], {"perm": [1, 0]}, num_outputs=1, name=f"node_{stored.name}")
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    value.replace_all_uses_with(node.outputs[0])
    model.graph.initializers.pop(value.name or "")
    node.outputs[0].name = value.name
    first = next(iter(model.graph))
    model.graph.insert_before(first, node)
