"""Portable decoders of a few layers, written node by node as the exporter writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from small_graphs import Sketch


@dataclass(slots=True, frozen=True)
class Shape:
    """Sizes and choices of a small decoder."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    width: int = 48
    vocab: int = 50
    ffn: int = 64
    window: int | None = None
    """Sliding window of the even layers."""
    softcap: float = 0.0
    rotary: str = "full"
    """full | interleaved | none | mrope (tables from the mean of three position axes)."""
    norm: str = "RMSNormalization"
    bias: bool = False
    gemm: bool = False
    """Feed-forward as OPT's: Reshape to rows, Gemm, Relu, Gemm, Reshape back."""
    mask: str = "causal"
    """causal | blocks (one more input, block_ids) | explicit (causal, with `bias`)."""
    windowed_blocks: bool = False
    bias_by: str = ""
    """What an explicit mask adds: distance (T5: learned, per head) | slope (ALiBi, by the key's place)."""
    cross: int = 0
    """KV heads of a cross-attention in every layer, over `cross_key_values.{i}` and `encoder_attention_mask`; 0: none."""
    deepstack: bool = False
    """Adds `deepstack.{i}` to the hidden states after each layer."""


def decoder(shape: Shape, seed: int = 0) -> ir.Model:
    """inputs_embeds, attention_mask, position_ids, past → logits, present (the portable contract)."""
    random = np.random.default_rng(seed)
    sketch = Sketch()
    batch, seq, width = "batch", "sequence", shape.width

    def weight(name: str, *dims: int) -> ir.Value:
        return sketch.weight(name, (random.standard_normal(dims) / np.sqrt(dims[0])).astype(np.float32))

    def const(name: str, value: object, dtype: type = np.int64) -> ir.Value:
        return sketch.weight(name, np.array(value, dtype))

    embeds = sketch.input("inputs_embeds", [batch, seq, width])
    given = sketch.input("attention_mask", [batch, "total"], ir.DataType.INT64)
    axes = [3, batch, seq] if shape.rotary == "mrope" else [batch, seq]
    positions = sketch.input("position_ids", axes, ir.DataType.INT64)
    past = [
        sketch.input(f"past_key_values.{i}.{kind}", [batch, shape.kv_heads, "past", shape.size])
        for i in range(shape.layers)
        for kind in ("key", "value")
    ]
    ids = sketch.input("block_ids", [batch, seq], ir.DataType.INT64) if shape.mask == "blocks" else None
    full, windowed = _masks(sketch, const, weight, embeds, given, past[0], shape, ids)
    crossed = _cross_inputs(sketch, const, embeds, shape)
    cos, sin = _tables(sketch, const, positions, shape) if shape.rotary != "none" else (None, None)
    split = {n: const(f"heads{n}", [0, 0, n, shape.size]) for n in {shape.heads, shape.kv_heads}}
    merged = const("merged", [0, 0, shape.heads * shape.size])
    hidden, present = embeds, []
    for i in range(shape.layers):
        normed = _norm(sketch, weight, hidden, f"layers.{i}.input_norm", shape)
        parts = []
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            flat = _linear(sketch, weight, normed, f"layers.{i}.{name}_proj", width, heads * shape.size, shape.bias)
            four = sketch.node("Reshape", [flat, split[heads]], shape=[batch, seq, heads, shape.size])
            turned = sketch.node("Transpose", [four], {"perm": [0, 2, 1, 3]}, shape=[batch, heads, seq, shape.size])
            if cos is not None and name != "v":
                attributes = {"interleaved": int(shape.rotary == "interleaved"), "num_heads": heads}
                turned = sketch.node("RotaryEmbedding", [turned, cos, sin], attributes, shape=[batch, heads, seq, shape.size])
            parts.append(turned)
        slides = shape.window is not None and i % 2 == 0
        attended = sketch.node(
            "Attention",
            [*parts, windowed if slides else full, past[2 * i], past[2 * i + 1]],
            {"scale": shape.size**-0.5} | ({"softcap": shape.softcap} if shape.softcap else {}),
            shapes=[[batch, shape.heads, seq, shape.size], *[[batch, shape.kv_heads, "total", shape.size]] * 2],
            name=f"layers.{i}.attention",
        )
        node = attended[0].producer()
        node.metadata_props.update({"vlm_edge.layer": str(i), "vlm_edge.mask": shape.mask})
        if shape.windowed_blocks and slides:
            node.metadata_props["vlm_edge.windowed_blocks"] = "1"
        if slides:
            node.metadata_props["vlm_edge.sliding_window"] = str(shape.window)
        present += attended[1:]
        turned = sketch.node("Transpose", [attended[0]], {"perm": [0, 2, 1, 3]}, shape=[batch, seq, shape.heads, shape.size])
        flat = sketch.node("Reshape", [turned, merged], shape=[batch, seq, shape.heads * shape.size])
        out = _linear(sketch, weight, flat, f"layers.{i}.o_proj", shape.heads * shape.size, width, shape.bias)
        hidden = sketch.node("Add", [hidden, out], shape=[batch, seq, width])
        if shape.cross:
            hidden = _cross_attention(sketch, weight, const, hidden, crossed, i, shape)
        hidden = _feed_forward(sketch, weight, const, hidden, i, shape)
        if shape.deepstack:
            more = sketch.input(f"deepstack.{i}", [batch, seq, width])
            hidden = sketch.node("Add", [hidden, more], shape=[batch, seq, width])
    normed = _norm(sketch, weight, hidden, "norm", shape)
    logits = _linear(sketch, weight, normed, "lm_head", width, shape.vocab, False)
    sketch.output("logits", logits)
    for index, value in enumerate(present):
        sketch.output(f"present.{index // 2}.{('key', 'value')[index % 2]}", value)
    return sketch.model()


