"""Every step that plans of encoders have, by itself against float64, on each instruction set and on odd shapes."""

from __future__ import annotations

from math import erf
from pathlib import Path

import numpy as np
import pytest

from vlm_edge.targets.native.encoder_products import byte_matrix
from vlm_edge.targets.native.panels import Quantised, floating, half_rows, integers, quantised, vector
from vlm_edge.targets.native.plan_file import Buffer, BufferKind, GraphKind, Over, Plan, Ref, Step, Unary, Value, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge_runtime import _native

UNARIES = {
    Unary.IDENTITY: lambda x: x,
    Unary.SILU: lambda x: x / (1 + np.exp(-x)),
    Unary.GELU: lambda x: x * (1 + np.vectorize(erf)(x / 2**0.5)) / 2,
    Unary.GELU_TANH: lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    Unary.QUICK_GELU: lambda x: x / (1 + np.exp(-1.702 * x)),
    Unary.RELU: lambda x: np.maximum(x, 0),
    Unary.TANH: np.tanh,
    Unary.SIGMOID: lambda x: 1 / (1 + np.exp(-x)),
}
IMAGES = 3

pytestmark = pytest.mark.parametrize("kernels", _native.kernels())


def given(number: int, array: np.ndarray) -> Ref:
    """The place of an input [images, rows, width]."""
    return Ref(Buffer(BufferKind.INPUT, array.shape[2], number, array.shape[1]))


def made(rows: int, width: int) -> Ref:
    return Ref(Buffer(BufferKind.OUTPUT, width, 0, rows))


def run(folder: Path, kernels: str, steps: list[Step], *inputs: np.ndarray, threads: int = 2) -> np.ndarray:
    """The plan's only output; inputs are floats, or int64."""
    out = next(ref.buffer for step in steps for ref in step.outputs if ref and ref.buffer.kind == BufferKind.OUTPUT)
    types = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}
    values = [Value(f"x{number}", types[array.dtype], ("images", *array.shape[1:])) for number, array in enumerate(inputs)]
    result = Value("y", 1, ("images", out.rows, out.width))
    write(Plan(values, [result], 0, 0, 0, steps, graph=True), folder / "steps.plan")
    session = PlanSession(folder / "steps.plan", threads=threads, kernels=kernels)
    (found,) = session.run(None, {f"x{number}": array for number, array in enumerate(inputs)})
    return found.astype(np.float64)


def numbers(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 7), (33, 64)])
def test_copy(kernels, rows, length, tmp_path):
    generator = np.random.default_rng(rows)
    x, table = numbers(generator, IMAGES, rows, 3 * length), numbers(generator, rows, 3 * length)
    pieces = generator.permutation(3 * rows)
    places = integers(np.stack([np.arange(3 * rows) * length, pieces * length], axis=1).reshape(-1))
    moved = run(
        tmp_path,
        kernels,
        [Step(GraphKind.COPY, 3 * length, False, [given(0, x)], [made(rows, 3 * length)], [places], [length])],
        x,
    )
    np.testing.assert_array_equal(moved, x.reshape(IMAGES, -1, length)[:, pieces].reshape(x.shape))
    step = Step(GraphKind.COPY, 3 * length, False, [None], [made(rows, 3 * length)], [places, vector(table)], [length])
    kept = Step(
        GraphKind.UNARY, 3 * length, False, [given(0, x)], [Ref(Buffer(BufferKind.FLOATS, 3 * length, rows=rows))], reals=[1, 1]
    )
    stored = run(tmp_path, kernels, [kept, step], x)
    np.testing.assert_array_equal(stored, np.stack([table.reshape(-1, length)[pieces].reshape(rows, -1)] * IMAGES))


