"""Bundles of toy graphs, one for each way in which media reach a decoder: no checkpoint, no PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import models, pre_tokenizers
from toy_decoder import Toy

from vlm_edge_runtime.bundle.manifest import (
    FixedPlaceholder,
    GenerativeContract,
    GraphEntry,
    KVLayout,
    Manifest,
    Modality,
    SequentialPositions,
    Source,
    TensorSpec,
)
from vlm_edge_runtime.bundle.writer import BundleWriter, now

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
HIDDEN, VOCAB, SIDE, TOKENS = 32, 61, 8, 3
WORDS = ["<pad>", "<bos>", "<eos>", "<image>", "<video>", "<state>", "<audio>", "<start>", "a", "b", "c", "what", "is", "it"]
WORDS += [f"w{number}" for number in range(len(WORDS), VOCAB)]
IMAGE, VIDEO, STATE, AUDIO, START = 3, 4, 5, 6, 7


@dataclass(slots=True)
class Sketch:
    """A graph in the making. Weights depend on their names alone."""

    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def input(self, name: str, shape: list[int | str], kind: int = F32) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, shape: list[int | str], kind: int = F32) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def weight(self, name: str, *shape: int) -> str:
        random = np.random.default_rng([*name.encode()])
        return self.constant(name, (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights[name] = value
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def model(self) -> bytes:
        tensors = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "sketch", self.inputs, self.outputs, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def vision(output: str = "image_features", tokens: int = TOKENS, batch: str = "images", deepstack: bool = False) -> bytes:
    """pixel_values [images, 3, 8, 8] → [images, tokens, hidden], by one matrix; and, with `deepstack`, another such."""
    sketch = Sketch()
    sketch.input("pixel_values", [batch, 3, SIDE, SIDE])
    flat = sketch.node("Flatten", "pixel_values")
    for name in [output, "deepstack.0"] if deepstack else [output]:
        mixed = sketch.node("MatMul", flat, sketch.weight(f"{name}.weight", 3 * SIDE * SIDE, tokens * HIDDEN))
        rows = sketch.node("Reshape", mixed, sketch.constant("rows", np.array([0, tokens, HIDDEN])))
        sketch.output(rows, name, [batch, tokens, HIDDEN])
    return sketch.model()


def codes() -> bytes:
    """pixel_values → token ids int64 [images, tokens] between 8 and 60."""
    sketch = Sketch()
    sketch.input("pixel_values", ["images", 3, SIDE, SIDE])
    mixed = sketch.node("MatMul", sketch.node("Flatten", "pixel_values"), sketch.weight("codes", 3 * SIDE * SIDE, TOKENS * 50))
    rows = sketch.node("Reshape", mixed, sketch.constant("rows", np.array([0, TOKENS, 50])))
    best = sketch.node("ArgMax", rows, axis=-1, keepdims=0)
    sketch.output(sketch.node("Add", best, sketch.constant("first", np.array(8))), "image_codes", ["images", TOKENS], I64)
    return sketch.model()


def qformer() -> bytes:
    """image_hidden_states [images, tokens, hidden] and an instruction → image_features: the instruction's mean word is added."""
    sketch = Sketch()
    sketch.input("image_hidden_states", ["images", TOKENS, HIDDEN])
    sketch.input("qformer_input_ids", ["images", "instruction"], I64)
    sketch.input("qformer_attention_mask", ["images", "instruction"], I64)
    words = sketch.node("Gather", sketch.weight("words", VOCAB, HIDDEN), "qformer_input_ids")
    mean = sketch.node("ReduceMean", words, sketch.constant("axis", np.array([1])), keepdims=1)
    sketch.output(sketch.node("Add", "image_hidden_states", mean), "image_features", ["images", TOKENS, HIDDEN])
    return sketch.model()


def vector(name: str, shape: list[int | str], tokens: int, output: str) -> bytes:
    """[batch, n] or [batch, time, n] (its mean over time) → [batch, tokens, hidden]."""
    sketch = Sketch()
    value = sketch.input(name, ["batch", *shape])
    if len(shape) == 2:
        value = sketch.node("ReduceMean", value, sketch.constant("axis", np.array([1])), keepdims=0)
    mixed = sketch.node("MatMul", value, sketch.weight(f"{name}.weight", int(shape[-1]), tokens * HIDDEN))
    rows = sketch.node("Reshape", mixed, sketch.constant("rows", np.array([0, tokens, HIDDEN])))
    sketch.output(rows, output, ["batch", tokens, HIDDEN])
    return sketch.model()


def cross_kv(toy: Toy, states: bool = False) -> bytes:
    """encoder_hidden_states [batch, source, hidden] → the toy's cross-attention inputs; with `states` a first `state.0`."""
    sketch = Sketch()
    sketch.input("encoder_hidden_states", ["batch", "source", HIDDEN])
    for name in toy.cross_names:
        mixed = sketch.node("MatMul", "encoder_hidden_states", sketch.weight(f"{name}.weight", HIDDEN, toy.heads * toy.size))
        split = sketch.node("Reshape", mixed, sketch.constant("split", np.array([0, 0, toy.heads, toy.size])))
        sketch.output(sketch.node("Transpose", split, perm=[0, 2, 1, 3]), name, ["batch", toy.heads, "source", toy.size])
    if states:
        mean = sketch.node("ReduceMean", "encoder_hidden_states", sketch.constant("axis", np.array([1])), keepdims=0)
        sketch.output(sketch.node("MatMul", mean, sketch.weight("first", HIDDEN, HIDDEN)), "state.0", ["batch", HIDDEN])
    return sketch.model()


