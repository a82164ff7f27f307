"""Small ONNX models that run beside a build's graphs, written here so that the runtime needs no `onnx` package.

They are spelled out in protobuf's wire format with the field numbers of onnx.proto (opset 17, IR version 8).
"""

from __future__ import annotations

from collections.abc import Sequence

FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10
ELEMENTS = {"float32": FLOAT, "int32": INT32, "int64": INT64, "float16": FLOAT16}
"""ONNX's numbers for element types, by numpy's names."""


def cast(rank: int, given: str, wanted: str) -> bytes:
    """`given` of `rank` dimensions → `wanted`, the same numbers in another type (both numpy's names)."""
    shape = [f"d{axis}" for axis in range(rank)]
    node = _node("Cast", ["given"], "wanted", to=ELEMENTS[wanted])
    return _model("cast", [node], [_value("given", ELEMENTS[given], shape)], [_value("wanted", ELEMENTS[wanted], shape)])


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


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    """NodeProto with whole numbers as attributes."""
    body = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind)
    for name, value in attributes.items():
        body += _field(5, _field(1, name) + _field(3, value) + _field(20, 2))  # AttributeProto.INT
    return body


def _value(name: str, element: int, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto of a tensor; words are dim_param, numbers dim_value."""
    dims = b"".join(_field(1, _field(2, size) if isinstance(size, str) else _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, dims)))


def _model(name: str, nodes: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, name)
    graph += b"".join(_field(11, value) for value in inputs) + b"".join(_field(12, value) for value in outputs)
    return _field(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, 17))