@pytest.mark.parametrize("kind", ["float", "int4", "int8", "bytes"])
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), (5, 33, 17), (50, 100, 70), (130, 64, 130)])
def test_products(kernels, kind, rows, depth, width, tmp_path):
    """Within what rounding the activations to 8 bits may do to a sum, and for bytes the weights."""
    generator = np.random.default_rng(depth)
    unary = list(Unary)[depth % len(Unary)]
    x, w, bias = numbers(generator, IMAGES, rows, depth), numbers(generator, depth, width), numbers(generator, width)
    source, error, steps = given(0, x), np.zeros((IMAGES, rows, width)), []
    weights = [floating(depth, np.arange(width), lambda: w), vector(bias)]
    if kind != "float":
        form = BufferKind.BYTES if kind == "bytes" else BufferKind.CODES
        codes = Ref(Buffer(form, depth, rows=rows))
        steps = [Step(GraphKind.QUANTIZE, depth, False, [source], [codes])]
        source = codes
    if kind == "bytes":
        weights = [byte_matrix(depth, width, lambda: w, bias)]
        step = (np.maximum(x.max(axis=2), 0) - np.minimum(x.min(axis=2), 0)) / 255
        coarse = np.abs(w).max(axis=0) / 127
        error = np.abs(x).sum(axis=2)[..., None] * coarse / 2 + step[..., None] * (np.abs(w) + coarse / 2).sum(axis=0)
    elif kind != "float":
        bits, blocks = int(kind[3:]), -(-depth // 32)
        stored = generator.integers(0, 1 << bits, (width, blocks, 32)).astype(np.uint8)
        scales = generator.uniform(0.01, 0.1, (width, blocks)).astype(np.float32)
        packed = stored if bits == 8 else (stored[..., 0::2] | (stored[..., 1::2] << 4)).astype(np.uint8)
        weights = [quantised(Quantised(bits, 32, depth, lambda: packed, lambda: scales), np.arange(width)), vector(bias)]
        exact = np.float16(scales / np.float32(weights[0].scale)).astype(np.float64) * weights[0].scale
        w = ((stored - float(1 << (bits - 1))) * exact[..., None]).reshape(width, -1).T[:depth]
        padded = np.pad(np.abs(x), ((0, 0), (0, 0), (0, blocks * 32 - depth))).reshape(IMAGES, rows, blocks, 32).max(axis=3)
        error = np.repeat(padded / 127 / 2, 32, axis=2)[..., :depth] @ np.abs(w)
    steps.append(Step(GraphKind.MATMUL, width, False, [source], [made(rows, width)], weights, [int(unary)]))
    found = run(tmp_path, kernels, steps, x)
    wanted = UNARIES[unary](x.astype(np.float64) @ w.astype(np.float64) + bias)
    allowed = 1.7 * (1.02 * error + 1e-6 * (np.abs(x) @ np.abs(w) + 1))  # no slope of them is steeper
    assert (np.abs(found - wanted) <= allowed).all(), np.abs(found - wanted).max()
    assert np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max() + 0.1


def test_products_of_bytes_are_added_to_what_is_there(kernels, tmp_path):
    generator = np.random.default_rng(0)
    x, w = np.rint(numbers(generator, IMAGES, 5, 40) * 50), np.rint(numbers(generator, 40, 23) * 30)
    x[:, :, :2], w[0] = (-127, 128), 127  # codes are the numbers themselves
    x, before = np.clip(x, -127, 128).astype(np.float32), numbers(generator, IMAGES, 5, 23)
    w = np.clip(w, -127, 127).astype(np.float32)
    codes, out = Ref(Buffer(BufferKind.BYTES, 40, rows=5)), made(5, 23)
    steps = [
        Step(GraphKind.UNARY, 23, False, [given(1, before)], [out], reals=[1.0, 1.0]),
        Step(GraphKind.QUANTIZE, 40, False, [given(0, x)], [codes]),
        Step(GraphKind.MATMUL, 23, False, [codes], [out], [byte_matrix(40, 23, lambda: w, None)], [0, 1]),
    ]
    found = run(tmp_path, kernels, steps, x, before)
    np.testing.assert_allclose(found, before + x.astype(np.float64) @ w, rtol=1e-5, atol=0.05)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 1, 1), (7, 66, 3), (40, 129, 1)])
def test_norms(kernels, layer, rows, width, groups, tmp_path):
    generator = np.random.default_rng(width)
    x, y = numbers(generator, IMAGES, rows, width), numbers(generator, IMAGES, rows, width)
    weight, bias, more = numbers(generator, width // groups), numbers(generator, width // groups), numbers(generator, width)
    sums = Ref(Buffer(BufferKind.FLOATS, width, rows=rows))
    step = Step(GraphKind.NORM, width, False, [given(0, x), given(1, y)], [made(rows, width), sums])
    step.weights = [vector(weight[None]), vector(bias[None]) if layer else None, vector(more[None])]
    step.arguments, step.reals = [int(layer), groups], [1e-5]
    found = run(tmp_path, kernels, [step], x, y)
    wanted = (x.astype(np.float64) + y + more).reshape(IMAGES, rows, groups, -1)
    wanted = wanted - wanted.mean(axis=3, keepdims=True) if layer else wanted
    wanted = wanted / np.sqrt((wanted**2).mean(axis=3, keepdims=True) + 1e-5) * weight + (bias if layer else 0)
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=2e-5 if width > 1 else 2e-3)
    step.outputs = [Ref(Buffer(BufferKind.FLOATS, width, rows=rows)), made(rows, width)]
    np.testing.assert_allclose(run(tmp_path, kernels, [step], x, y), x.astype(np.float64) + y + more, atol=1e-6)