def _linear(sketch, weight, value, name, depth, width, bias):
    out = sketch.node("MatMul", [value, weight(f"{name}.weight", depth, width)], shape=["batch", "sequence", width], name=name)
    if bias:
        out = sketch.node("Add", [out, weight(f"{name}.bias", width)], shape=["batch", "sequence", width])
    return out


def _norm(sketch, weight, value, name, shape):
    scale = [weight(f"{name}.weight", shape.width)]
    if shape.norm == "LayerNormalization":
        scale.append(weight(f"{name}.bias", shape.width))
    return sketch.node(shape.norm, [value, *scale], {"axis": -1, "epsilon": 1e-5}, shape=["batch", "sequence", shape.width])


def _cross_inputs(sketch, const, embeds, shape):
    """Keys and values of each layer, and the additive mask [batch, 1, sequence, source] of encoder_attention_mask."""
    if not shape.cross:
        return None
    dims = ["batch", shape.cross, "source", shape.size]
    cache = [sketch.input(f"cross_key_values.{i}.{kind}", dims) for i in range(shape.layers) for kind in ("key", "value")]
    given = sketch.input("encoder_attention_mask", ["batch", "source"], ir.DataType.INT64)
    dims = ["batch", 1, 1, "source"]
    valid = sketch.node("Unsqueeze", [given, const("cross.middle", [1, 2])], shape=dims, dtype=ir.DataType.INT64)
    valid = sketch.node("Cast", [valid], {"to": 9}, shape=dims, dtype=ir.DataType.BOOL)
    off, on = const("cross.off", np.finfo(np.float32).min, np.float32), const("cross.on", 0.0, np.float32)
    mask = sketch.node("Where", [valid, on, off], shape=dims)
    length = sketch.node("Shape", [embeds], {"start": 1, "end": 2}, shape=[1], dtype=ir.DataType.INT64)
    parts = [const("cross.front", [1, 1]), length, const("cross.back", [1])]
    wanted = sketch.node("Concat", parts, {"axis": 0}, shape=[4], dtype=ir.DataType.INT64)
    return cache, sketch.node("Expand", [mask, wanted], shape=["batch", 1, "sequence", "source"])


