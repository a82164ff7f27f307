"""Running the vision graphs: how images are put together into calls, family by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import GraphEntry, Modality
from vlm_edge_runtime.engines.base import Array, Engine, Graph
from vlm_edge_runtime.errors import BundleError

from .images import Floats, Picture

IMAGES_PER_CALL = 8
TILES_PER_CALL = 4
"""Bounds the activations of one call: a 512 × 512 tile of 1,024 patches takes about 50 MB of attention scores."""

Pixels = dict[str, npt.NDArray[np.generic]]


class VisionGraphs:
    """`vision_encoder`, then `projector` where the family has one. Graphs are loaded on first use.

    Images of equal shape share a call, except where activations are quantised on the fly: there the range is taken over the
    whole batch, and an image's features would depend on its neighbours.
    """

    def __init__(self, engine: Engine, graphs: Mapping[str, GraphEntry], roles: tuple[str, ...]) -> None:
        self._engine = engine
        self._roles = roles
        alone = any(graphs[role].precision == "int8" for role in roles if role in graphs)
        self._images_per_call = 1 if alone else IMAGES_PER_CALL

    def per_image(self, pictures: list[Picture], between: Callable[[], None]) -> list[Floats]:
        """One row of the batch for each image; equal shapes together. Gives each image's row, without the batch dimension."""
        order = sorted(range(len(pictures)), key=lambda i: _shapes(pictures[i]))
        features: dict[int, Floats] = {}
        for _, same in groupby(order, key=lambda i: _shapes(pictures[i])):
            members = list(same)
            for start in range(0, len(members), self._images_per_call):
                chunk = members[start : start + self._images_per_call]
                between()
                rows = self._run(_joined([_arrays(pictures[i]) for i in chunk]))
                if len(rows) != len(chunk):
                    raise BundleError(
                        f"the vision graphs gave {len(rows)} rows for {len(chunk)} images: the bundle is inconsistent."
                    )
                features.update({i: np.array(row) for i, row in zip(chunk, rows, strict=True)})
        return [features[i] for i in range(len(pictures))]

    def per_tile(self, pictures: list[Picture], between: Callable[[], None]) -> list[Floats]:
        """The rows of a batch are the tiles of one image, a few at a time. Gives `[tiles · tokens per tile, hidden]`."""
        features = []
        for picture in pictures:
            parts = []
            for start in range(0, picture.layout.tiles, TILES_PER_CALL):
                between()
                chunk = {name: array[start : start + TILES_PER_CALL] for name, array in _arrays(picture).items()}
                rows = self._run(chunk)
                parts.append(rows.reshape(-1, rows.shape[-1]))
            features.append(np.concatenate(parts))
        return features

    def per_patches(self, pictures: list[Picture], between: Callable[[], None]) -> list[Floats]:
        """One image a call, as a row of patches of any length. Gives `[tokens, hidden]`."""
        features = []
        for picture in pictures:
            between()
            features.append(np.array(self._run(_arrays(picture))))
        return features

    def _run(self, feeds: Mapping[str, Array]) -> Floats:
        current: Mapping[str, Array] = feeds
        for role in self._roles:
            graph = self._engine.graph(role)
            current = graph.run(_wanted(role, graph, current))
        (output,) = current.values()
        return np.asarray(output, dtype=np.float32)


def feature_encoder(
    graphs: VisionGraphs, modality: Modality, hidden_size: int
) -> Callable[[list[Picture], Callable[[], None]], list[Floats]]:
    """How a modality encodes pictures: float32 `[image tokens, hidden]` for each."""
    run = {"image": graphs.per_image, "tile": graphs.per_tile, "patches": graphs.per_patches}[modality.batch]

    def encode(pictures: list[Picture], between: Callable[[], None]) -> list[Floats]:
        features = [np.ascontiguousarray(each.reshape(-1, each.shape[-1])) for each in run(pictures, between)]
        for each in features:
            if each.shape[-1] != hidden_size:
                raise BundleError(f"image features are {each.shape[-1]} wide, the decoder takes {hidden_size}.")
        return features

    return encode


def _arrays(picture: Picture) -> Pixels:
    assert picture.arrays is not None  # the store fills them before it encodes
    return picture.arrays


def _shapes(picture: Picture) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in _arrays(picture).values())


def _joined(parts: list[Pixels]) -> Pixels:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _wanted(role: str, graph: Graph, given: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs that the graph has, by name."""
    missing = [spec.name for spec in graph.inputs if spec.name not in given]
    if missing:
        raise BundleError(f"graph '{role}' wants {', '.join(missing)}; there is only {', '.join(given)}.")
    return {spec.name: given[spec.name] for spec in graph.inputs}
