"""Every step that plans of decoders have, by itself against float64, on each instruction set; prompts and single tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlm_edge.targets.native.panels import Quantised, floating, integers, quantised, vector
from vlm_edge.targets.native.plan_file import Buffer, BufferKind, Kind, Plan, Ref, Step, Unary, Value, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge_runtime import _native

pytestmark = pytest.mark.parametrize("kernels", _native.kernels())
CALLS = ((1, 1, 0), (1, 1, 40), (2, 5, 3), (1, 150, 70), (3, 1, 600))
"""Rows, new tokens of each, entries before them."""
CAPACITY = 700


class Bench:
    """A decoder of `width` numbers a token that is one step or a few: what they make of the last token are the logits."""

    def __init__(self, folder: Path, kernels: str, width: int, seed: int = 0) -> None:
        self.path, self.kernels, self.width = folder / "steps.plan", kernels, width
        self.generator = np.random.default_rng(seed)
        self.embeds = Ref(Buffer(BufferKind.EMBEDS, width))
        self.inputs: list[Value] = []
        self.block_input = -1

    def floats(self, width: int) -> Ref:
        return Ref(Buffer(BufferKind.FLOATS, width))

    def further(self, name: str, dtype: int, *shape: int | str) -> int:
        self.inputs.append(Value(name, dtype, shape))
        return len(self.inputs) - 1

    def numbers(self, *shape: int) -> np.ndarray:
        return self.generator.standard_normal(shape).astype(np.float32)

    def run(self, steps: list[Step], result: Ref, x: np.ndarray, past: int, **more: np.ndarray) -> dict[str, np.ndarray]:
        """`x` [rows, tokens, width] → logits [rows, width of the result] and caches, by the steps and one that takes the last."""
        rows, tokens, _ = x.shape
        width = result.buffer.width
        last = Step(Kind.LAST, width, True, [result], [Ref(Buffer(BufferKind.LOGITS, width))])
        inputs, more = list(self.inputs), dict(more)
        if not any(one.name.startswith("past_key_values") for one in inputs):  # what says how many entries there may be
            inputs.append(Value("past_key_values.0.key", 1, ("batch", 1, "capacity", 1)))
            more["past_key_values.0.key"] = np.zeros((rows, 1, CAPACITY, 1), np.float32)
        values = [
            Value("inputs_embeds", 1, ("batch", "sequence", self.width)),
            Value("position_ids", 7, ("batch", "sequence")),
            Value("seqlens_k", 6, ("batch",)),
            *inputs,
        ]
        outputs = [Value("logits", 1, ("batch", 1, width))]
        caches = [one for one in inputs if one.name.startswith("past_key_values")]
        outputs += [Value(f"present.{one.name[16:]}", 1, one.shape) for one in caches]
        write(Plan(values, outputs, self.width, width, 1, [*steps, last], self.block_input), self.path)
        session = PlanSession(self.path, threads=2, kernels=self.kernels)
        positions = np.arange(past, past + tokens)[None].repeat(rows, axis=0)
        feeds = {"inputs_embeds": x, "position_ids": positions, "seqlens_k": np.full(rows, past + tokens - 1, np.int32), **more}
        names = [one.name for one in session.get_outputs()]
        return {name: array.astype(np.float64) for name, array in zip(names, session.run(None, feeds), strict=True)}

    def last(self, steps: list[Step], result: Ref, x: np.ndarray, past: int, **more: np.ndarray) -> np.ndarray:
        return self.run(steps, result, x, past, **more)["logits"].reshape(len(x), -1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.maximum(x, -700)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["float", "int4", "int8"])
def test_products_and_gated_ones(kernels, kind, call, tmp_path):
    """Codes are made exact: activations of whole numbers up to 127, one of them in each block."""
    rows, tokens, past = call
    bench = Bench(tmp_path, kernels, 64)
    x, width = np.rint(bench.numbers(rows, tokens, 64) * 40).clip(-127, 127), 41
    x[..., ::32] = 127
    gates = np.full((-(-width // 16), 2, 16), -1)
    for side in range(2):
        filled = np.full(gates.shape[0] * 16, -1)
        filled[:width] = np.arange(width) + side * width
        gates[:, side] = filled.reshape(-1, 16)
    source, steps = bench.embeds, []
    if kind == "float":
        w = bench.numbers(64, 2 * width)
        plain, gated = (floating(64, order, lambda: w) for order in (np.arange(2 * width), gates.reshape(-1)))
    else:
        bits = int(kind[3:])
        stored = bench.generator.integers(0, 1 << bits, (2 * width, 2, 32)).astype(np.uint8)
        scales = (2.0 ** bench.generator.integers(-9, -5, (2 * width, 2))).astype(np.float32)
        packed = stored if bits == 8 else (stored[..., 0::2] | (stored[..., 1::2] << 4)).astype(np.uint8)
        form = Quantised(bits, 32, 64, lambda: packed, lambda: scales)
        plain, gated = quantised(form, np.arange(2 * width)), quantised(form, gates.reshape(-1))
        w = ((stored - float(1 << (bits - 1))) * scales[..., None]).reshape(2 * width, 64).T
        source = Ref(Buffer(BufferKind.CODES, 64))
        steps = [Step(Kind.QUANTIZE, 64, False, [bench.embeds], [source])]
    bias, out = bench.numbers(2 * width), bench.floats(2 * width)
    step = Step(Kind.MATMUL, 2 * width, False, [source], [out], [plain, vector(bias)], [int(Unary.SILU)])
    wanted = x[:, -1].astype(np.float64) @ w
    allowed = 1e-5 * (np.abs(x[:, -1]) @ np.abs(w)).max()
    np.testing.assert_allclose(bench.last([*steps, step], out, x, past), silu(wanted + bias), atol=allowed)
    out = bench.floats(width)
    step = Step(Kind.GATED, width, False, [source], [out], [gated], [int(Unary.SILU)])
    found, expected = bench.last([*steps, step], out, x, past), silu(wanted[:, :width]) * wanted[:, width:]
    np.testing.assert_allclose(found, expected, atol=allowed * (1 + np.abs(wanted).max()))


@pytest.mark.parametrize("layer", [False, True])
def test_norms(kernels, layer, tmp_path):
    bench = Bench(tmp_path, kernels, 66)
    weight, bias, more = bench.numbers(1, 22), bench.numbers(1, 22), bench.numbers(1, 66)
    out, sums = bench.floats(66), bench.floats(66)
    weights = [vector(weight), vector(bias) if layer else None, vector(more)]
    step = Step(Kind.NORM, 66, False, [bench.embeds, bench.embeds], [out, sums], weights, [int(layer), 3], [1e-5])
    x = bench.numbers(2, 5, 66)
    whole = 2 * x[:, -1].astype(np.float64) + more
    wanted = whole.reshape(2, 3, 22)
    wanted = wanted - wanted.mean(axis=2, keepdims=True) if layer else wanted
    wanted = wanted / np.sqrt((wanted**2).mean(axis=2, keepdims=True) + 1e-5) * weight + (bias if layer else 0)
    np.testing.assert_allclose(bench.last([step], out, x, 3), wanted.reshape(2, 66), atol=2e-5)
    np.testing.assert_allclose(bench.last([step], sums, x, 3), whole, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.ADD, Kind.MULTIPLY, Kind.UNARY, Kind.GREATER, Kind.LOOKUP, Kind.SELECT, Kind.SEEN])
def test_rows(kernels, kind, tmp_path):
    bench = Bench(tmp_path, kernels, 45)
    table, x, out, past = bench.numbers(20, 45), bench.numbers(2, 6, 45), bench.floats(45), 9
    end = x[:, -1].astype(np.float64)
    step, more = Step(kind, 45, False, [bench.embeds], [out]), {}
    if kind in (Kind.ADD, Kind.MULTIPLY):
        step.weights, wanted = [vector(table[:1])], end + table[0] if kind == Kind.ADD else end * table[0]
    elif kind == Kind.UNARY:
        step.arguments, step.reals, wanted = [int(Unary.SILU)], [0.5, 3.0], 3 * silu(end / 2)
    elif kind == Kind.GREATER:
        step.reals, wanted = [0.25], (end > 0.25) * 1.0
    elif kind == Kind.LOOKUP:
        step.inputs, step.weights, step.arguments = [bench.embeds], [vector(table)], [2, 1]
        wanted = np.stack([table[2 + past + 5]] * 2)
    elif kind == Kind.SELECT:
        bench.block_input = bench.further("block_ids", 7, "batch", "sequence")
        step.inputs = [bench.embeds, Ref(bench.embeds.buffer)]
        doubled = bench.floats(45)
        step.inputs = [doubled, bench.embeds]
        more = {"block_ids": np.array([[0] * 6, [0] * 5 + [3]])}
        wanted = end * [[1], [2]]
        twice = Step(Kind.UNARY, 45, False, [bench.embeds], [doubled], [], [0], [2.0, 1.0])
        np.testing.assert_allclose(bench.last([twice, step], out, x, past, **more), wanted, atol=1e-6)
        return
    else:
        step.arguments = [bench.further("token_mask", 7, "batch", "sequence", "images")]
        more = {"token_mask": np.array([[[0, 0]] * 6, [[0, 0]] * 5 + [[0, 1]]])}
        wanted = end * [[0], [1]]
    np.testing.assert_allclose(bench.last([step], out, x, past, **more), wanted, atol=1e-6)


def turned(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """[…, tokens, heads, size] by angles [tokens, half]; what is beyond 2 · half stays."""
    half = angles.shape[1]
    first, second = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else (x[..., :half], x[..., half : 2 * half])
    )
    cosine, sine, out = np.cos(angles)[:, None], np.sin(angles)[:, None], x.copy()
    pair = (first * cosine - second * sine, first * sine + second * cosine)
    if interleaved:
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = pair
    else:
        out[..., :half], out[..., half : 2 * half] = pair
    return out


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("source", "interleaved"), [("computed", False), ("table", True), ("none", False)])
def test_positions_cache_and_attention(kernels, call, source, interleaved, tmp_path):
    """Four query heads over two of keys: full, in a window, and with a bias of distances, where no table is."""
    rows, tokens, past = call
    heads, kv, size, half = 4, 2, 24, 8
    bench = Bench(tmp_path, kernels, (heads + 2 * kv) * size)
    shape = ("batch", kv, "capacity", size)
    for name in ("key", "value"):
        bench.inputs.append(Value(f"past_key_values.0.{name}", 1, shape))
    frequencies = (10.0 ** -np.arange(half)).astype(np.float32)
    angles = np.arange(CAPACITY)[:, None] * frequencies.astype(np.float64)
    queries, out, columns = bench.floats(heads * size), bench.floats(heads * size), (0, heads * size, (heads + kv) * size)
    places: list[Ref | None] = [Ref(bench.embeds.buffer, column) for column in columns]
    steps, weights, number = [], [], 0
    if source == "computed":
        table = bench.floats(2 * half)
        axes = integers(np.zeros(half, np.int64))
        steps = [Step(Kind.ANGLES, 2 * half, False, [], [table], [vector(frequencies[None]), axes], [half], [1.0])]
        places, number = [*places, table], 3
    elif source == "table":
        weights, number = [vector(np.cos(angles)), vector(np.sin(angles))], 1
    rotary = [2 * half if number else 0, int(interleaved), number]
    window = 50 if source == "table" else 0
    numbers = [0, 1, heads, kv, size]
    distances = bench.numbers(heads, 30)
    bias = [vector(distances)] if source == "none" else []
    steps += [
        Step(Kind.ROTARY, heads * size, False, places, [queries], weights, [*numbers, *rotary], [size**-0.5]),
        Step(Kind.ATTENTION, heads * size, False, [queries], [out], bias, [*numbers, window, 0], [0.0, 0.0]),
        Step(Kind.COMBINE, heads * size, False, [queries], [out], [], [*numbers, window, 0], [0.0, 0.0]),
    ]
    x = bench.numbers(rows, tokens, bench.width)
    before = {f"past_key_values.0.{name}": bench.numbers(rows, kv, CAPACITY, size) for name in ("key", "value")}
    found = bench.run(steps, out, x, past, **before)
    parts = np.split(x.astype(np.float64), [heads * size, (heads + kv) * size], axis=2)
    query, key, value = (part.reshape(rows, tokens, -1, size) for part in parts)
    if number:
        query, key = (turned(part, angles[past : past + tokens], interleaved) for part in (query, key))
    cached = {}
    for name, new in (("key", key), ("value", value)):
        cached[name] = before[f"past_key_values.0.{name}"].astype(np.float64)
        cached[name][:, :, past : past + tokens] = new.transpose(0, 2, 1, 3)
        np.testing.assert_allclose(found[f"present.0.{name}"], cached[name], atol=2e-4, err_msg=name)
    length = past + tokens
    key, value = (np.repeat(cached[name][:, :, :length], heads // kv, axis=1) for name in ("key", "value"))
    scores = np.einsum("rhd,rhkd->rhk", query[:, -1], key) * size**-0.5
    if bias:
        scores += distances[:, np.maximum(29 - np.arange(length)[::-1], 0)]
    if window:
        scores[..., : max(0, length - window)] = -np.inf
    weights_ = np.exp(scores - scores.max(axis=2, keepdims=True))
    wanted = np.einsum("rhk,rhkd->rhd", weights_ / weights_.sum(axis=2, keepdims=True), value)
    np.testing.assert_allclose(found["logits"].reshape(rows, heads, size), wanted, atol=3e-4)


@pytest.mark.parametrize("call", CALLS)
def test_static_keys(kernels, call, tmp_path):
    """Two images of 9 keys each; the mask hides some keys of each row, the cells one image of the last token's."""
    rows, tokens, past = call
    heads, kv, size, entries = 4, 2, 24, 18
    bench = Bench(tmp_path, kernels, heads * size)
    given = [bench.further(name, 1, "batch", kv, "source", size) for name in ("keys", "values")]
    mask = bench.further("encoder_attention_mask", 7, "batch", "source")
    cells = bench.further("token_mask", 7, "batch", "sequence", "images")
    out = bench.floats(heads * size)
    step = Step(
        Kind.CROSS, heads * size, False, [bench.embeds], [out], [], [*given, heads, kv, size, mask, cells, 0], [size**-0.5, 0.0]
    )
    x, keys, values = bench.numbers(rows, tokens, heads * size), *(bench.numbers(rows, kv, entries, size) for _ in range(2))
    seen = bench.generator.integers(0, 2, (rows, entries))
    seen[:, [0, 9]] = 1
    images = np.ones((rows, tokens, 2), np.int64)
    images[0, -1, 1] = 0
    found = bench.last([step], out, x, past, keys=keys, values=values, encoder_attention_mask=seen, token_mask=images)
    key, value = (np.repeat(array.astype(np.float64), heads // kv, axis=1) for array in (keys, values))
    scores = np.einsum("rhd,rhkd->rhk", x[:, -1].astype(np.float64).reshape(rows, heads, size), key) * size**-0.5
    visible = (seen != 0) & (np.repeat(images[:, -1], 9, axis=1) != 0)
    scores[~np.repeat(visible[:, None], heads, axis=1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    wanted = np.einsum("rhk,rhkd->rhd", weights / weights.sum(axis=2, keepdims=True), value)
    np.testing.assert_allclose(found.reshape(rows, heads, size), wanted, atol=2e-5)
