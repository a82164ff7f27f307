"""Graphs that take host arrays and give host arrays: vision encoder, projector, text encoder and all others but the decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .ort_cuda_place import Place
from .ort_cuda_program import specs_of, widened


class OrtGraph:
    """One graph in a session of a place. Half precision is its own affair: it takes and gives float32 in its stead."""

    def __init__(self, place: Place, session: _native.Session, role: str, record: Callable[[float], None]) -> None:
        self.role = role
        self._session, self._place, self._record = session, place, record
        self._real = {name: dtype for name, dtype, _ in session.inputs}
        self.inputs = widened(specs_of(session.inputs, role))
        self.outputs = widened(specs_of(session.outputs, role))
        self._closed = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the named inputs. Raises DeviceError naming the graph."""
        if self._closed:
            raise DeviceError(f"graph '{self.role}' is closed")
        given = {name: _as_given(array, self._real.get(name)) for name, array in feeds.items()}
        begin = time.perf_counter()
        with self._place.lock:
            self._place.device.use()
            found = self._session.run(given)
        self._record(time.perf_counter() - begin)
        return {name: _as_float32(np.asarray(tensor)) for name, tensor in found.items()}

    def close(self) -> None:
        """Frees the session."""
        self._closed = True
        self._session.close()


def _as_given(array: Array, wanted: str | None) -> Array:
    """Contiguous, and in half precision where the graph takes that. Other types are ONNX Runtime's to refuse."""
    if wanted == "float16" and array.dtype == np.float32:
        array = array.astype(np.float16)
    return np.ascontiguousarray(array) if array.ndim else array


def _as_float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array
