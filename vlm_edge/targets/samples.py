"""Inputs to try a graph on: random where the values do not matter, real pictures where they do (calibration)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, TensorSpec
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import TargetError

Feeds = dict[str, npt.NDArray[Any]]


def session(path: Path) -> ort.InferenceSession:
    """A CPU session of a graph on disk."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(graph: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]) -> Feeds:
    """All outputs by name."""
    names = [out.name for out in graph.get_outputs()]
    return dict(zip(names, graph.run(names, dict(feeds)), strict=True))


def encoder_feeds(entry: GraphEntry, *, merge_size: int = 1, seed: int = 0) -> Feeds:
    """Random inputs for an encoder by its signature: 2 images (tiles, texts), or a grid of patches."""
    random = np.random.default_rng(seed)
    height, width = 2 * merge_size, 4 * merge_size
    sizes = {"patches": height * width, "sequence": 6, "tokens": 6, "length": 6}
    feeds: Feeds = {}
    for spec in entry.inputs:
        shape = tuple(size if isinstance(size, int) else sizes.get(size, 2) for size in spec.shape)
        feeds[spec.name] = _values(spec, shape, random, (height, width), merge_size)
    return feeds


def _values(
    spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator, grid: tuple[int, int], merge_size: int
) -> npt.NDArray[Any]:
    if spec.name == "position_ids":  # the height and width index of each patch, in merge-block order (Qwen2-VL)
        height, width = grid
        blocks = (height // merge_size, merge_size, width // merge_size, merge_size)
        rows = np.repeat(np.arange(height)[:, None], width, axis=1).reshape(blocks).transpose(0, 2, 1, 3).reshape(-1)
        columns = np.repeat(np.arange(width)[None], height, axis=0).reshape(blocks).transpose(0, 2, 1, 3).reshape(-1)
        return np.stack([rows, columns], axis=-1).astype(np.int64)
    dtype = np.dtype(spec.dtype)
    if spec.name.endswith("mask"):
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        return random.integers(1, 20, shape).astype(dtype)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    return random.standard_normal(shape).astype(dtype)


def decoder_feeds(bundle: Bundle, *, sequence: int, past: int, capacity: int, seed: int = 0) -> tuple[Feeds, Feeds]:
    """(portable feeds, lowered feeds) of one decoder step: `sequence` random tokens after `past` random cache entries.

    Embeddings come from the bundle's own table, so that their scale is the model's.
    """
    contract = bundle.manifest.contract
    if not isinstance(contract, GenerativeContract):
        raise TargetError(f"{bundle.path}: family {bundle.manifest.family} has no decoder to sample.")
    random = np.random.default_rng(seed)
    ids = random.integers(0, contract.vocab_size, (1, sequence)).astype(np.int64)
    embeds = run_graph(session(bundle.graph_path("embed_tokens")), {"input_ids": ids})["inputs_embeds"]
    entry = bundle.graphs["decoder"]
    axes = next(len(spec.shape) for spec in entry.inputs if spec.name == "position_ids")
    positions = np.arange(past, past + sequence, dtype=np.int64)[None]
    if axes == 3:
        positions = np.stack([positions, positions + 3, positions // 2])  # as inside an image: the axes differ
    common: Feeds = {"inputs_embeds": embeds, "position_ids": positions}
    portable = {**common, "attention_mask": np.ones((1, past + sequence), np.int64)}
    lowered = {
        **common,
        "seqlens_k": np.array([past + sequence - 1], np.int32),
        "total_sequence_length": np.array([past + sequence], np.int32),
    }
    for spec in entry.inputs:
        if spec.name.startswith("past_key_values."):
            _, heads, _, size = spec.shape
            if not isinstance(heads, int) or not isinstance(size, int):
                raise TargetError(f"{bundle.path}: {spec.name} has no fixed heads and head size: {spec.shape}.")
            cache = random.standard_normal((1, heads, past, size)).astype(np.float32)
            portable[spec.name] = cache
            lowered[spec.name] = np.zeros((1, heads, capacity, size), np.float32)
            lowered[spec.name][:, :, :past] = cache
    return portable, lowered


def picture_feeds(bundle: Bundle, pictures: Sequence[str | Path]) -> Iterator[Feeds]:
    """Vision-encoder inputs of each picture, preprocessed as the runtime would."""
    from vlm_edge_runtime.preprocess import load_image_processor

    processor = load_image_processor(
        bundle.read_json("preprocessor_config.json"),
        bundle.read_json("processor_config.json") if bundle.has_file("processor_config.json") else None,
    )
    wanted = [spec.name for spec in bundle.graphs["vision_encoder"].inputs]
    for picture in pictures:
        arrays = processor(picture).arrays
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise TargetError(f"{picture}: preprocessing gives {sorted(arrays)}, the vision encoder also needs {missing}.")
        yield {name: np.asarray(arrays[name]) for name in wanted}
