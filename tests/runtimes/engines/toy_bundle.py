"""A bundle in memory around a toy decoder's graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from toy_decoder import Toy

from vlm_edge_runtime.bundle.manifest import (
    Build,
    FileRef,
    GenerativeContract,
    GraphEntry,
    KVLayout,
    Manifest,
    SequentialPositions,
    Source,
)
from vlm_edge_runtime.bundle.reader import Bundle


def _entry(role: str, file: str) -> GraphEntry:
    return GraphEntry(role=role, model=FileRef(file=file, sha256="", bytes=0), inputs=[], outputs=[])


def toy_bundle(folder: Path, toy: Toy, build: str | None, backend: str = "ort-cpu") -> Bundle:
    """A bundle in memory around the toy's graphs on disk."""
    models = {"embed_tokens": toy.embed_model(), "portable": toy.portable_model(), "lowered": toy.lowered_model()}
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(model)
    kv = KVLayout(layers=toy.layers, kv_heads=toy.kv_heads, head_dim=toy.size)
    contract = GenerativeContract(
        family="projector",
        modalities=[],
        positions=SequentialPositions(),
        kv=kv,
        hidden_size=toy.hidden,
        vocab_size=toy.vocab,
        context_length=256,
        eos_token_ids=[],
        pad_token_id=0,
    )
    portable = {"embed_tokens": _entry("embed_tokens", "embed_tokens.onnx"), "decoder": _entry("decoder", "portable.onnx")}
    lowered = Build(
        name="lowered",
        target="cpu",
        backend=backend,
        precision={},
        graphs={"decoder": _entry("decoder", "lowered.onnx")},
        kv=KVLayout(layers=toy.layers, kv_heads=toy.kv_heads, head_dim=toy.size, shared_buffer=True),
    )
    source = Source(name="toy", revision="", architecture="")
    manifest = Manifest(
        name="toy", model_type="toy", source=source, versions={}, created="", contract=contract, files=[], graphs=portable
    )
    chosen = lowered if build else None
    return Bundle(folder, manifest, chosen, portable | (lowered.graphs if build else {}))


def halved(model: bytes) -> bytes:
    """The toy with fp16 weights, cache, embeddings and logits."""
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    for number, weight in enumerate(graph.initializer):
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32:
            graph.initializer[number].CopyFrom(numpy_helper.from_array(array.astype(np.float16), weight.name))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return loaded.SerializeToString()
