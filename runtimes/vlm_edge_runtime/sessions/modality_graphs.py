"""Running a modality's graphs: how inputs are put together into calls, and how each graph finds what it reads, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from vlm_edge_runtime.bundle.manifest import GraphEntry, TensorSpec
from vlm_edge_runtime.engines.base import Engine, Graph
from vlm_edge_runtime.errors import BundleError

from .media import Array, Encode, Features, Medium

IMAGES_PER_CALL = 8
TILES_PER_CALL = 4
"""Bounds the activations of one call: a 512 × 512 tile of 1,024 patches takes about 50 MB of attention scores."""

Arrays = dict[str, Array]
Between = Callable[[], None]


class ModalityGraphs:
    """The graphs of one modality, one after another; loaded on first use.

    Each takes what it names among the processor's arrays and earlier graphs' outputs. `keep`: names of arrays that are wanted
    beside the last graph's outputs.

    Images of equal shape share a call, except where activations are quantised on the fly: there the range is taken over the
    whole batch, and an image's features would depend on its neighbours.
    """

    def __init__(
        self, engine: Engine, graphs: Mapping[str, GraphEntry], roles: Sequence[str], keep: Collection[str] = ()
    ) -> None:
        self._engine = engine
        self._roles = tuple(roles)
        self._keep = frozenset(keep)
        missing = [role for role in roles if role not in graphs]
        if missing or not roles:
            raise BundleError(f"the bundle has no graph {', '.join(missing) or 'for a modality'}: export it again.")
        self._entries = {role: graphs[role] for role in roles}
        alone = any(entry.precision == "int8" for entry in self._entries.values())
        self._images_per_call = 1 if alone else IMAGES_PER_CALL

    def how(self, batch: str) -> Encode:
        """The way of running that a modality's `batch` names."""
        return {"image": self.per_image, "tile": self.per_tile, "patches": self.per_patches}[batch]

    def per_image(self, media: list[Medium], between: Between) -> list[Features]:
        """One row of the batch for each input; equal shapes together. Values are `[1, …]`."""
        order = sorted(range(len(media)), key=lambda i: _shapes(media[i]))
        found: dict[int, Features] = {}
        for _, same in groupby(order, key=lambda i: _shapes(media[i])):
            members = list(same)
            for start in range(0, len(members), self._images_per_call):
                chunk = members[start : start + self._images_per_call]
                between()
                arrays = _joined([arrays_of(media[i]) for i in chunk])
                for role in self._roles:
                    arrays |= self._run(role, arrays)
                values, others = self._taken(arrays)
                for name, array in {"": values, **others}.items():
                    if len(array) != len(chunk):
                        raise BundleError(
                            f"graph '{self._roles[-1]}' gave {len(array)} rows {name and f'of {name} '}for {len(chunk)} inputs: "
                            "the bundle is inconsistent."
                        )
                for row, i in enumerate(chunk):
                    one = slice(row, row + 1)
                    found[i] = Features(np.array(values[one]), {name: np.array(array[one]) for name, array in others.items()})
        return [found[i] for i in range(len(media))]

    def per_tile(self, media: list[Medium], between: Between) -> list[Features]:
        """The rows of a batch are the tiles of one image or the frames of one video, a few at a time where a graph looks at each

        by itself (its inputs and outputs all have one leading dimension). Values are `[tiles, …]`, or what the last graph makes
        of all tiles together.
        """
        found = []
        for medium in media:
            arrays = arrays_of(medium)
            for role in self._roles:
                if _looks_at_each(self._entries[role]):
                    arrays |= self._piecewise(role, arrays, between)
                else:
                    between()
                    arrays |= self._run(role, arrays)
            found.append(Features(*self._taken(arrays)))
        return found

    def per_patches(self, media: list[Medium], between: Between) -> list[Features]:
        """One image a call, or one time step of a video, as a row of patches of any length. Values are `[tokens, …]`."""
        found = []
        for medium in media:
            steps = medium.layout.grid[0] if medium.layout.grid else 1
            parts: list[Arrays] = []
            for arrays in _split(arrays_of(medium), steps):
                for role in self._roles:
                    between()
                    arrays |= self._run(role, arrays)
                values, others = self._taken(arrays)
                parts.append({"": values, **others})
            joined = _joined(parts)
            found.append(Features(joined.pop(""), joined))
        return found

    def _run(self, role: str, arrays: Mapping[str, Array]) -> Arrays:
        graph = self._engine.graph(role)
        return graph.run(wanted(role, graph.inputs, arrays))

    def _piecewise(self, role: str, arrays: Mapping[str, Array], between: Between) -> Arrays:
        graph: Graph = self._engine.graph(role)
        feeds = wanted(role, graph.inputs, arrays)
        tiles = {len(array) for array in feeds.values()}
        if len(tiles) != 1:
            raise BundleError(f"graph '{role}' reads arrays of {sorted(tiles)} tiles for one input: the bundle is inconsistent.")
        parts: list[Arrays] = []
        for start in range(0, tiles.pop(), TILES_PER_CALL):
            between()
            parts.append(graph.run({name: array[start : start + TILES_PER_CALL] for name, array in feeds.items()}))
        return _joined(parts)

    def _taken(self, arrays: Mapping[str, Array]) -> tuple[Array, Arrays]:
        """The last graph's first output, and the others that are wanted."""
        first, *further = (spec.name for spec in self._entries[self._roles[-1]].outputs)
        names = {*further, *(self._keep & arrays.keys())} - {first}
        return arrays[first], {name: arrays[name] for name in sorted(names)}


def wanted(role: str, inputs: Iterable[TensorSpec], given: Mapping[str, Array]) -> Arrays:
    """The inputs that a graph has, by name. Raises BundleError when one of them is not given."""
    specs = tuple(inputs)
    missing = [spec.name for spec in specs if spec.name not in given]
    if missing:
        raise BundleError(f"graph '{role}' wants {', '.join(missing)}; there is only {', '.join(given)}.")
    return {spec.name: given[spec.name] for spec in specs}


def arrays_of(medium: Medium) -> Arrays:
    """The processor's arrays of a medium, in a new dictionary."""
    assert medium.arrays is not None  # the store fills them before it encodes
    return dict(medium.arrays)


def _looks_at_each(entry: GraphEntry) -> bool:
    leading = {spec.shape[0] if spec.shape else 1 for spec in (*entry.inputs, *entry.outputs)}
    return len(leading) == 1 and all(isinstance(name, str) for name in leading)


def _shapes(medium: Medium) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in arrays_of(medium).items())


def _split(arrays: Arrays, steps: int) -> list[Arrays]:
    """The arrays of each time step, which follow one another along the first dimension."""
    if steps == 1:
        return [arrays]
    pieces = {name: np.split(array, steps) for name, array in arrays.items()}
    return [{name: parts[step] for name, parts in pieces.items()} for step in range(steps)]


def _joined(parts: list[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