def _cross_attention(sketch, weight, const, hidden, crossed, i, shape):
    cache, mask = crossed
    normed = _norm(sketch, weight, hidden, f"layers.{i}.cross_norm", shape)
    wide = shape.heads * shape.size
    flat = _linear(sketch, weight, normed, f"layers.{i}.cross.q_proj", shape.width, wide, shape.bias)
    split, merged = const(f"cross.split{i}", [0, 0, shape.heads, shape.size]), const(f"cross.merged{i}", [0, 0, wide])
    four = sketch.node("Reshape", [flat, split], shape=["batch", "sequence", shape.heads, shape.size])
    dims = ["batch", shape.heads, "sequence", shape.size]
    query = sketch.node("Transpose", [four], {"perm": [0, 2, 1, 3]}, shape=dims)
    attended = sketch.node("Attention", [query, cache[2 * i], cache[2 * i + 1], mask], shape=dims, name=f"layers.{i}.cross")
    turned = sketch.node("Transpose", [attended], {"perm": [0, 2, 1, 3]}, shape=["batch", "sequence", shape.heads, shape.size])
    flat = sketch.node("Reshape", [turned, merged], shape=["batch", "sequence", wide])
    out = _linear(sketch, weight, flat, f"layers.{i}.cross.o_proj", wide, shape.width, shape.bias)
    return sketch.node("Add", [hidden, out], shape=["batch", "sequence", shape.width])


def _feed_forward(sketch, weight, const, hidden, i, shape):
    dims = ["batch", "sequence", shape.width]
    if shape.gemm:
        rows = sketch.node("Reshape", [hidden, const(f"rows{i}", [-1, shape.width])], shape=["rows", shape.width])
        normed = sketch.node(
            shape.norm,
            [rows, weight(f"layers.{i}.norm.weight", shape.width)]
            + ([weight(f"layers.{i}.norm.bias", shape.width)] if shape.norm == "LayerNormalization" else []),
            {"axis": -1, "epsilon": 1e-5},
            shape=["rows", shape.width],
        )
        up = [normed, weight(f"layers.{i}.fc1.weight", shape.ffn, shape.width), weight(f"layers.{i}.fc1.bias", shape.ffn)]
        wide = sketch.node("Relu", [sketch.node("Gemm", up, {"transB": 1}, shape=["rows", shape.ffn])], shape=["rows", shape.ffn])
        down = [wide, weight(f"layers.{i}.fc2.weight", shape.ffn, shape.width), weight(f"layers.{i}.fc2.bias", shape.width)]
        out = sketch.node("Gemm", down, shape=["rows", shape.width])
        both = sketch.node("Add", [rows, out], shape=["rows", shape.width])
        size = sketch.node("Shape", [hidden], shape=[3], dtype=ir.DataType.INT64)
        return sketch.node("Reshape", [both, size], {"allowzero": 1}, shape=dims)
    normed = _norm(sketch, weight, hidden, f"layers.{i}.norm", shape)
    gate = _linear(sketch, weight, normed, f"layers.{i}.gate_proj", shape.width, shape.ffn, False)
    wide = ["batch", "sequence", shape.ffn]
    gated = sketch.node("Mul", [gate, sketch.node("Sigmoid", [gate], shape=wide)], shape=wide)
    up = _linear(sketch, weight, normed, f"layers.{i}.up_proj", shape.width, shape.ffn, False)
    down = _linear(
        sketch, weight, sketch.node("Mul", [gated, up], shape=wide), f"layers.{i}.down_proj", shape.ffn, shape.width, shape.bias
    )
    return sketch.node("Add", [hidden, down], shape=dims)


def _tables(sketch, const, positions, shape):
    half = shape.size // 2
    inverse = sketch.weight("inv_freq", (1.0 / 100.0 ** (np.arange(half) / half)).astype(np.float32)[None, None])
    real = sketch.node("Cast", [positions], {"to": 1}, shape=None)
    if shape.rotary == "mrope":
        real = sketch.node("ReduceMean", [real, const("axis0", [0])], {"keepdims": 0}, shape=["batch", "sequence"])
    column = sketch.node("Unsqueeze", [real, const("last", [-1])], shape=["batch", "sequence", 1])
    angle = sketch.node("Mul", [column, inverse], shape=["batch", "sequence", half])
    return tuple(sketch.node(op, [angle], shape=["batch", "sequence", half]) for op in ("Cos", "Sin"))


