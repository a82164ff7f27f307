"""Graphs of one interesting node each: some that TensorRT imports, and one for each thing that it refuses."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
from small_graphs import Sketch

INT64 = ir.DataType.INT64


def attention(*, past=False, outputs=1, mask=None, opset=23, **attributes) -> ir.Model:
    """Attention over 4 heads; `mask`: its rank."""
    sketch = Sketch(opset)
    query, key, value = (sketch.input(name, [1, 4, 2, 8]) for name in "qkv")
    inputs = [query, key, value, sketch.input("mask", [1] * (mask - 2) + [2, 2]) if mask else None]
    if past:
        inputs += [sketch.input(f"past.{name}", [1, 4, 3, 8]) for name in "kv"]
    shapes = [[1, 4, 2, 8], [1, 4, 5, 8], [1, 4, 5, 8]][:outputs]
    for number, out in enumerate(sketch.node("Attention", inputs, attributes, shapes=shapes, name="attention")):
        sketch.output(f"out{number}", out)
    return sketch.model()


def scatter(*, capacity: int | str = 16, axis: int = -2, mode: str = "linear", computed: bool = False) -> ir.Model:
    """A cache written by TensorScatter."""
    sketch = Sketch(24)
    shape = [1, 2, capacity, 8]
    cache, update = sketch.input("past_key_values.0.key", shape), sketch.input("update", [1, 2, 1, 8])
    write = sketch.input("write", [1], INT64)
    source = sketch.node("Mul", [cache, cache], shape=shape) if computed else cache
    out = sketch.node("TensorScatter", [source, update, write], {"axis": axis, "mode": mode}, shape=shape, name="scatter")
    sketch.output("present.0.key", out)
    return sketch.model()


def unary(op: str, shape=(2, 4), dtype=ir.DataType.FLOAT, opset=23, domain="", **attributes) -> ir.Model:
    """One input, one output of the same type and shape."""
    sketch = Sketch(opset)
    value = sketch.input("x", list(shape), dtype)
    sketch.output("y", sketch.node(op, [value], attributes, shape=list(shape), dtype=dtype, domain=domain, name=op.lower()))
    return sketch.model()


def weighted(op: str, weights: dict[str, np.ndarray], shape=(2, 4), out=(2, 4), opset=23, **attributes) -> ir.Model:
    """One input and stored further ones."""
    sketch = Sketch(opset)
    value = sketch.input("x", list(shape))
    stored = [sketch.weight(name, array) for name, array in weights.items()]
    sketch.output("y", sketch.node(op, [value, *stored], attributes, shape=list(out), name=op.lower()))
    return sketch.model()


def reduce(*, stored: bool) -> ir.Model:
    sketch = Sketch()
    value = sketch.input("x", [2, 4])
    axes = sketch.weight("axes", np.array([1])) if stored else sketch.input("axes", [1], INT64)
    sketch.output("y", sketch.node("ReduceMean", [value, axes], {"keepdims": 1}, shape=[2, 1], name="mean"))
    return sketch.model()


def scatter_nd(opset: int = 20, **attributes) -> ir.Model:
    sketch = Sketch(opset)
    data, rows = sketch.input("data", [4, 8]), sketch.input("rows", [1, 1], INT64)
    update = sketch.input("update", [1, 8])
    sketch.output("y", sketch.node("ScatterND", [data, rows, update], attributes, shape=[4, 8], name="scatter_nd"))
    return sketch.model()


def top_k(k: int) -> ir.Model:
    sketch = Sketch()
    value = sketch.input("x", [1, 5000])
    best, where = sketch.node("TopK", [value, sketch.weight("k", np.array([k]))], shapes=[[1, k], [1, k]], name="topk")
    where.type = ir.TensorType(INT64)
    sketch.output("best", best)
    sketch.output("where", where)
    return sketch.model()


def grid_sample(dims: int) -> ir.Model:
    sketch = Sketch(20)
    size = [4] * (dims - 2)
    value, grid = sketch.input("x", [1, 2, *size]), sketch.input("grid", [1, *size, dims - 2])
    sketch.output("y", sketch.node("GridSample", [value, grid], shape=[1, 2, *size], name="grid"))
    return sketch.model()


def resize(**attributes) -> ir.Model:
    sketch = Sketch()
    value = sketch.input("x", [1, 2, 4, 4])
    sizes = sketch.weight("sizes", np.array([1, 2, 8, 8]))
    made = sketch.node("Resize", [value, None, None, sizes], {"mode": "linear"} | attributes, shape=[1, 2, 8, 8], name="resize")
    sketch.output("y", made)
    return sketch.model()


def dequantize(kind: str, zero: int | None = None) -> ir.Model:
    """A product whose weights are stored in `kind`."""
    dtype = {"int4": ml_dtypes.int4, "uint8": np.uint8, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}[kind]
    sketch = Sketch()
    value, weight = sketch.input("x", [1, 64]), sketch.weight("w", np.ones((64, 32), dtype))
    blocks = (2, 32) if kind == "int4" else ()
    inputs = [weight, sketch.weight("scale", np.full(blocks, 0.1, np.float32))]
    if zero is not None:
        inputs.append(sketch.weight("zero", np.full(blocks, zero, dtype)))
    options = {"axis": 0, "block_size": 32} if kind == "int4" else {}
    read = sketch.node("DequantizeLinear", inputs, options, shape=[64, 32], name="dequantize")
    sketch.output("y", sketch.node("MatMul", [value, read], shape=[1, 32], name="product"))
    return sketch.model()


def whole_numbers() -> ir.Model:
    """MatMulInteger."""
    sketch = Sketch()
    left = sketch.input("x", [2, 4], ir.DataType.UINT8)
    right = sketch.weight("w", np.ones((4, 4), np.int8))
    sketch.output("y", sketch.node("MatMulInteger", [left, right], shape=[2, 4], dtype=ir.DataType.INT32, name="integers"))
    return sketch.model()


def group_norm() -> ir.Model:
    """GroupNormalization of opset 21."""
    ones = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    return weighted("GroupNormalization", ones, (1, 4, 4), (1, 4, 4), 21, num_groups=2)


BUILDABLE: dict[str, Callable[[], ir.Model]] = {
    "attention": attention,
    "attention, additive mask": lambda: attention(mask=4),
    "attention, causal": lambda: attention(is_causal=1),
    "cache written in place": scatter,
    "norm": lambda: weighted("RMSNormalization", {"scale": np.ones(4, np.float32)}, axis=-1),
    "swish": lambda: unary("Swish", opset=24),
    "stored axes": lambda: reduce(stored=True),
    "scatter_nd, none": lambda: scatter_nd(reduction="none"),
    "top 3839": lambda: top_k(3839),
    "grid of pictures": lambda: grid_sample(4),
    "linear resize": resize,
    "int4": lambda: dequantize("int4"),
    "int8, zero 0": lambda: dequantize("int8", 0),
    "group norm": group_norm,
    "gelu": lambda: unary("Gelu"),
}
"""Graphs that TensorRT-RTX 1.7 imports."""

REFUSED: dict[str, tuple[Callable[[], ir.Model], str]] = {
    "past inside": (lambda: attention(past=True), "input 4 \\(past_key\\) is given"),
    "present outside": (lambda: attention(past=True, outputs=3), "3 outputs are used"),
    "soft-cap": (lambda: attention(softcap=30.0), "softcap is 30.0"),
    "mask and causal": (lambda: attention(mask=4, is_causal=1), "is_causal and input 3 \\(attn_mask\\) exclude"),
    "cache of any size": (lambda: scatter(capacity="slots"), "has no fixed size on axis 2"),
    "cache along heads": (lambda: scatter(axis=1), "axis is 1"),
    "ring buffer": (lambda: scatter(mode="circular"), "mode is circular"),
    "cache inside": (lambda: scatter(computed=True), "is not an input of the graph"),
    "computed axes": (lambda: reduce(stored=False), "input 1 \\(axes\\) is computed"),
    "scatter_nd, add": (lambda: scatter_nd(reduction="add"), "reduction is add"),
    "top 4000": (lambda: top_k(4000), "is 4000; it must be below"),
    "antialias": (lambda: resize(antialias=1), "antialias is 1"),
    "int8, zero 3": (lambda: dequantize("int8", 3), "is not zero"),
    "uint8": (lambda: dequantize("uint8"), "is UINT8"),
    "integer product": (whole_numbers, "does not import it"),
    "com.microsoft": (lambda: unary("QuickGelu", domain="com.microsoft", alpha=1.702), "does not import it"),
    "int8 table": (lambda: unary("Sin", dtype=ir.DataType.INT32), "is INT32"),
    "unknown": (lambda: unary("Det", (1, 4, 4)), "does not import it"),
}
"""Graphs that it refuses, with the words of the reason."""
