"""Inputs to try a graph on: random where the values do not matter, real pictures where they do (calibration)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

from vlm_edge_runtime.bundle.manifest import GenerativeContract, Modality, TensorSpec
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import TargetError, VlmEdgeError

from .id_limits import id_limits

Feeds = dict[str, npt.NDArray[Any]]

PAST, STATE = "past_key_values.", "state."
_ROWS = ("batch", "images", "tiles", "frames", "texts", "rows", "videos", "clips")
"""Dimensions that count independent rows."""
_LENGTHS = {"sequence": 6, "tokens": 6, "length": 6, "instruction": 5, "source": 6, "queries": 4}
_TYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
"""What a graph of a build takes in another type than the portable one."""
_IMAGES_A_ROW = 2
"""Images in the memory of a row whose tokens see images of their own."""
_IDS = 20
"""Whole numbers that index nothing in sight are drawn below this."""


def session(path: Path) -> ort.InferenceSession:
    """A CPU session of a graph on disk, or of a decoder's plan."""
    if path.suffix == ".plan":
        from .native.session import PlanSession

        return PlanSession(path)  # what is used of a session, it has
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(graph: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]) -> Feeds:
    """All outputs by name. Feeds that the graph does not take are left out; those of another type are cast to what it takes."""
    taken = {value.name: _TYPES.get(value.type) for value in graph.get_inputs()}
    names = [out.name for out in graph.get_outputs()]
    given = {name: array.astype(taken[name] or array.dtype, copy=False) for name, array in feeds.items() if name in taken}
    return dict(zip(names, graph.run(names, given), strict=True))


