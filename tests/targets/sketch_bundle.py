"""Bundles of small portable graphs written in code: no checkpoint, no PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from small_decoder import Shape, decoder
from small_graphs import Sketch

from vlm_edge_runtime.bundle.manifest import (
    DualEncoderContract,
    FixedPlaceholder,
    GenerativeContract,
    GraphEntry,
    KVLayout,
    Manifest,
    Modality,
    SequentialPositions,
    SoftmaxSimilarity,
    Source,
    TensorSpec,
)
from vlm_edge_runtime.bundle.writer import BundleWriter, now

SHAPE = Shape(layers=2, width=64, vocab=80)


def encoder(output: str, width: int = 64, seed: int = 3) -> ir.Model:
    """pixel_values [images, 3, 8, 8] → [images, 4, width]: patches, one attention layer, one feed-forward block."""
    random = np.random.default_rng(seed)
    sketch = Sketch()
    dims = ["images", 4, width]

    def weight(name, *sizes):
        return sketch.weight(name, (random.standard_normal(sizes) / np.sqrt(sizes[0])).astype(np.float32))

    pixels = sketch.input("pixel_values", ["images", 3, 8, 8])
    patches = sketch.node(
        "Conv", [pixels, weight("patch.weight", width, 3, 4, 4)], {"strides": [4, 4]}, shape=["images", width, 2, 2]
    )
    rows = sketch.node("Reshape", [patches, sketch.weight("rows", np.array([0, width, 4]))], shape=["images", width, 4])
    hidden = sketch.node("Transpose", [rows], {"perm": [0, 2, 1]}, shape=dims)
    norm = [weight("norm.weight", width), weight("norm.bias", width)]
    normed = sketch.node("LayerNormalization", [hidden, *norm], {"axis": -1, "epsilon": 1e-5}, shape=dims)
    parts = [sketch.node("MatMul", [normed, weight(f"{n}_proj.weight", width, width)], shape=dims) for n in "qkv"]
    attended = sketch.node("Attention", parts, {"q_num_heads": 4, "kv_num_heads": 4, "scale": 0.25}, shape=dims, name="attention")
    out = sketch.node("MatMul", [attended, weight("o_proj.weight", width, width)], shape=dims)
    hidden = sketch.node("Add", [hidden, out], shape=dims)
    norm = [weight("norm2.weight", width), weight("norm2.bias", width)]
    normed = sketch.node("LayerNormalization", [hidden, *norm], {"axis": -1, "epsilon": 1e-5}, shape=dims)
    wide = sketch.node("MatMul", [normed, weight("fc1.weight", width, 96)], shape=["images", 4, 96])
    wide = sketch.node(
        "Gelu", [sketch.node("Add", [wide, weight("fc1.bias", 96)], shape=["images", 4, 96])], shape=["images", 4, 96]
    )
    down = sketch.node("MatMul", [wide, weight("fc2.weight", 96, width)], shape=dims)
    sketch.output(output, sketch.node("Add", [hidden, down], shape=dims))
    return sketch.model()


def projector(width: int = 64) -> ir.Model:
    """image_hidden_states → image_features by one linear layer."""
    sketch = Sketch()
    hidden = sketch.input("image_hidden_states", ["images", 4, width])
    matrix = sketch.weight("linear.weight", np.random.default_rng(5).standard_normal((width, 64)).astype(np.float32) / 8)
    sketch.output("image_features", sketch.node("MatMul", [hidden, matrix], shape=["images", 4, 64]))
    return sketch.model()


def embedding(vocab: int, width: int) -> ir.Model:
    """input_ids → inputs_embeds."""
    sketch = Sketch()
    ids = sketch.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    table = sketch.weight("embed.weight", np.random.default_rng(6).standard_normal((vocab, width)).astype(np.float32))
    sketch.output("inputs_embeds", sketch.node("Gather", [table, ids], {"axis": 0}, shape=["batch", "sequence", width]))
    return sketch.model()


def text_encoder() -> ir.Model:
    """input_ids → text_embeds [texts, 64]: mean of looked-up rows, one linear layer."""
    random = np.random.default_rng(7)
    sketch = Sketch()
    ids = sketch.input("input_ids", ["texts", "tokens"], ir.DataType.INT64)
    table = sketch.weight("embed.weight", random.standard_normal((80, 64)).astype(np.float32))
    rows = sketch.node("Gather", [table, ids], {"axis": 0}, shape=["texts", "tokens", 64])
    matrix = sketch.weight("linear.weight", random.standard_normal((64, 64)).astype(np.float32) / 8)
    linear = sketch.node("MatMul", [rows, matrix], shape=["texts", "tokens", 64])
    axis = sketch.weight("axis", np.array([1]))
    sketch.output("text_embeds", sketch.node("ReduceMean", [linear, axis], {"keepdims": 0}, shape=["texts", 64]))
    return sketch.model()


def entry(writer: BundleWriter, role: str, model: ir.Model) -> GraphEntry:
    """Writes a portable graph and describes it."""
    folder = writer.path / "portable"
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / f"{role}.onnx", external_data=f"{role}.onnx.data")

    def specs(values):
        return [
            TensorSpec(
                name=v.name, dtype=v.dtype.numpy().name, shape=tuple(d if isinstance(d, int) else d.value for d in v.shape)
            )
            for v in values
        ]

    return GraphEntry(
        role=role,
        model=writer.ref(f"portable/{role}.onnx"),
        data=[writer.ref(f"portable/{role}.onnx.data")],
        inputs=specs(model.graph.inputs),
        outputs=specs(model.graph.outputs),
    )


def write_bundle(path: Path, graphs: dict[str, ir.Model], contract) -> Path:
    with BundleWriter(path) as writer:
        entries = {role: entry(writer, role, model) for role, model in graphs.items()}
        writer.commit(
            Manifest(
                name=path.stem,
                model_type="sketch",
                source=Source(name="sketch", revision="0", architecture="Sketch"),
                versions={},
                created=now(),
                contract=contract,
                files=[],
                graphs=entries,
            )
        )
    return path


def projector_contract(shape: Shape = SHAPE) -> GenerativeContract:
    image = Modality(
        graphs=["vision_encoder", "projector"],
        batch="image",
        token_id=1,
        placeholder=FixedPlaceholder(image_token="<image>", tokens_per_image=4),
    )
    return GenerativeContract(
        family="projector",
        modalities=[image],
        positions=SequentialPositions(),
        kv=KVLayout(layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.size),
        hidden_size=shape.width,
        vocab_size=shape.vocab,
        context_length=128,
        eos_token_ids=[2],
        pad_token_id=0,
    )


def vlm_bundle(path: Path) -> Path:
    """A portable bundle of the projector family."""
    graphs = {
        "vision_encoder": encoder("image_hidden_states"),
        "projector": projector(),
        "embed_tokens": embedding(SHAPE.vocab, SHAPE.width),
        "decoder": decoder(SHAPE),
    }
    return write_bundle(path, graphs, projector_contract())


def dual_bundle(path: Path) -> Path:
    """A portable bundle of the dual-encoder family."""
    contract = DualEncoderContract(
        embedding_dim=64, similarity=SoftmaxSimilarity(logit_scale=10.0), text_length=8, text_padding="longest", pad_token_id=0
    )
    graphs = {"vision_encoder": encoder("image_embeds"), "text_encoder": text_encoder()}
    return write_bundle(path, graphs, contract)