@pytest.mark.parametrize(("rows", "keys", "heads", "size"), [(1, 1, 1, 1), (5, 70, 3, 7), (300, 33, 2, 64), (9, 200, 1, 80)])
@pytest.mark.parametrize("half", [False, True])
def test_attention(kernels, rows, keys, heads, size, half, tmp_path):
    """Queries of some rows over the keys and values of others, which lie beside each other; more queries than an item takes."""
    generator = np.random.default_rng(rows)
    x, both = numbers(generator, IMAGES, rows, heads * size), numbers(generator, IMAGES, keys, 2 * heads * size)
    beside = given(1, both)
    step = Step(GraphKind.ATTENTION, heads * size, False, [given(0, x), beside, Ref(beside.buffer, heads * size)])
    step.outputs, step.arguments, step.reals = [made(rows, heads * size)], [heads, size, int(half)], [size**-0.5]
    found = run(tmp_path, kernels, [step], x, both)

    def by_head(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float64).reshape(IMAGES, -1, heads, size).transpose(0, 2, 1, 3)

    key, value = by_head(both[..., : heads * size]), by_head(both[..., heads * size :])
    scores = by_head(x) @ key.transpose(0, 1, 3, 2) * size**-0.5
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    wanted = (weights / weights.sum(axis=3, keepdims=True)) @ value
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 1, 3).reshape(found.shape), atol=0.03 if half else 1e-5)


@pytest.mark.parametrize("unary", UNARIES)
def test_unary(kernels, unary, tmp_path):
    x = numbers(np.random.default_rng(0), IMAGES, 6, 45)
    x[0, 0, :4] = (0.0, 1e-41, 60.0, -60.0)
    wide = Ref(given(0, x).buffer, 2)
    found = run(tmp_path, kernels, [Step(GraphKind.UNARY, 43, False, [wide], [made(6, 43)], [], [int(unary)], [0.5, 3.0])], x)
    np.testing.assert_allclose(found, 3 * UNARIES[unary](0.5 * x[..., 2:].astype(np.float64)), atol=2e-5)


@pytest.mark.parametrize("kind", [GraphKind.ADD, GraphKind.MULTIPLY])
def test_sums_and_products_of_rows(kernels, kind, tmp_path):
    generator = np.random.default_rng(0)
    x, y, table = numbers(generator, IMAGES, 6, 45), numbers(generator, IMAGES, 6, 45), numbers(generator, 6, 45)
    apply = np.add if kind == GraphKind.ADD else np.multiply
    for sources, weights, other, inputs in (
        ([given(0, x), given(1, y)], [], y, (x, y)),
        ([given(0, x)], [vector(table)], table, (x,)),
        ([given(0, x)], [vector(table[:1])], table[0], (x,)),
    ):
        found = run(tmp_path, kernels, [Step(kind, 45, False, sources, [made(6, 45)], weights)], *inputs)
        np.testing.assert_array_equal(found, apply(x, other))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 3)])
def test_integers_and_waves(kernels, rows, width, tmp_path):
    places = np.random.default_rng(0).integers(-50, 1 << 20, (IMAGES, rows, width))
    found = run(tmp_path, kernels, [Step(GraphKind.CONVERT, width, False, [given(0, places)], [made(rows, width)])], places)
    np.testing.assert_array_equal(found, places)
    angles = numbers(np.random.default_rng(0), IMAGES, rows, width) * 300
    for sine, function in ((0, np.cos), (1, np.sin)):
        step = Step(GraphKind.COSINE, width, False, [given(0, angles)], [made(rows, width)], arguments=[sine])
        np.testing.assert_allclose(run(tmp_path, kernels, [step], angles), function(angles.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 2), (9, 3, 14), (40, 4, 80)])
