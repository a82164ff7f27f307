"""Two small ONNX models that the CUDA loop runs beside the decoder, written here so that the runtime needs no `onnx` package.

Both are spelled out in protobuf's wire format with the field numbers of onnx.proto (opset 17, IR version 8).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

FLOAT, INT32, INT64, BOOL, FLOAT16 = 1, 6, 7, 9, 10
ELEMENTS = {"float32": FLOAT, "int32": INT32, "int64": INT64, "float16": FLOAT16}
"""ONNX's numbers for element types, by numpy's names."""

_LARGEST_VOCABULARY = 1 << 24
"""Token ids are compared as float32, which holds whole numbers exactly up to here."""


def greedy_sampler(vocab: int, logits: str) -> bytes:
    """`logits` [batch, 1, vocab] of that numpy type → `ids` int64 [batch, 1] and `faults` float32 [batch, 1].

    `ids` is the first token with the largest logit, as the host's sampler chooses (ArgMax on CUDA promises no order among
    equals, and float16 logits often are). `faults` is not 0 where a logit is NaN or +∞ or all are −∞: no token follows from
    those. Comparisons find them, since a maximum may drop NaN. Raises ValueError for a vocabulary that float32 cannot count.
    """
    if vocab > _LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab} tokens is more than {_LARGEST_VOCABULARY}")
    constants = [
        _tensor("numbers", [vocab], np.arange(vocab, dtype=np.float32)),
        _tensor("none", [], np.array(vocab, np.float32)),
        _tensor("highest", [], np.array(np.inf, np.float32)),
        _tensor("lowest", [], np.array(-np.inf, np.float32)),
        _tensor("one", [], np.array(1, np.float32)),
        _tensor("two", [], np.array(2, np.float32)),
    ]
    each: dict[str, int | list[int]] = {"axes": [2], "keepdims": 0}
    nodes = [
        _node("Cast", ["logits"], "scores", to=FLOAT),
        _node("ReduceMax", ["scores"], "top", axes=[2], keepdims=1),
        _node("Equal", ["scores", "top"], "is_top"),
        _node("Where", ["is_top", "numbers", "none"], "tops"),
        _node("ReduceMin", ["tops"], "first", **each),
        _node("Less", ["scores", "highest"], "is_sound"),
        _node("Not", ["is_sound"], "is_unsound"),
        _node("Cast", ["is_unsound"], "unsound", to=FLOAT),
        _node("ReduceMax", ["unsound"], "any_unsound", **each),
        _node("Greater", ["scores", "lowest"], "is_allowed"),
        _node("Cast", ["is_allowed"], "allowed", to=FLOAT),
        _node("ReduceMax", ["allowed"], "any_allowed", **each),
        _node("Sub", ["one", "any_allowed"], "none_allowed"),
        _node("Mul", ["none_allowed", "two"], "masked"),
        _node("Max", ["any_unsound", "masked"], "faults"),
        _node("Sub", ["none", "one"], "last"),
        _node("Min", ["first", "last"], "inside"),  # all NaN: equal to nothing; the id is not used, but embedded
        _node("Cast", ["inside"], "ids", to=INT64),
    ]
    inputs = [_value("logits", ELEMENTS[logits], ["batch", 1, vocab])]
    outputs = [_value("ids", INT64, ["batch", 1]), _value("faults", FLOAT, ["batch", 1])]
    return _model("greedy_sampler", nodes, constants, inputs, outputs)


def cast(hidden: int, given: str, wanted: str) -> bytes:
    """`given` [batch, sequence, hidden] → `wanted`, the same numbers in another type (both numpy's names)."""
    shape: list[int | str] = ["batch", "sequence", hidden]
    node = _node("Cast", ["given"], "wanted", to=ELEMENTS[wanted])
    return _model("cast", [node], [], [_value("given", ELEMENTS[given], shape)], [_value("wanted", ELEMENTS[wanted], shape)])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def _field(number: int, payload: bytes | str | int) -> bytes:
    if isinstance(payload, int):
        return _varint(number << 3) + _varint(payload)
    data = payload.encode() if isinstance(payload, str) else payload
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, shape: Sequence[int], array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    """TensorProto: dims, data_type, name, raw_data (little-endian)."""
    raw = struct.pack(f"<{array.size}f", *array.reshape(-1).tolist())
    return b"".join(_field(1, size) for size in shape) + _field(2, FLOAT) + _field(8, name) + _field(9, raw)


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: int | list[int]) -> bytes:
    """NodeProto with whole numbers as attributes."""
    body = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind)
    for name, value in attributes.items():
        if isinstance(value, int):
            attribute = _field(1, name) + _field(3, value) + _field(20, 2)  # AttributeProto.INT
        else:
            attribute = _field(1, name) + b"".join(_field(8, one) for one in value) + _field(20, 7)  # AttributeProto.INTS
        body += _field(5, attribute)
    return body


def _value(name: str, element: int, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto of a tensor; words are dim_param, numbers dim_value."""
    dims = b"".join(_field(1, _field(2, size) if isinstance(size, str) else _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, dims)))


def _model(
    name: str, nodes: Sequence[bytes], constants: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes]
) -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, name)
    graph += b"".join(_field(5, constant) for constant in constants)
    graph += b"".join(_field(11, value) for value in inputs) + b"".join(_field(12, value) for value in outputs)
    return _field(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, 17))