class Samples:
    """Random inputs for the portable graphs of a bundle.

    What an earlier graph gives is what that graph makes of random inputs of its own, so that its scale is the model's. Where the
    first graph of an image takes more than pixels (grids, aspect ratios, window orders), they come from the bundle's image
    processor, on a small drawn picture. Token ids stay inside the tables they index. The same seed gives the same inputs.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._outputs: dict[tuple[str, int, int], Feeds] = {}
        self._limits: dict[str, dict[str, int]] = {}

    def inputs(self, role: str, *, seed: int = 0, rows: int = 2) -> Feeds:
        """Inputs of any graph but the decoder, by its signature. Raises TargetError when the graphs do not fit together."""
        return self._inputs(role, seed, rows, ())

    def decoder(self, *, sequence: int, past: int, rows: int = 1, padding: int = 0, seed: int = 0) -> Feeds:
        """One step of the portable decoder: `sequence` random tokens after `past` random cache entries.

        The first of several rows begins with `padding` padded entries. Raises TargetError for a bundle without a decoder.
        """
        bundle = self._bundle
        contract = bundle.manifest.contract
        if not isinstance(contract, GenerativeContract):
            raise TargetError(f"{bundle.path}: family {bundle.manifest.family} has no decoder to sample.")
        entry, random = bundle.graphs["decoder"], np.random.default_rng(seed)
        ids = random.integers(0, contract.vocab_size, (rows, sequence)).astype(np.int64)
        ids = np.minimum(ids, self._limit("embed_tokens").get("input_ids", contract.vocab_size) - 1)
        mask = np.ones((rows, past + sequence), np.int64)
        mask[0, :padding] = 0
        feeds: Feeds = {"inputs_embeds": self._run("embed_tokens", {"input_ids": ids})["inputs_embeds"], "attention_mask": mask}
        sizes = {"batch": rows, "sequence": sequence, "past": past, "total": past + sequence}
        known = self._known("decoder", seed, rows, ())
        for spec in entry.inputs:
            if spec.name == "position_ids":
                feeds[spec.name] = _positions(mask, past, axes=len(spec.shape))
            elif spec.name.startswith(PAST):
                feeds[spec.name] = random.standard_normal(_shape(spec, sizes, rows)).astype(np.float32)
            elif spec.name in known:
                feeds[spec.name] = known[spec.name]
                _bind(spec, known[spec.name], sizes, "decoder")
        if contract.memory is not None and contract.memory.entries_per_image and "source" in sizes:
            sizes["images"] = sizes["source"] // contract.memory.entries_per_image
        kinds = {one.name: one.kind for one in contract.token_inputs}
        for spec in entry.inputs:
            if spec.name not in feeds:
                shape = _shape(spec, sizes, rows)
                kind = kinds.get(spec.name)
                feeds[spec.name] = (
                    _token_values(kind, shape, spec, random)
                    if kind is not None
                    else _values(spec, shape, random, self._limit("decoder").get(spec.name))
                )
        return feeds

    def _inputs(self, role: str, seed: int, rows: int, above: tuple[str, ...]) -> Feeds:
        entry, random = self._bundle.graphs[role], np.random.default_rng(seed)
        known = self._known(role, seed, rows, above)
        sizes: dict[str, int] = {"patches": 8 * self._merge() ** 2}
        feeds: Feeds = {}
        for spec in entry.inputs:
            if spec.name in known:
                feeds[spec.name] = known[spec.name]
                sizes.pop("patches", None)
                _bind(spec, known[spec.name], sizes, role)
        for spec in entry.inputs:
            if spec.name not in feeds:
                feeds[spec.name] = _values(spec, _shape(spec, sizes, rows), random, self._limit(role).get(spec.name))
        return feeds

    def _known(self, role: str, seed: int, rows: int, above: tuple[str, ...]) -> Feeds:
        """What earlier graphs and the image processor give, among the inputs of a graph."""
        bundle, contract = self._bundle, self._bundle.manifest.contract
        wanted = {spec.name for spec in bundle.graphs[role].inputs}
        if role == "decoder":  # what tokens have is made by itself, under names that earlier graphs use too
            wanted = {spec.name for spec in bundle.graphs[role].inputs if not {"sequence", "total"} & set(spec.shape)}
        modality, before = None, [other for other in bundle.graphs if other not in (role, "decoder", *above)]
        if isinstance(contract, GenerativeContract):
            modality = next((one for one in contract.modalities if role in one.graphs), None)
        if modality is not None:
            before = modality.graphs[: modality.graphs.index(role)]
        found: Feeds = {}
        for other in before:
            if wanted & {spec.name for spec in bundle.graphs[other].outputs}:
                given = self._outputs_of(other, seed, rows, (*above, role))
                found |= {name: array for name, array in given.items() if name in wanted}
        if "encoder_hidden_states" in wanted - found.keys() and (memory := self._memory(seed, rows, (*above, role))) is not None:
            found["encoder_hidden_states"] = memory
        if modality is not None and modality.kind == "image" and wanted - found.keys() - {"pixel_values"}:
            arrays = self._picture(modality)
            found |= {name: array for name, array in arrays.items() if name in wanted and name not in found}
        return found

    def _outputs_of(self, role: str, seed: int, rows: int, above: tuple[str, ...]) -> Feeds:
        key = (role, seed, rows)
        if key not in self._outputs:
            self._outputs[key] = self._run(role, self._inputs(role, seed, rows, above))
        return self._outputs[key]

    def _memory(self, seed: int, rows: int, above: tuple[str, ...]) -> npt.NDArray[Any] | None:
        """The features that join as memory, as rows of `[batch, source, hidden]`."""
        contract = self._bundle.manifest.contract
        if not isinstance(contract, GenerativeContract) or contract.memory is None or contract.memory.source != "features":
            return None
        modality = next((one for one in contract.modalities if one.joins == "memory"), None)
        if modality is None or modality.graphs[-1] in above:
            return None
        images = _IMAGES_A_ROW if contract.memory.entries_per_image else 1
        features = next(iter(self._outputs_of(modality.graphs[-1], seed, rows * images, above).values()))
        if modality.batch != "image":
            return np.repeat(features.reshape(1, -1, features.shape[-1]), rows, axis=0)
        return features[np.arange(rows * images) % len(features)].reshape(rows, -1, features.shape[-1])

    def _picture(self, modality: Modality) -> Feeds:
        """The processor's arrays of a small drawn picture; nothing where the bundle has no image processor."""
        if not self._bundle.has_file("preprocessor_config.json"):
            return {}
        with contextlib.suppress(VlmEdgeError):  # a processor that is not known here: the signature has to do
            return picture_arrays(self._bundle, modality, _drawn())
        return {}

    def _merge(self) -> int:
        """How many patches, along each side of a square, become one token."""
        contract = self._bundle.manifest.contract
        found = contract.modalities if isinstance(contract, GenerativeContract) else []
        return max((getattr(one.placeholder, "merge_size", 1) for one in found), default=1)

    def _limit(self, role: str) -> dict[str, int]:
        if role not in self._limits:
            self._limits[role] = id_limits(self._bundle.graph_path(role))
        return self._limits[role]

    def _run(self, role: str, feeds: Feeds) -> Feeds:
        if role not in self._sessions:
            self._sessions[role] = session(self._bundle.graph_path(role))
        try:
            return run_graph(self._sessions[role], feeds)
        except Exception as error:  # onnxruntime raises bare Exceptions of its own
            said = " ".join(str(error).split())[:300]
            raise TargetError(f"{self._bundle.path}: the portable {role} refuses its sample inputs: {said}") from error


def picture_arrays(bundle: Bundle, modality: Modality, picture: str | Path | Image.Image) -> Feeds:
    """A picture as the graphs of an image modality take it, preprocessed as the runtime would."""
    from vlm_edge_runtime.preprocess import load_image_processor
    from vlm_edge_runtime.sessions.packing import geometry_arrays

    processor = load_image_processor(
        bundle.read_json("preprocessor_config.json"),
        bundle.read_json("processor_config.json") if bundle.has_file("processor_config.json") else None,
    )
    encoded = processor(picture)
    arrays = encoded.arrays | geometry_arrays(modality.geometry, encoded)
    return {name: np.asarray(array) for name, array in arrays.items()}


