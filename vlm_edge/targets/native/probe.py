"""Asking a part of a graph what it computes, where its meaning matters and not how it is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from .errors import NotExpressible


def part(model: ir.Model, outputs: Sequence[ir.Value], names: Sequence[str]) -> ort.InferenceSession:
    """A session over the part of the graph that makes `outputs` from the graph's inputs `names`.

    Raises NotExpressible when it needs another input.
    """
    needed: list[ir.Node] = []
    seen: set[ir.Node] = set()
    inputs = {value: str(value.name) for value in model.graph.inputs}
    taken: list[ir.Value] = []
    weights: list[ir.Value] = []

    def visit(value: ir.Value | None) -> None:
        if value is None:
            return
        node = value.producer()
        if value in inputs:
            if inputs[value] not in names:
                raise NotExpressible(f"'{outputs[0].name}', which depends on '{inputs[value]}'")
            taken.append(value)
        elif node is None:
            weights.append(value)
        elif node not in seen:
            seen.add(node)
            for one in node.inputs:
                visit(one)
            needed.append(node)

    for value in outputs:
        visit(value)
    copies = {value: ir.Value(name=value.name, type=value.type, shape=value.shape) for value in dict.fromkeys(taken)}
    graph = ir.Graph(list(copies.values()), [], nodes=[], name="part", opset_imports=dict(model.graph.opset_imports))
    for weight in dict.fromkeys(weights):
        tensor = weight.const_value
        if tensor is None:
            raise NotExpressible(f"'{weight.name}', which is not stored")
        stored = ir.tensor(tensor.numpy(), name=weight.name)
        copies[weight] = ir.Value(name=weight.name, const_value=stored, type=weight.type, shape=weight.shape)
        graph.register_initializer(copies[weight])
    for node in needed:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        given = [None if one is None else copies[one] for one in node.inputs]
        made = ir.node(node.op_type, given, attributes, domain=node.domain, num_outputs=len(node.outputs))
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copies[old] = new
        graph.append(made)
    graph.outputs.extend(copies[value] for value in outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def hides_where_zero(model: ir.Model, mask: ir.Value, name: str) -> bool:
    """Whether an additive mask is 0 where input `name` int64 [batch, source] is not, and hides where it is, for every token."""
    embeds = next(value for value in model.graph.inputs if value.name == "inputs_embeds")
    width = embeds.shape[2] if embeds.shape is not None else 1
    session = part(model, [mask], [name, "inputs_embeds"])
    generator = np.random.default_rng(0)
    for tokens, source in ((1, 5), (3, 4)):
        given = generator.integers(0, 2, (2, source))
        given[:, 0] = 1
        feeds = {name: given, "inputs_embeds": np.zeros((2, tokens, int(width)), np.float32)}  # type: ignore[arg-type]
        (found,) = session.run(None, {one.name: feeds[one.name] for one in session.get_inputs()})
        try:
            wide = np.broadcast_to(found, (2, 1, tokens, source))
        except ValueError:
            return False
        seen = np.broadcast_to(given[:, None, None] != 0, wide.shape)
        if not (wide[seen] == 0).all() or not (wide[~seen] < -1e30).all():
            return False
    return True
