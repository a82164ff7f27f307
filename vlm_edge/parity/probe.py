"""Every intermediate value of a graph on disk, a chunk at a time, without writing anything.

The graph is loaded with its weights left where they are; a chunk of its values becomes outputs, and ONNX Runtime runs it
without optimising, so that what is written is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from google.protobuf.message import DecodeError

from vlm_edge_runtime.errors import ParityError

Array = npt.NDArray[Any]

SCOPE = "vlm_edge.scope"
"""The key of a node's metadata under which the exporter notes the PyTorch module that the node comes from."""

_READABLE = {
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.BOOL,
}


class Probe:
    """A graph whose inner values can be looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = ir.load(path)
        except (OSError, ValueError, DecodeError) as error:
            raise ParityError(f"{path} cannot be read as an ONNX graph: {error}") from error
        self._outputs = list(self.model.graph.outputs)
        self._constant = _constants(self.model.graph)

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes, each after those it reads from."""
        return list(self.model.graph)

    def is_constant(self, node: ir.Node) -> bool:
        """Whether a node depends on weights alone: a transposed weight is a weight."""
        return node in self._constant

    def values(self) -> dict[str, ir.Value]:
        """All values that nodes compute from the inputs, by name, in the order they are computed."""
        return {
            str(value.name): value
            for node in self.nodes
            if not self.is_constant(node)
            for value in node.outputs
            if value.name and (value.dtype is None or value.dtype in _READABLE)
        }

    def weights(self) -> dict[str, ir.TensorProtocol]:
        """The stored tensors by name."""
        found = {}
        for name, value in self.model.graph.initializers.items():
            if value.const_value is not None:
                found[name] = value.const_value
        return found

    def run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """The named values for these inputs. Raises ParityError when ONNX Runtime refuses the graph or the inputs."""
        values = self.values()
        outputs = self.model.graph.outputs
        own = {value.name for value in self._outputs}
        try:
            outputs.extend(values[name] for name in names if name not in own)
            graph = ir.to_proto(self.model).SerializeToString()
        finally:
            del outputs[len(self._outputs) :]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # The bytes name their weights relative to the folder that the graph was read from.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path.parent))
        try:
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            taken = {value.name for value in session.get_inputs()}
            found = session.run(list(names), {name: array for name, array in feeds.items() if name in taken})
        except Exception as error:  # onnxruntime's errors share no base of their own
            said = " ".join(str(error).split())[:300]
            raise ParityError(f"{self.path} cannot be run with its inner values exposed: {said}") from error
        return {name: np.asarray(array) for name, array in zip(names, found, strict=True)}


def scope_of(node: ir.Node) -> str:
    """The PyTorch module a node comes from, or an empty text. Files by other exporters keep their own notes."""
    if (own := node.metadata_props.get(SCOPE)) is not None:
        return own
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")][:-1]
    return names[-1] if names else ""


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads: its inputs, and what the graphs in its attributes (branches, loop bodies) take from around them."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = list(attribute.as_graph().all_nodes())
            values += [value for one in inner for value in one.inputs if value is not None and value.producer() not in inner]
    return list(dict.fromkeys(values))


def label(node: ir.Node) -> str:
    """A node's name, or what it computes where it has none."""
    return node.name or f"{node.op_type} of {node.outputs[0].name}"


def _constants(graph: ir.Graph) -> set[ir.Node]:
    found: set[ir.Node] = set()
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if all(value.is_initializer() or value.producer() in found for value in sources):
            found.add(node)
    return found
