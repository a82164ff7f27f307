"""PyTorch module → ONNX graph (opset 23, standard ops only) through `torch.onnx.export`."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from transformers import PreTrainedModel

from vlm_edge.families.base import Case, GraphPlan, Tensors
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import ExportError, VlmEdgeError

from .attention import IMPLEMENTATION, AttentionCall, attention_implementation, recording
from .patches import exchanged

OPSET = 23
"""The opset at which `Attention`, `RotaryEmbedding` and `RMSNormalization` are standard and the exporter emits all three."""

LAYER, MASK, WINDOW, SOFTCAP, SCOPE = (f"vlm_edge.{key}" for key in ("layer", "mask", "sliding_window", "softcap", "scope"))
WINDOWED_BLOCKS = "vlm_edge.windowed_blocks"
"""Keys of a node's metadata: on `Attention` what it attends to, on every node the module of the model that it comes from."""


class _Listed(torch.nn.Module):
    """Takes all tensors as one list: the exporter's signature is then the same for every graph."""

    def __init__(self, graph: torch.nn.Module) -> None:
        super().__init__()
        self.traced = graph  # not `graph`: torch.fx keeps its own under that name

    def forward(self, tensors: list[torch.Tensor]) -> Tensors:
        return tuple(self.traced(*tensors))


