"""The parsed network, layer by layer, against the graph it came from: before an hour is spent on compiling something else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .seam import Library, allow_decomposition

_SCOPE = "vlm_edge.scope"
_DECOMPOSABLE = "vlm_edge.decomposable"
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPES = {
    ir.DataType.FLOAT: "FLOAT",
    ir.DataType.FLOAT16: "HALF",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT4: "INT4",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT4E2M1: "FP4",
}
"""ONNX type → TensorRT's name of it."""


_8_BIT = ("INT8", "FP8")


@dataclass(slots=True)
class Layers:
    """What a parsed network is made of: layers by type, the caches that are updated in place, typed values that were compared.

    `aliases`: output → the input whose memory it shares. `products8`: matrix products of 8-bit weights and 8-bit activations.
    """

    types: Counter[str] = field(default_factory=Counter)
    aliases: dict[str, str] = field(default_factory=dict)
    compared: int = 0
    products8: int = 0


def node_label(graph: ir.Model, name: str) -> str:
    """A node for an error message: its name, operator and the PyTorch module it came from."""
    for node in graph.graph.all_nodes():
        if node.name == name or name in [out.name for out in node.outputs]:
            scope = node.metadata_props.get(_SCOPE, "")
            return f"node '{node.name or name}' ({node.op_type})" + (f" of module '{scope}'" if scope else "")
    return f"node '{name}'"


