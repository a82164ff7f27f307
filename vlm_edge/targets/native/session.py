"""A plan where a graph is expected: run on arrays, to be compared with the graph it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.native_ort import open_sizes

from .builder import SCALE
from .cache_codes import coded, decoded

SUFFIX = ".plan"
_TYPES = {"float32": "float", "float64": "double"}


@dataclass(slots=True, frozen=True)
class Argument:
    """An input or output as ONNX Runtime describes one."""

    name: str
    type: str
    shape: list[int | str]


class PlanSession:
    """What comparisons need of `onnxruntime.InferenceSession`, over a plan."""

    def __init__(self, path: Path, *, threads: int = 1, kernels: str | None = None) -> None:
        """`kernels`: an instruction set by name, None for the best. Raises DeviceError for a file that is no plan."""
        self._session = _native.Session(str(path), path.stem, threads=threads, spin=False, plan=True, kernels=kernels)
        self._dtypes = {name: dtype for name, dtype, _ in self._session.inputs}

    def get_inputs(self) -> list[Argument]:
        """Inputs in the plan's order."""
        return _arguments(self._session.inputs)

    def get_outputs(self) -> list[Argument]:
        """Outputs in the plan's order."""
        return _arguments(self._session.outputs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The named outputs (None: all). Caches are given and returned whole, and copied; floats are cast to the plan's type.

        Caches in 8 bits are floats here, as if there were no codes; their scales (`…_scale`) are hidden.
        """
        given = self._given(feeds)
        wanted = names if names is not None else [one.name for one in self.get_outputs()]
        if self._session.together:
            return self._run_graph(given, wanted)
        if "seqlens_k" not in self._dtypes:
            return [self._rows(given["input_ids"])]
        found = _native.plan_step(self._session, given)
        arrays = {name: np.frombuffer(data, dtype).reshape(shape) for name, (data, dtype, shape) in found.items()}
        return [decoded(arrays[name], arrays[name + SCALE]) if name + SCALE in arrays else arrays[name] for name in wanted]

    def _given(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        given: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in self._dtypes.items():
            if name + SCALE in self._dtypes:
                given[name], given[name + SCALE] = coded(feeds[name])
            elif name not in given:
                given[name] = np.ascontiguousarray(feeds[name], dtype=dtype)
        return given

    def _rows(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        ((_, _, shape),) = self._session.outputs
        rows = np.empty((*tokens.shape, int(shape[2])), np.float32)
        _native.rows_run(self._session, tokens, rows)
        return rows

    def _run_graph(self, given: Mapping[str, npt.NDArray[Any]], wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        first, each = next(iter(given)), self._session.together
        images = len(given[first]) // each[first]
        found = self._session.outputs
        lengths = open_sizes(((name, shape) for name, _, shape in self._session.inputs), given)
        sizes = {name: [size if isinstance(size, int) else lengths[size] for size in shape[1:]] for name, _, shape in found}
        outputs = {name: np.empty((images * each[name], *sizes[name]), dtype) for name, dtype, _ in found}
        _native.graph_run(self._session, given, outputs)
        return [outputs[name] for name in wanted]


def _arguments(found: Sequence[tuple[str, str, Sequence[int | str]]]) -> list[Argument]:
    names = {name for name, _, _ in found}
    hidden = {name + SCALE for name in names}
    types = {name: "float32" if name + SCALE in names else dtype for name, dtype, _ in found}
    return [
        Argument(name, f"tensor({_TYPES.get(types[name], types[name])})", list(shape))
        for name, _, shape in found
        if name not in hidden
    ]