def with_cross_kv_inside(toy: Toy) -> bytes:
    """The toy decoder, reading `encoder_hidden_states` instead of keys and values."""
    decoder, before = (onnx.load_model_from_string(model) for model in (toy.portable_model(), cross_kv(toy)))
    nodes = [*before.graph.node, *decoder.graph.node]
    inputs = [value for value in decoder.graph.input if value.name not in toy.cross_names] + list(before.graph.input)
    weights = [*before.graph.initializer, *decoder.graph.initializer]
    for kept, new in ((decoder.graph.node, nodes), (decoder.graph.input, inputs), (decoder.graph.initializer, weights)):
        copies = [type(each).FromString(each.SerializeToString()) for each in new]
        del kept[:]
        kept.extend(copies)
    return decoder.SerializeToString()


def encoder(reads_image: bool = False) -> bytes:
    """inputs_embeds and attention_mask → encoder_hidden_states: every token and the mean of all; or of the image's features."""
    sketch = Sketch()
    sketch.input("inputs_embeds", ["batch", "source", HIDDEN])
    sketch.input("attention_mask", ["batch", "source"], I64)
    other = sketch.input("image_features", ["batch", "entries", HIDDEN]) if reads_image else "inputs_embeds"
    mean = sketch.node("ReduceMean", other, sketch.constant("axis", np.array([1])), keepdims=1)
    mixed = sketch.node("MatMul", sketch.node("Add", "inputs_embeds", mean), sketch.weight("mix", HIDDEN, HIDDEN))
    sketch.output(sketch.node("Tanh", mixed), "encoder_hidden_states", ["batch", "source", HIDDEN])
    return sketch.model()


def renamed(model: bytes, old: str, new: str) -> bytes:
    """The model with an output called otherwise."""
    proto = onnx.load_model_from_string(model)
    for node in proto.graph.node:
        node.output[:] = [new if name == old else name for name in node.output]
        node.input[:] = [new if name == old else name for name in node.input]
    for value in proto.graph.output:
        value.name = new if value.name == old else value.name
    return proto.SerializeToString()


def image(joins: str = "tokens", graphs: tuple[str, ...] = ("vision_encoder",), **options) -> Modality:
    """The image modality: three tokens an image, spelt `<image>`, unless `options` say otherwise."""
    spelt = {"token_id": IMAGE, "placeholder": FixedPlaceholder(image_token="<image>", tokens_per_image=TOKENS)}
    silent = {"token_id": None, "placeholder": None}
    return Modality(
        graphs=list(graphs), **{"batch": "image", "joins": joins, **(silent if joins == "memory" else spelt), **options}
    )


def contract(toy: Toy, *modalities: Modality, **options) -> GenerativeContract:
    """A contract around the toy decoder."""
    layers = toy.layers if toy.cached else 0
    return GenerativeContract(
        **{
            "family": "toy",
            "modalities": list(modalities) or [image()],
            "positions": SequentialPositions(),
            "kv": KVLayout(layers=layers, kv_heads=toy.kv_heads, head_dim=toy.size),
            "hidden_size": HIDDEN,
            "vocab_size": VOCAB,
            "context_length": 128,
            "eos_token_ids": [2],
            "pad_token_id": 0,
            **options,
        }
    )


def write(path: Path, toy: Toy, graphs: dict[str, bytes], made: GenerativeContract, files: dict[str, str] | None = None) -> Path:
    """A portable bundle of the toy decoder and other graphs."""
    models_ = {"embed_tokens": toy.embed_model(), "decoder": toy.portable_model(), **graphs}
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    texts = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
        "preprocessor_config.json": json.dumps(pixels),
        **(files or {}),
    }
    with BundleWriter(path) as writer:
        (writer.path / "portable").mkdir()
        entries = {}
        for role, model in models_.items():
            (writer.path / "portable" / f"{role}.onnx").write_bytes(model)
            proto = onnx.load_model_from_string(model)
            entries[role] = GraphEntry(
                role=role,
                model=writer.ref(f"portable/{role}.onnx"),
                inputs=_specs(proto.graph.input),
                outputs=_specs(proto.graph.output),
            )
        for name, text in texts.items():
            (writer.path / name).write_text(text)
        writer.commit(
            Manifest(
                name=path.stem,
                model_type="toy",
                source=Source(name="toy", revision="0", architecture="Toy"),
                versions={},
                created=now(),
                contract=made,
                files=[writer.ref(name) for name in texts],
                graphs=entries,
            )
        )
    return path


def tokenizer_json() -> str:
    """Words of the toy's vocabulary, split at blanks; nothing is added around a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:8])
    return backend.to_str()


def _specs(values) -> list[TensorSpec]:
    found = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        found.append(TensorSpec(name=value.name, dtype=helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape))
    return found