def check_network(library: Library, network: Any, graph: ir.Model, path: Path) -> Layers:
    """Compares the network with its ONNX graph, and lets attentions be taken apart that the graph marks so.

    Every input is there and read by some layer; each TensorScatter became one cache update whose output is an output of the
    network and whose cache is an input; each Attention was kept whole; every value that both name has the graph's type; every
    product whose both sides the graph gives in 8 bits reads 8-bit codes on both. Raises TargetError on the first that does not
    hold, naming the node.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = Layers(Counter(str(layer.type.name) for layer in layers))
    _check_inputs(network, layers, graph, path)
    _check_attention(library, layers, graph, path)
    found.aliases = _cache_updates(network, layers, graph, path)
    found.compared = _check_types(network, layers, graph, path)
    found.products8 = _check_products(layers, graph, path)
    return found


def _check_inputs(network: Any, layers: list[Any], graph: ir.Model, path: Path) -> None:
    wanted = [str(value.name) for value in graph.graph.inputs]
    there = [str(network.get_input(index).name) for index in range(network.num_inputs)]
    if missing := [name for name in wanted if name not in there]:
        raise TargetError(f"{path}: the parser dropped the input {', '.join(missing)}: the engine would ignore it.")
    read = {_name(layer.get_input(index)) for layer in layers for index in range(layer.num_inputs)}
    read |= {str(network.get_output(index).name) for index in range(network.num_outputs)}
    if unread := [name for name in wanted if name not in read]:
        users = [use.node for value in graph.graph.inputs if value.name in unread for use in value.uses()]
        where = f" ({', '.join(node_label(graph, str(node.name)) for node in users[:3])})" if users else ""
        raise TargetError(
            f"{path}: no layer reads the input {', '.join(unread)}{where}: the parser left it out, and the engine would give "
            "wrong results without a word."
        )


def _check_attention(library: Library, layers: list[Any], graph: ir.Model, path: Path) -> None:
    nodes = {str(node.name): node for node in graph.graph.all_nodes() if node.op_type == "Attention"}
    kept = 0
    for layer in layers:
        if layer.type.name != "ATTENTION_INPUT":
            continue
        kept += 1
        name = str(layer.name).removesuffix("_AttentionInput")
        node = nodes.get(name)
        if node is None or node.metadata_props.get(_DECOMPOSABLE) == "1":
            allow_decomposition(library, layer)
    if kept != len(nodes):
        there = {str(layer.name).removesuffix("_AttentionInput") for layer in layers}
        lost = next((name for name in nodes if name not in there), next(iter(nodes), ""))
        raise TargetError(
            f"{path}: of {len(nodes)} Attention nodes the parser kept {kept} whole; first lost: {node_label(graph, lost)}. "
            "Build for a target whose `imports` has no Attention: it is decomposed there."
        )


def _cache_updates(network: Any, layers: list[Any], graph: ir.Model, path: Path) -> dict[str, str]:
    """Output → input of each cache that is updated in place."""
    nodes = [node for node in graph.graph.all_nodes() if node.op_type == "TensorScatter"]
    updates = [layer for layer in layers if layer.type.name == "KV_CACHE_UPDATE"]
    if len(updates) != len(nodes):
        first = node_label(graph, str(nodes[0].name)) if nodes else "no node"
        raise TargetError(f"{path}: {len(nodes)} TensorScatter nodes became {len(updates)} cache updates; first: {first}.")
    inputs = {str(network.get_input(index).name): network.get_input(index) for index in range(network.num_inputs)}
    outputs = {str(network.get_output(index).name) for index in range(network.num_outputs)}
    aliases: dict[str, str] = {}
    for layer in updates:
        cache, new = _name(layer.get_input(0)), _name(layer.get_output(0))
        if cache not in inputs or new not in outputs:
            raise TargetError(
                f"{path}: cache update '{layer.name}' reads '{cache}' and gives '{new}': its cache must be an input of the graph "
                "and its result an output, so that both share one buffer."
            )
        if inputs[cache].shape[2] < 1:
            raise TargetError(f"{path}: the cache '{cache}' has no static capacity.")
        aliases[new] = cache
    if len(set(aliases.values())) != len(nodes):
        raise TargetError(f"{path}: some cache is updated twice in one step; there must be one update for each cache.")
    return aliases


def _check_types(network: Any, layers: list[Any], graph: ir.Model, path: Path) -> int:
    """How many values were compared. Strong typing holds where every value has the type that the graph gives it."""
    tensors = {str(tensor.name): tensor for tensor in _tensors(network, layers)}
    compared = 0
    for value in _values(graph):
        tensor = tensors.get(str(value.name))
        if tensor is None or value.dtype is None:
            continue
        compared += 1
        wanted, got = _TYPES.get(value.dtype, value.dtype.name), str(tensor.dtype.name)
        if wanted != got:
            node = value.producer()
            what = node_label(graph, str(node.name)) if node is not None else "an input"
            raise TargetError(f"{path}: '{value.name}' of {what} is {wanted} in the graph and {got} in the network.")
    return compared


def _check_products(layers: list[Any], graph: ir.Model, path: Path) -> int:
    """How many products are 8-bit on both sides: then a builder that has such kernels computes them in integers (or fp8)."""
    wanted = [str(node.name) for node in graph.graph if node.op_type == "MatMul" and all(map(_is_8_bit, node.inputs[:2]))]
    if not wanted:
        return 0
    makers = {_name(layer.get_output(index)): layer for layer in layers for index in range(layer.num_outputs)}
    there = {
        str(layer.name)
        for layer in layers
        if layer.type.name == "MATRIX_MULTIPLY" and all(_codes(layer.get_input(side), makers) in _8_BIT for side in (0, 1))
    }
    if lost := [name for name in wanted if name not in there]:
        raise TargetError(
            f"{path}: of {len(wanted)} products in 8 bits {len(lost)} do not read 8-bit codes on both sides in the network; "
            f"first: {node_label(graph, lost[0])}."
        )
    return len(wanted)


def _is_8_bit(value: ir.Value | None) -> bool:
    """Whether a graph's value is a DequantizeLinear of 8-bit codes, casts aside."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return codes is not None and _TYPES.get(codes.dtype or ir.DataType.FLOAT) in _8_BIT


def _codes(tensor: Any, makers: Mapping[str, Any]) -> str:
    """The type that a tensor is dequantised from; an empty text where it is not."""
    layer = makers.get(_name(tensor))
    while layer is not None and layer.type.name in ("SHUFFLE", "CAST"):
        layer = makers.get(_name(layer.get_input(0)))
    return str(layer.get_input(0).dtype.name) if layer is not None and layer.type.name == "DEQUANTIZE" else ""


def _tensors(network: Any, layers: list[Any]) -> list[Any]:
    found = [network.get_input(index) for index in range(network.num_inputs)]
    return found + [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]


def _values(graph: ir.Model) -> list[ir.Value]:
    return [*graph.graph.inputs, *(out for node in graph.graph for out in node.outputs)]


def _name(tensor: Any) -> str:
    return str(tensor.name) if tensor is not None else ""


def node_of(layer: Any) -> str:
    """The ONNX node that a layer was made from, as the parser wrote it down; an empty text where it did not."""
    found = _NODE.search(str(layer.metadata or ""))
    return found[1] if found else ""
