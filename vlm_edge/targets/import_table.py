"""What each version of TensorRT's ONNX parser imports, as data (`imports/*.toml`), and which table holds for a target."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from vlm_edge_runtime.errors import TargetError

from .device import Device, numbers

Allowed = bool | int | float | str


class Limit(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a parser demands of an operator beyond its types. Inputs are counted from 0; where a shape or value is not known

    before the graph runs, it breaks no limit.

    `typed`: inputs whose element type must be among the operator's (the first, where nothing is said). `rank`: input → ranks.
    `constant`: inputs that must be stored in the graph. `absent`: inputs that must not be given. `given`: inputs that must be.
    `outputs`: how many outputs may be used. `attributes`: name → values that it may have. `no_attributes`: attributes that must
    not be written down, whatever their value. `below`: input → bound of its constant value. `zero`: inputs whose constant value
    must be 0. `static`: input → axes of fixed size. `alike`: inputs of one shape. `graph_input`: inputs that must be inputs of
    the graph; `graph_output`: outputs that must be its outputs. `opset`: the newest opset whose form of the operator is read.
    `unless`: an attribute that forbids an input when it is not 0. `why` and `way_out`: in words.
    """

    typed: list[int] = msgspec.field(default_factory=lambda: [0])
    rank: dict[str, list[int]] = {}
    constant: list[int] = []
    absent: list[int] = []
    given: list[int] = []
    outputs: int | None = None
    attributes: dict[str, list[Allowed]] = {}
    no_attributes: list[str] = []
    below: dict[str, int] = {}
    zero: list[int] = []
    static: dict[str, list[int]] = {}
    alike: list[int] = []
    graph_input: list[int] = []
    graph_output: list[int] = []
    opset: int | None = None
    unless: dict[str, int] = {}
    why: str = ""
    way_out: str = ""


class ImportTable(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One version of the parser. `types`: groups of ONNX element types; `ops`: operator → groups it takes; `limits`: operator →

    Limit; `missing`: operators that it does not import → the way out. Operators of other domains are `domain.Operator`.
    `documented_opset`: the newest that the release's documentation names; `sources`: where all this was read.
    """

    backend: str
    version: str
    documented_opset: int
    sources: list[str]
    types: dict[str, list[str]]
    ops: dict[str, str]
    limits: dict[str, Limit] = {}
    missing: dict[str, str] = {}

    @property
    def name(self) -> str:
        """As people say it: `TensorRT 10.3`."""
        return f"{'TensorRT-RTX' if self.backend == 'tensorrt-rtx' else 'TensorRT'} {self.version}"

    def types_of(self, op: str) -> frozenset[str]:
        """The element types that an operator of the table takes."""
        return frozenset(name for group in self.ops[op].split() for name in self.types[group])


@cache
def load_table(name: str) -> ImportTable:
    """A table by its file's name without `.toml` (`tensorrt-10.3`), over the one it extends."""
    return msgspec.convert(_merged(name), type=ImportTable)


def table_names() -> list[str]:
    """The tables there are, sorted."""
    folder = resources.files(__package__) / "imports"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def table_for(backend: str, device: Device) -> ImportTable:
    """The newest table that is not newer than the oldest TensorRT a device allows. Raises TargetError where there is none."""
    wanted = numbers(device.oldest_tensorrt)
    of_backend = [one for one in map(load_table, table_names()) if one.backend == backend]
    older = [one for one in of_backend if numbers(one.version) <= wanted]
    if not older:
        known = ", ".join(one.version for one in sorted(of_backend, key=lambda one: numbers(one.version)))
        raise TargetError(f"what {backend} {device.oldest_tensorrt} imports is not known here; there are tables for: {known}.")
    return max(older, key=lambda one: numbers(one.version))


def _merged(name: str) -> dict[str, Any]:
    table = tomllib.loads((resources.files(__package__) / "imports" / f"{name}.toml").read_text(encoding="utf-8"))
    base = table.pop("extends", None)
    if base is None:
        return table
    merged = _merged(base)
    for key, value in table.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    # What a newer parser imports is not missing from it any more.
    merged["missing"] = {op: way for op, way in merged.get("missing", {}).items() if op not in table.get("ops", {})}
    for op in table.get("missing", {}):
        merged["ops"].pop(op, None)
    return merged