def _masks(sketch, const, weight, embeds, given, past, shape, ids):
    """Additive float masks [batch, 1, sequence, total]: causal, and causal within the window."""
    i64, flag = ir.DataType.INT64, ir.DataType.BOOL
    zero, one = const("zero", 0), const("one", 1)
    queries = sketch.node(
        "Squeeze", [sketch.node("Shape", [embeds], {"start": 1, "end": 2}, shape=[1], dtype=i64)], shape=[], dtype=i64
    )
    before = sketch.node(
        "Squeeze", [sketch.node("Shape", [past], {"start": 2, "end": 3}, shape=[1], dtype=i64)], shape=[], dtype=i64
    )
    total = sketch.node("Add", [queries, before], shape=[], dtype=i64)
    query = sketch.node("Range", [zero, queries, one], shape=["sequence"], dtype=i64)
    query = sketch.node("Add", [query, before], shape=["sequence"], dtype=i64)
    query = sketch.node("Unsqueeze", [query, const("column", [1])], shape=["sequence", 1], dtype=i64)
    key = sketch.node("Unsqueeze", [sketch.node("Range", [zero, total, one], shape=["total"], dtype=i64), const("row", [0])],
                      shape=[1, "total"], dtype=i64)  # fmt: skip
    op = "LessOrEqual" if shape.mask != "prefix" else "GreaterOrEqual"
    seen = sketch.node(op, [key, query], shape=["sequence", "total"], dtype=flag)
    seen = sketch.node("Unsqueeze", [seen, const("front", [0, 1])], shape=[1, 1, "sequence", "total"], dtype=flag)
    valid = sketch.node("Unsqueeze", [given, const("middle", [1, 2])], shape=["batch", 1, 1, "total"], dtype=i64)
    valid = sketch.node("Cast", [valid], {"to": 9}, shape=["batch", 1, 1, "total"], dtype=flag)
    dims = ["batch", 1, "sequence", "total"]
    off, on = const("off", np.finfo(np.float32).min, np.float32), const("on", 0.0, np.float32)
    same = _same_block(sketch, const, ids, before) if ids is not None else None

    def mask(windowed):
        allowed, near = seen, None
        if windowed:
            edge = sketch.node("Sub", [query, const("window", shape.window)], shape=["sequence", 1], dtype=i64)
            near = sketch.node("Greater", [key, edge], shape=["sequence", "total"], dtype=flag)
        if near is not None and not shape.windowed_blocks:
            allowed, near = sketch.node("And", [allowed, near], shape=dims, dtype=flag), None
        if same is not None:
            allowed = sketch.node("Or", [allowed, same], shape=dims, dtype=flag)
        if near is not None:
            allowed = sketch.node("And", [allowed, near], shape=dims, dtype=flag)
        allowed = sketch.node("And", [allowed, valid], shape=dims, dtype=flag)
        return sketch.node("Where", [allowed, on, off], shape=dims)

    full = mask(False)
    if shape.bias_by:
        bias = _bias(sketch, const, weight, query, key, shape)
        full = sketch.node("Add", [full, bias], shape=["batch", shape.heads, "sequence", "total"])
    return full, mask(True) if shape.window is not None else full


def _same_block(sketch, const, ids, before):
    i64, flag = ir.DataType.INT64, ir.DataType.BOOL
    front = sketch.node("Unsqueeze", [before, const("vector", [0])], shape=[1], dtype=i64)
    pads = sketch.node("Concat", [const("pad1", [0]), front, const("pad2", [0, 0])], {"axis": 0}, shape=[4], dtype=i64)
    padded = sketch.node("Pad", [ids, pads], shape=["batch", "total"], dtype=i64)
    of_key = sketch.node("Unsqueeze", [padded, const("keys", [1, 2])], shape=["batch", 1, 1, "total"], dtype=i64)
    of_query = sketch.node("Unsqueeze", [ids, const("queries", [1, 3])], shape=["batch", 1, "sequence", 1], dtype=i64)
    dims = ["batch", 1, "sequence", "total"]
    equal = sketch.node("Equal", [of_query, of_key], shape=dims, dtype=flag)
    some = sketch.node("Greater", [of_query, const("nothing", 0)], shape=["batch", 1, "sequence", 1], dtype=flag)
    return sketch.node("And", [equal, some], shape=dims, dtype=flag)


