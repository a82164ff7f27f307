"""Host arrays as a compiled graph takes them: int32 where the portable graph has int64, float16 where the build has."""

from __future__ import annotations

import numpy as np

from vlm_edge_runtime.errors import DeviceError

from .base import Array

_INT32 = np.iinfo(np.int32)


def as_taken(name: str, array: Array, dtype: str) -> Array:
    """A C-contiguous array of type `dtype`. Raises TypeError for another kind of number, DeviceError where int32 is too small."""
    given, wanted = array.dtype, np.dtype(dtype)
    if given == wanted:
        return np.ascontiguousarray(array).reshape(array.shape)
    if given.kind in "iu" and wanted == np.int32:
        if array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
            raise DeviceError(f"'{name}' has values outside int32, which is what this build takes.")
    elif given.kind != wanted.kind:
        raise TypeError(f"{name} is {given}, expected {wanted}")
    return np.ascontiguousarray(array, dtype=wanted).reshape(array.shape)


def size_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