def test_rotary(kernels, rows, heads, size, tmp_path):
    """From beside other columns; the tables' halves may differ."""
    generator = np.random.default_rng(rows)
    x = numbers(generator, IMAGES, rows, 3 * heads * size)
    tables = [numbers(generator, IMAGES, rows, size) for _ in range(2)]
    inputs = [Ref(given(0, x).buffer, heads * size), given(1, tables[0]), given(2, tables[1])]
    step = Step(GraphKind.ROTARY, heads * size, False, inputs, [made(rows, heads * size)], arguments=[heads, size])
    found = run(tmp_path, kernels, [step], x, *tables)
    part = x[..., heads * size : 2 * heads * size].astype(np.float64).reshape(IMAGES, rows, heads, size)
    turned = np.concatenate([-part[..., size // 2 :], part[..., : size // 2]], axis=3)
    wanted = part * tables[0][:, :, None] + turned * tables[1][:, :, None]
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-6)


@pytest.mark.parametrize(("rows", "entries", "width"), [(1, 1, 1), (5, 3, 17), (33, 4, 64)])
def test_gather(kernels, rows, entries, width, tmp_path):
    """Rows of a stored table, and of what is computed, of all images; negative places count from the end."""
    generator = np.random.default_rng(rows)
    x, table = numbers(generator, IMAGES, rows, width + 2), numbers(generator, rows, width)
    places = generator.integers(-rows, rows, (IMAGES, rows, entries))
    out = made(rows * entries, width)
    step = Step(GraphKind.GATHER, width, False, [None, given(0, places)], [out], [vector(table)])
    np.testing.assert_array_equal(run(tmp_path, kernels, [step], places), table[places].reshape(IMAGES, -1, width))
    places = generator.integers(-IMAGES * rows, IMAGES * rows, (IMAGES, rows, entries))
    step = Step(GraphKind.GATHER, width, False, [Ref(given(0, x).buffer, 1), given(1, places)], [out])
    wanted = x[..., 1 : 1 + width].reshape(-1, width)[places].reshape(IMAGES, -1, width)
    np.testing.assert_array_equal(run(tmp_path, kernels, [step], x, places), wanted)


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 1), (41, 3, 7), (300, 2, 80)])
@pytest.mark.parametrize("segments", [0, 1, 2, 7])
@pytest.mark.parametrize("half", [False, True])
def test_attention_over_the_rows_of_all_images(kernels, rows, heads, size, segments, half, tmp_path):
    """Over all of them (0 segments), or over those with the same integer, which lie together: also more than an item takes."""
    generator = np.random.default_rng(rows)
    x, width = numbers(generator, IMAGES, rows, 3 * heads * size), heads * size
    ids = np.sort(generator.integers(-1, max(segments, 1) - 1, IMAGES * rows)).reshape(IMAGES, rows, 1)
    beside = given(0, x)
    inputs = [beside, Ref(beside.buffer, width), Ref(beside.buffer, 2 * width), *([given(1, ids)] if segments else [])]
    step = Step(GraphKind.ATTENTION, width, False, inputs, [made(rows, width)], reals=[size**-0.5])
    step.arguments = [heads, size, int(half), 0, 0, int(Over.SEGMENTS if segments else Over.ALL)]
    found = run(tmp_path, kernels, [step], x, *([ids] if segments else []))
    query, key, value = x.astype(np.float64).reshape(IMAGES * rows, 3, heads, size).transpose(1, 2, 0, 3)
    scores = query @ key.transpose(0, 2, 1) * size**-0.5
    flat = ids.reshape(-1)
    if segments:
        scores = np.where(flat[:, None] == flat, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    wanted = (weights / weights.sum(axis=2, keepdims=True)) @ value
    np.testing.assert_allclose(found, wanted.transpose(1, 0, 2).reshape(found.shape), atol=0.06 if half else 1e-5)


def integers_given(number: int, array: np.ndarray) -> Ref:
    """The place of an input of int64 [images, rows]."""
    return Ref(Buffer(BufferKind.INPUT, 1, number, array.shape[1]))


def run_typed(folder: Path, kernels: str, steps: list[Step], *inputs: np.ndarray) -> np.ndarray:
    """As `run`, of inputs of int64 [images, rows] too."""
    out = next(ref.buffer for step in steps for ref in step.outputs if ref and ref.buffer.kind == BufferKind.OUTPUT)
    types = {"float32": 1, "int64": 7}
    values = [Value(f"x{number}", types[array.dtype.name], ("images", *array.shape[1:])) for number, array in enumerate(inputs)]
    result = Value("y", 1, ("images", out.rows, out.width))
    write(Plan(values, [result], 0, 0, 0, steps, graph=True), folder / "steps.plan")
    session = PlanSession(folder / "steps.plan", threads=2, kernels=kernels)
    (found,) = session.run(None, {f"x{number}": array for number, array in enumerate(inputs)})
    return found.astype(np.float64)


@pytest.mark.parametrize(("rows", "prefix", "heads", "size"), [(1, 0, 1, 1), (5, 2, 3, 7), (150, 0, 2, 64), (600, 3, 1, 16)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_attention_with_hidden_keys(kernels, rows, prefix, heads, size, causal, half, tmp_path):
    """Keys hidden anywhere, and those after the query; a query that sees none takes the mean of all values."""
    generator = np.random.default_rng(rows)
    q, k, v = (numbers(generator, IMAGES, rows, heads * size) for _ in range(3))
    mask = generator.integers(0, 2, (IMAGES, rows - prefix)).astype(np.int64)
    mask[0, :2], mask[1] = 0, 1
    step = Step(GraphKind.ATTENTION, heads * size, False, [given(0, q), given(1, k), given(2, v), integers_given(3, mask)])
    step.outputs, step.arguments = [made(rows, heads * size)], [heads, size, int(half), int(causal), prefix]
    step.reals = [size**-0.5]
    found = run_typed(tmp_path, kernels, [step], q, k, v, mask)
    seen = np.concatenate([np.ones((IMAGES, prefix), bool), mask != 0], axis=1)[:, None] & (
        np.tri(rows, dtype=bool) | (not causal)
    )
    by_head = [x.astype(np.float64).reshape(IMAGES, rows, heads, size).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = by_head[0] @ by_head[1].transpose(0, 1, 3, 2) * size**-0.5
    blind = ~seen.any(axis=2, keepdims=True)
    scores = np.where(blind[:, None], 0, np.where(seen[:, None], scores, -np.inf))
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    wanted = (weights / weights.sum(axis=3, keepdims=True)) @ by_head[2]
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 1, 3).reshape(found.shape), atol=0.03 if half else 1e-5)


@pytest.mark.parametrize("rule", [0, 1, 2])
def test_one_row_of_each_image(kernels, rule, tmp_path):
    generator = np.random.default_rng(rule)
    x, ids = numbers(generator, 5, 9, 13), generator.integers(0, 4, (5, 9)).astype(np.int64)
    ids[1], ids[2, :], ids[2, 4] = 0, 2, 3  # none, and one
    step = Step(GraphKind.PICK, 13, False, [given(0, x), integers_given(1, ids)], [Ref(Buffer(BufferKind.OUTPUT, 13, 0, 1))])
    step.arguments = [rule, 3]
    wanted = [ids.argmax(axis=1), (ids == 3).argmax(axis=1), (ids != 0).sum(axis=1) - 1][rule]
    found = run_typed(tmp_path, kernels, [step], x, ids)
    np.testing.assert_array_equal(found[:, 0], x[np.arange(5), wanted])


@pytest.mark.parametrize("half", [False, True])
def test_rows_of_a_table_in_floats_or_halves(kernels, half, tmp_path):
    generator = np.random.default_rng(0)
    table, ids = numbers(generator, 20, 33), generator.integers(0, 20, (IMAGES, 6)).astype(np.int64)
    stored = half_rows(table) if half else vector(table)
    step = Step(GraphKind.GATHER, 33, False, [None, integers_given(0, ids)], [made(6, 33)], [stored])
    found = run_typed(tmp_path, kernels, [step], ids)
    np.testing.assert_array_equal(found, (table.astype(np.float16) if half else table)[ids])


@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_copies_by_runs_and_tables_of_any_length(kernels, length, tmp_path):
    """[rows, heads · 5] → [heads, rows, 5], plus the first rows of a table; the file's sizes are those of a length of 9."""
    generator = np.random.default_rng(length)
    x, table = numbers(generator, IMAGES, length, 10), numbers(generator, 30, 10)
    source, total = Buffer(BufferKind.INPUT, 10, 0, 9), Buffer(BufferKind.FLOATS, 10, rows=9)
    out = Buffer(BufferKind.OUTPUT, 5, 0, 18)
    runs = integers(np.asarray([0, 0, 0, 0, 0, 1, 5, 0, 10, 0, 5, 0, 0, 5, 5, 0, 0, 1, 5, 0, 10, 0, 5, 0], np.int32))
    sizes = integers(np.asarray([0, 1, 0, 1, 0, 2], np.int32))
    steps = [
        Step(GraphKind.LENGTH, 1, weights=[sizes], arguments=[9, 30]),
        Step(GraphKind.ADD, 10, False, [Ref(source)], [Ref(total)], [vector(table)]),
        Step(GraphKind.SPREAD, 5, False, [Ref(total)], [Ref(out)], [runs]),
    ]
    values = Value("x", 1, ("images", "length", 10)), Value("y", 1, ("images", 2, "length", 5))
    write(Plan([values[0]], [values[1]], 0, 0, 0, steps, graph=True), tmp_path / "steps.plan")
    session = PlanSession(tmp_path / "steps.plan", threads=2, kernels=kernels)
    (found,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(found, (x + table[:length]).reshape(IMAGES, length, 2, 5).transpose(0, 2, 1, 3))
