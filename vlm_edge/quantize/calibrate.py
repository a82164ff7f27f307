"""Activation ranges from real inputs: the fp32 graph is run on them and the inputs of its matrix products are watched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

Method = Literal["minmax", "percentile", "mse"]
_BINS = 2048


class Histogram:
    """Magnitudes of one tensor over all inputs, in bins whose range doubles when a larger value comes."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, values: npt.NDArray[Any]) -> None:
        """Counts the magnitudes of an array. Raises ValueError when it holds NaN or infinity."""
        magnitude = np.abs(np.asarray(values, np.float32)).reshape(-1)
        top = float(magnitude.max(initial=0.0))
        if not np.isfinite(top):
            raise ValueError("an activation is NaN or infinite")
        self.largest = max(self.largest, top)
        if self.limit == 0.0:
            if top == 0.0:
                return
            self.limit = top
        while top > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)])
            self.limit *= 2
        self.counts += np.histogram(magnitude, bins=_BINS, range=(0.0, self.limit))[0]

    def threshold(self, method: Method, *, bits: int = 8, percentile: float = 99.99) -> float:
        """The magnitude that the largest code stands for (larger values are clipped).

        `minmax`: the largest seen. `percentile`: that share of all values is not clipped. `mse`: least expected squared
        error of clipping plus rounding (rounding error is taken as uniform, step²/12). 1.0 for a tensor of zeros.
        """
        if self.largest == 0.0:
            return 1.0
        width = self.limit / _BINS
        if method == "minmax":
            return self.largest
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            return min(self.largest, float(np.searchsorted(share, percentile / 100) + 1) * width)
        centres = (np.arange(_BINS) + 0.5) * width
        levels = 2 ** (bits - 1) - 1
        candidates = self.largest * np.linspace(0.2, 1.0, 81)
        clipped = np.array([(self.counts * np.square(np.maximum(centres - limit, 0))).sum() for limit in candidates])
        rounding = np.square(candidates / levels) / 12 * self.counts.sum()
        return float(candidates[int(np.argmin(clipped + rounding))])


def activation_histograms(
    model: ir.Model, names: Iterable[str], inputs: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, Histogram]:
    """Runs the fp32 graph on each of `inputs` and returns the histogram of each named value.

    Raises ValueError when `inputs` is empty.
    """
    histograms: dict[str, Histogram] = {}
    for found in watched_values(model, names, inputs):
        for name, values in found.items():
            histograms.setdefault(name, Histogram()).add(values)
    return histograms


def channel_maxima(
    model: ir.Model, names: Iterable[str], inputs: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, npt.NDArray[np.float32]]:
    """The largest magnitude of each channel (index of the last axis) of each named value: float32 [channels].

    Raises ValueError when `inputs` is empty.
    """
    maxima: dict[str, npt.NDArray[np.float32]] = {}
    for found in watched_values(model, names, inputs):
        for name, values in found.items():
            top = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0, initial=0.0).astype(np.float32)
            maxima[name] = np.maximum(maxima[name], top) if name in maxima else top
    return maxima


def channel_means(
    model: ir.Model, names: Iterable[str], inputs: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, npt.NDArray[np.float32]]:
    """The mean of each channel (index of the last axis) of each named value over all rows of all inputs: float32 [channels].

    Raises ValueError when `inputs` is empty.
    """
    sums: dict[str, npt.NDArray[np.float64]] = {}
    rows: dict[str, int] = {}
    for found in watched_values(model, names, inputs):
        for name, values in found.items():
            flat = values.reshape(-1, values.shape[-1])
            sums[name] = sums.get(name, np.zeros(values.shape[-1])) + flat.sum(axis=0, dtype=np.float64)
            rows[name] = rows.get(name, 0) + len(flat)
    return {name: (total / max(rows[name], 1)).astype(np.float32) for name, total in sums.items()}


def watched_values(
    model: ir.Model, names: Iterable[str], inputs: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The named values of the fp32 graph, for each of `inputs`; names that the graph does not have are left out.

    The graph is written to a temporary folder with those values as outputs, and is left as it was. Raises ValueError when
    `inputs` is empty.
    """
    values = {str(out.name): out for node in model.graph for out in node.outputs}
    values |= {str(value.name): value for value in model.graph.inputs}
    wanted = [name for name in dict.fromkeys(names) if name in values]
    watched = [name for name in wanted if not values[name].is_graph_input() and not values[name].is_graph_output()]
    before = list(model.graph.outputs)
    with tempfile.TemporaryDirectory(prefix="vlm-edge-calibration-") as folder:
        path = Path(folder) / "graph.onnx"
        try:
            model.graph.outputs.extend(values[name] for name in watched)
            ir.save(model, path, external_data="graph.onnx.data")
        finally:
            model.graph.outputs.clear()
            model.graph.outputs.extend(before)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        fetched = [name for name in wanted if not values[name].is_graph_input()]
        runs = 0
        for feeds in inputs:
            found = dict(zip(fetched, session.run(fetched, dict(feeds)), strict=True)) if fetched else {}
            yield {name: found[name] if name in found else np.asarray(feeds[name]) for name in wanted}
            runs += 1
    if not runs:
        raise ValueError("no calibration inputs")