def _bias(sketch, const, weight, query, key, shape):
    """[1, heads, sequence, total]: by distance (learned, clipped at 9) or a slope times the key's place."""
    i64, dims = ir.DataType.INT64, ["sequence", "total", shape.heads]
    if shape.bias_by == "distance":
        distance = sketch.node("Sub", [query, key], shape=["sequence", "total"], dtype=i64)
        inside = sketch.node("Clip", [distance, const("low", 0), const("high", 9)], shape=["sequence", "total"], dtype=i64)
        table = sketch.weight(
            "relative_bias", np.random.default_rng(11).standard_normal((10, shape.heads)).astype(np.float32) * 2
        )
        rows = sketch.node("Gather", [table, inside], {"axis": 0}, shape=dims)
    else:
        slopes = sketch.weight("slopes", (0.5 ** np.arange(1, shape.heads + 1)).astype(np.float32))
        place = sketch.node("Cast", [key], {"to": 1}, shape=[1, "total"])
        place = sketch.node("Unsqueeze", [place, const("heads.axis", [-1])], shape=[1, "total", 1])
        rows = sketch.node("Mul", [place, slopes], shape=[1, "total", shape.heads])
    turned = sketch.node("Transpose", [rows], {"perm": [2, 0, 1]}, shape=[shape.heads, "sequence", "total"])
    return sketch.node("Unsqueeze", [turned, const("bias.batch", [0])], shape=[1, shape.heads, "sequence", "total"])


def feeds(shape: Shape, *, batch: int = 1, sequence: int, past: int, capacity: int = 64, offset: int = 0, seed: int = 0):
    """(portable feeds, lowered feeds) of one step; positions start at past + offset."""
    random = np.random.default_rng(seed)
    positions = np.broadcast_to(np.arange(past, past + sequence) + offset, (batch, sequence)).astype(np.int64)
    if shape.rotary == "mrope":
        positions = np.stack([positions, positions + 1, positions + 5])
    embeds = random.standard_normal((batch, sequence, shape.width)).astype(np.float32)
    common = {"inputs_embeds": embeds, "position_ids": np.ascontiguousarray(positions)}
    portable = common | {"attention_mask": np.ones((batch, past + sequence), np.int64)}
    lowered = common | {
        "seqlens_k": np.full(batch, past + sequence - 1, np.int32),
        "total_sequence_length": np.array([past + sequence], np.int32),
    }
    if shape.mask == "blocks":
        ids = np.array([0, 1, 1, 1, 0, 2, 2, 2, 2], np.int64)[:sequence] if sequence > 1 else np.zeros(1, np.int64)
        common["block_ids"] = np.ascontiguousarray(np.broadcast_to(ids, (batch, sequence)))
    if shape.cross:
        source = 5
        mask = np.ones((batch, source), np.int64)
        mask[1:, -2:] = 0
        common["encoder_attention_mask"] = mask
        for name in (f"cross_key_values.{i}.{kind}" for i in range(shape.layers) for kind in ("key", "value")):
            common[name] = random.standard_normal((batch, shape.cross, source, shape.size)).astype(np.float32)
    if shape.deepstack:
        for i in range(shape.layers):
            common[f"deepstack.{i}"] = random.standard_normal((batch, sequence, shape.width)).astype(np.float32)
    portable, lowered = portable | common, lowered | common
    for i in range(shape.layers):
        for kind in ("key", "value"):
            cache = random.standard_normal((batch, shape.kv_heads, past, shape.size)).astype(np.float32)
            buffer = np.full((batch, shape.kv_heads, capacity, shape.size), 7.0, np.float32)  # stale entries must not matter
            buffer[:, :, :past] = cache
            portable[f"past_key_values.{i}.{kind}"] = cache
            lowered[f"past_key_values.{i}.{kind}"] = buffer
    return portable, lowered


STEPS = ((1, 5, 0), (3, 4, 0), (1, 3, 6), (1, 1, 30), (3, 1, 12), (1, 9, 25))
"""(batch, sequence, past): prefill, batched prefill, a chunk after a past, decode, batched decode, a long chunk."""