def modality_feeds(bundle: Bundle, role: str, pictures: Sequence[str | Path | Image.Image]) -> Iterator[Feeds]:
    """Inputs of one graph of an image modality for each picture, through the portable graphs before it.

    What pictures do not say (the text of an instruction) is random. Raises TargetError when something is missing.
    """
    contract = bundle.manifest.contract
    found = contract.modalities if isinstance(contract, GenerativeContract) else []
    modality = next((one for one in found if role in one.graphs), None) or Modality(graphs=[role], batch="image")
    earlier = modality.graphs[: modality.graphs.index(role)]
    sessions = {other: session(bundle.graph_path(other)) for other in earlier}
    limits = {other: id_limits(bundle.graph_path(other)) for other in (*earlier, role)}
    random = np.random.default_rng(0)
    for picture in pictures:
        known = picture_arrays(bundle, modality, picture)
        for other in earlier:
            known |= run_graph(sessions[other], _completed(bundle, other, known, limits[other], random))
        yield _completed(bundle, role, known, limits[role], random)


def _completed(bundle: Bundle, role: str, known: Feeds, limits: dict[str, int], random: np.random.Generator) -> Feeds:
    specs, sizes = bundle.graphs[role].inputs, dict[str, int]()
    for spec in specs:
        if spec.name in known:
            _bind(spec, known[spec.name], sizes, role)
    missing = [spec for spec in specs if spec.name not in known]
    if len(missing) == len(specs) or any("float" in spec.dtype for spec in missing):
        names = ", ".join(spec.name for spec in missing)
        raise TargetError(f"{bundle.path}: a picture gives {', '.join(known)}; {role} also needs {names}.")
    return {spec.name: known[spec.name] for spec in specs if spec.name in known} | {
        spec.name: _values(spec, _shape(spec, sizes, 1), random, limits.get(spec.name)) for spec in missing
    }


def _drawn() -> Image.Image:
    x, y = np.linspace(0, 255, 64)[None], np.linspace(0, 255, 48)[:, None]
    return Image.fromarray(np.stack([x + 0 * y, 0 * x + y, (x * y) % 256], axis=-1).astype(np.uint8))


def _bind(spec: TensorSpec, array: npt.NDArray[Any], sizes: dict[str, int], role: str) -> None:
    """Takes over the sizes of named dimensions. Raises TargetError for an array that does not fit."""
    fits = array.ndim == len(spec.shape)
    for dim, size in zip(spec.shape, array.shape, strict=False):
        fits &= sizes.setdefault(dim, size) == size if isinstance(dim, str) else dim == size
    if not fits:
        raise TargetError(f"{role} takes {spec.name} {list(spec.shape)}, the graphs before it give {list(array.shape)}.")


def _shape(spec: TensorSpec, sizes: Mapping[str, int], rows: int) -> tuple[int, ...]:
    rows = next((sizes[dim] for dim in _ROWS if dim in sizes), rows)  # rows of one kind go with rows of another
    return tuple(
        dim if isinstance(dim, int) else sizes.get(dim, rows if dim in _ROWS else _LENGTHS.get(dim, 2)) for dim in spec.shape
    )


def _values(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator, limit: int | None) -> npt.NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    if spec.name.endswith("mask"):
        mask = np.ones(shape, dtype)
        if mask.ndim == 2 and shape[1] > 2 and dtype != np.float32:
            mask[1:, -1] = 0  # rows after the first are one shorter
        return mask
    if np.issubdtype(dtype, np.integer):
        most = _IDS if limit is None else limit
        return random.integers(min(1, most - 1), most, shape).astype(dtype)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    return random.standard_normal(shape).astype(dtype)


def _token_values(kind: str, shape: tuple[int, ...], spec: TensorSpec, random: np.random.Generator) -> npt.NDArray[Any]:
    """What tokens have: two blocks of neighbours, images that some see, features."""
    dtype = np.dtype(spec.dtype)
    if kind == "blocks":
        ids = np.zeros(shape, dtype)
        if shape[1] > 1:
            half = shape[1] // 2
            ids[:, 1 : half + 1] = 1
            ids[:, half + 2 :] = 2
        return ids
    if kind == "media":  # the first of several tokens sees none, the last one at least the first image
        seen = (random.random(shape) < 0.7).astype(dtype)
        seen[:, 0] = 0
        seen[:, -1, 0] = 1
        return seen
    return random.standard_normal(shape).astype(dtype)


def _positions(mask: npt.NDArray[np.int64], past: int, *, axes: int) -> npt.NDArray[np.int64]:
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, past:]
    if axes == 3:
        positions = np.stack([positions, positions + 3, positions // 2])  # as inside an image: the axes differ
    return np.asarray(positions, np.int64)
