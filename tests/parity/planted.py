"""Copies of bundles with one thing wrong, whose hashes are right: what damage by a compiler looks like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_edge_runtime.bundle.manifest import GraphEntry, Manifest
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.bundle.writer import file_ref, update_manifest


def copy(bundle: Path, folder: Path) -> Path:
    """The bundle under its own name in `folder`."""
    return Path(shutil.copytree(bundle, folder / bundle.name))


def edit_graph(bundle: Path, role: str, edit: Callable[[ir.Model], None], *, build: str | None = None) -> None:
    """Changes one graph in place: weights go into a file of its own, and the manifest gets the new hashes."""
    entry = _entries(read_manifest(bundle), build)[role]
    path = bundle / entry.model.file
    model = ir.load(path)
    edit(model)
    data = f"{role}.planted.data"
    ir.save(model, path, external_data=data)
    place = Path(entry.model.file).parent

    def record(manifest: Manifest) -> None:
        changed = _entries(manifest, build)[role]
        changed.model = file_ref(bundle, changed.model.file)
        changed.data = [file_ref(bundle, str(place / data))] if (path.parent / data).is_file() else []

    update_manifest(bundle, record)


def edit_json(bundle: Path, name: str, **values: object) -> None:
    """Overwrites keys of a side file."""
    file = bundle / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def record(manifest: Manifest) -> None:
        manifest.files = [file_ref(bundle, name) if ref.file == name else ref for ref in manifest.files]

    update_manifest(bundle, record)


def matmul(model: ir.Model, scope: str) -> ir.Node:
    """The matrix product of the PyTorch module `scope`."""
    return next(n for n in model.graph if n.op_type in ("MatMul", "Gemm") and n.metadata_props.get("vlm_edge.scope") == scope)


def set_weight(value: ir.Value, array: np.ndarray) -> None:
    """Replaces a stored weight."""
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def zero_block(node: ir.Node, size: int = 16) -> None:
    """Zeroes the corner of a matrix product's weight."""
    weight = node.inputs[1]
    array = weight.const_value.numpy().copy()
    array[:size, :size] = 0
    set_weight(weight, array)


def set_epsilon(node: ir.Node, epsilon: float) -> None:
    """Swaps a normalisation's epsilon."""
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)


def _entries(manifest: Manifest, build: str | None) -> dict[str, GraphEntry]:
    return manifest.builds[build].graphs if build else manifest.graphs
