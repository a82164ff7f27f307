"""Graphs that travel without their large weights, which are filled with random numbers of the same spread on arrival.

`strip` leaves a graph with tensors below 8 KiB inside it (norms, biases, tables: as they were) and a list of what the
others looked like; `fill` writes them again. Speed does not depend on the values; they only must stay finite.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

LARGE = 8 << 10
"""Bytes from which on a tensor is left behind."""
SUFFIX = ".hollow.json"
_ALIGNMENT = 4096
_BLOCK = 1 << 22
"""Numbers that are drawn; longer tensors repeat them."""
_SHOWN = 1 << 20
"""Numbers of a tensor that are looked at for its spread."""


@dataclass(slots=True, frozen=True)
class Left:
    """One tensor that was left behind: where it lies in the data file, and its spread. `dtype` is numpy's name."""

    offset: int
    length: int
    dtype: str
    mean: float
    std: float
    low: float
    high: float


def strip(model: ir.Model, folder: Path, name: str) -> int:
    """Writes `name` and `name` + SUFFIX into `folder`: bytes that `fill` will write into `name`.data.

    Every initializer gets a place of its own, also where two shared their numbers.
    """
    left: list[Left] = []
    spreads: dict[int, tuple[float, float, float, float]] = {}
    at = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < LARGE:
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
            continue
        if id(tensor) not in spreads:
            spreads[id(tensor)] = _spread(tensor)
        left.append(Left(at, tensor.nbytes, _stored(tensor), *spreads[id(tensor)]))
        value.const_value = ir.ExternalTensor(
            f"{name}.data",
            at,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.numpy().shape),
            name=str(value.name),
            base_dir=folder,
        )
        at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    folder.mkdir(parents=True, exist_ok=True)
    proto = ir.to_proto(model)  # `ir.save` would copy the data that is not there
    (folder / name).write_bytes(proto.SerializeToString())
    (folder / f"{name}{SUFFIX}").write_text(json.dumps([asdict(one) for one in left]))
    return at


def fill(folder: Path) -> dict[Path, int]:
    """Writes the data file of every stripped graph under `folder` that has none yet: data file → bytes."""
    made = {}
    for spec in sorted(folder.rglob(f"*{SUFFIX}")):
        target = spec.with_name(f"{spec.name.removesuffix(SUFFIX)}.data")
        left = [Left(**one) for one in json.loads(spec.read_text())]
        if not left or target.is_file():
            continue
        scratch = target.with_name(f".{target.name}.part")
        random = np.random.default_rng(zlib.crc32(spec.name.encode()))
        normal = random.standard_normal(_BLOCK, dtype=np.float32)
        whole = random.integers(0, 256, 4 * _BLOCK, dtype=np.uint8)
        with scratch.open("wb") as stream:
            for one in left:
                stream.seek(one.offset)
                _write(stream, one, normal, whole)
            stream.truncate(max(stream.tell(), 1))
        scratch.rename(target)
        made[target] = target.stat().st_size
    return made


def _write(stream: Any, one: Left, normal: npt.NDArray[np.float32], whole: npt.NDArray[np.uint8]) -> None:
    dtype = np.dtype(one.dtype)
    if dtype.kind == "f":
        numbers = normal[: one.length // dtype.itemsize]  # all of them, where the tensor is longer
        numbers = (numbers * max(one.std, 1e-6) + one.mean).clip(one.low, one.high).astype(dtype)
        block = numbers.view(np.uint8)
    elif (one.low, one.high) == (0.0, 255.0) or dtype.itemsize == 1:
        block = whole
    else:  # numbers that index something: never beyond what was there
        low, high = int(one.low), int(one.high)
        block = (low + whole[:_BLOCK].astype(np.int64) % (high - low + 1)).astype(dtype).view(np.uint8)
    start = (one.offset // _ALIGNMENT * 64) % block.nbytes  # another beginning for each tensor
    start -= start % dtype.itemsize
    rest = one.length
    while rest > 0:
        piece = block[start : start + rest]
        stream.write(piece.data)
        rest -= piece.nbytes
        start = 0


def _stored(tensor: ir.TensorProtocol) -> str:
    """The numpy type that has the tensor's bytes; packed 4-bit numbers are bytes."""
    kind = tensor.dtype.numpy()
    return kind.name if kind.kind in "fiu" and tensor.dtype.bitwidth >= 8 else "uint8"


def _spread(tensor: ir.TensorProtocol) -> tuple[float, float, float, float]:
    """Mean, standard deviation, smallest and largest of the tensor's first numbers."""
    if _stored(tensor) == "uint8":
        return 0.0, 0.0, 0.0, 255.0
    shown = tensor.numpy().reshape(-1)[:_SHOWN].astype(np.float64)
    return float(shown.mean()), float(shown.std()), float(shown.min()), float(shown.max())