def trace(plan: GraphPlan, model: PreTrainedModel) -> ir.Model:
    """Traces one graph of `model` at the sizes of its first case; every named dimension stays dynamic.

    The weights of the returned model still share PyTorch's memory. Raises ExportError naming the graph and what the exporter
    could not follow. Nothing is printed; the model's attention is as before afterwards.
    """
    inputs = plan.sample(plan.cases[0])
    shapes = [{axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in plan.inputs]
    try:
        with (
            quiet(),
            torch.no_grad(),
            attention_implementation(model, IMPLEMENTATION),
            exchanged(model),
            recording() as recorder,
        ):
            program = torch.onnx.export(
                _Listed(plan.module).eval(),
                (list(inputs),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in plan.inputs],
                output_names=[spec.name for spec in plan.outputs],
                dynamic_shapes=(shapes,),
                optimize=True,
                verbose=False,
            )
            calls = list(recorder.calls)
    except VlmEdgeError:
        raise
    except Exception as error:
        raise ExportError(f"Graph '{plan.role}' could not be traced. {_reason(error)}") from error
    if program is None:
        raise ExportError(f"Graph '{plan.role}' could not be traced: the exporter returned nothing.")
    graph = program.model
    graph.producer_name, graph.producer_version = "vlm-edge", None
    _describe_attention(graph, calls, plan)
    _read_sizes_once(graph, plan.inputs)
    _clean(graph, plan, model)
    _name_weights(graph, plan, model)
    _sign(graph, plan.inputs, plan.outputs, plan.role, plan.cases[0])
    return graph


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Catches what PyTorch's exporter prints, warns and logs; the text is there for an error message."""
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The first cause in one line; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def _describe_attention(graph: ir.Model, calls: list[AttentionCall], plan: GraphPlan) -> None:
    """Writes onto each `Attention` what the traced call was, found by the module that made it.

    There may be fewer nodes than calls: LLaVA reads its vision encoder before the last layer, which then drops out.
    """
    waiting: dict[int, list[AttentionCall]] = {}
    for call in calls:
        waiting.setdefault(id(call.module), []).append(call)
    for node in graph.graph:
        if node.op_type != "Attention" or node.domain:
            continue
        scope = _scope(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        made = waiting.get(id(_module_at(plan.module, scope)))
        if not made:
            raise ExportError(f"Graph '{plan.role}': the Attention node {node.name} ('{scope}') is of no recorded call.")
        call = made.pop(0)
        past = node.inputs[4].name if len(node.inputs) > 4 and node.inputs[4] is not None else None
        if past != (f"past_key_values.{call.layer}.key" if call.has_past else None):
            raise ExportError(f"Graph '{plan.role}': the attention of layer {call.layer} reads '{past}' as its past.")
        node.metadata_props[LAYER] = str(call.layer)
        node.metadata_props[MASK] = call.mask.kind
        if call.mask.sliding_window is not None:
            node.metadata_props[WINDOW] = str(call.mask.sliding_window)
        if call.mask.windowed_blocks:
            node.metadata_props[WINDOWED_BLOCKS] = "1"
        if call.softcap:
            node.metadata_props[SOFTCAP] = repr(call.softcap)


def _read_sizes_once(graph: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """A named size is read off the first input that has it. The exporter takes any, such as the batch off a cache tensor, which

    a lowering could then not replace.
    """
    values = {value.name: value for value in graph.graph.inputs}
    first: dict[str, tuple[ir.Value, int]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                first.setdefault(dim, (values[spec.name], axis))
    for spec in inputs:
        for node, _ in tuple(values[spec.name].uses()):
            start, end = (node.attributes.get_int(key, -1) for key in ("start", "end"))
            if node.op_type != "Shape" or node.domain or start < 0 or end != start + 1:
                continue
            dim = spec.shape[start]
            if isinstance(dim, str) and first[dim] != (values[spec.name], start):
                value, axis = first[dim]
                node.replace_input_with(0, value)
                node.attributes["start"] = ir.AttrInt64("start", axis)
                node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def _clean(graph: ir.Model, plan: GraphPlan, model: PreTrainedModel) -> None:
    """Leaves of the exporter's notes only the module's path in the model: the rest names files of this machine.

    The exporter's rotary fusion repeats cosine and sine per layer; equal nodes become one. A split into one piece is none.
    """
    for node in list(graph.graph):
        if node.op_type == "Split" and len(node.outputs) == 1 and node.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    common.CommonSubexpressionEliminationPass()(graph)
    common.RemoveUnusedNodesPass()(graph)
    paths = {id(module): path for path, module in model.named_modules()}
    for node in graph.graph.all_nodes():
        traced = _scope(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        kept = {key: value for key, value in node.metadata_props.items() if key.startswith("vlm_edge.")}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        if traced and (path := paths.get(id(_module_at(plan.module, traced)))):
            node.metadata_props[SCOPE] = path
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    graph.doc_string = None
    graph.graph.metadata_props.clear()
    graph.graph.doc_string = None


def _module_at(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:  # a scope that the exporter made up
        return None


def _scope(scopes: str) -> str:
    """`['', 'traced', 'traced.model.layers.0', 'linear']` → `model.layers.0`: the innermost module, seen from the plan's."""
    names = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    inside = [name for name in names[:-1] if name.startswith("traced.")]
    return inside[-1].removeprefix("traced.") if inside else ""


def _name_weights(graph: ir.Model, plan: GraphPlan, model: PreTrainedModel) -> None:
    """Gives every weight the name it has in the checkpoint, and compares those of linear layers by value.

    A linear layer's weight comes out transposed (`x Wᵀ`) and is then called `NAME.T`. Raises ExportError when its numbers are
    not those of the model: exporters are known to have zeroed weights without a word.
    """
    names = {tensor.data_ptr(): name for name, tensor in (*model.named_buffers(), *model.named_parameters()) if tensor.numel()}
    taken: set[str] = set()
    for value in list(graph.graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        name = names.get(raw.data_ptr(), "") if isinstance(raw, torch.Tensor) else ""
        linear = _linear_of(value, model)
        if not name and linear is not None:
            path, weight = linear
            found = torch.from_numpy(np.ascontiguousarray(value.const_value.numpy()))  # type: ignore[union-attr]
            if torch.equal(found, weight.t()):
                name = f"{path}.weight.T"
            elif torch.equal(found, weight):
                name = f"{path}.weight"
            else:
                raise ExportError(f"Graph '{plan.role}': the weight of '{path}' came out with other numbers than the model has.")
        if name and name not in taken:
            taken.add(name)
            value.name = name
            value.const_value.name = name  # type: ignore[union-attr]


def _linear_of(value: ir.Value, model: PreTrainedModel) -> tuple[str, torch.Tensor] | None:
    """The linear layer whose weight this is: the second input of a matrix product inside one."""
    for node, index in value.uses():
        path = node.metadata_props.get(SCOPE)
        if index == 1 and node.op_type in ("MatMul", "Gemm") and path is not None:
            module = _module_at(model, path)
            if isinstance(module, torch.nn.Linear):
                return path, module.weight.detach()
    return None


def _sign(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], role: str, case: Case) -> None:
    """Names the graph and its dynamic dimensions as the plan does; a dimension that the trace has fixed is an error."""
    model.graph.name = role
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if [value.name for value in values] != [spec.name for spec in specs]:
            raise ExportError(f"Graph '{role}' came out with {[v.name for v in values]}, not {[s.name for s in specs]}.")
        for value, spec in zip(values, specs, strict=True):
            found = list(value.shape) if value.shape is not None else []
            if len(found) != len(spec.shape):
                raise ExportError(f"Graph '{role}': {spec.name} came out as {found}, not {list(spec.shape)}.")
            for dim, expected in zip(found, spec.shape, strict=True):
                if isinstance(expected, str) == isinstance(dim, int):
                    raise ExportError(
                        f"Graph '{role}': {spec.name} came out as {found}, not {list(spec.shape)}: a dynamic dimension was fixed "
                        f"at the traced size ({case.sizes}), or a fixed one is not."
                    )
            value.shape = ir.Shape(spec.shape)
