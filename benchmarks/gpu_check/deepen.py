"""A model of many equal layers from one of few: the repeated part of an ONNX graph is repeated more often.

Speed depends on the number and the shape of layers, not on what is in them, so a model of 30 layers need not be exported to be
measured: four layers are exported and lowered in the ordinary way, and the result is deepened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

_LAYER = re.compile(r"^(?P<before>(past_key_values|present|cross_key_values|deepstack)\.)(?P<layer>\d+)(?P<after>.*)$")


class NotPeriodic(ValueError):
    """The graph has no part that repeats."""


def deepen(model: ir.Model, layers: int, of: int) -> ir.Model:
    """Makes a graph of `of` equal layers one of `layers`, in place. Raises NotPeriodic.

    The repeated part is found in the sequence of operators: two neighbouring stretches of nodes with the same operators, where
    each input of the second stretch is to it what the first stretch's is to the first. Copies have initializers of their own;
    inputs and outputs named after a layer (`past_key_values.3.key`) are numbered on.
    """
    if layers < of:
        raise ValueError(f"a graph of {of} layers cannot be made one of {layers}")
    graph, extra = model.graph, layers - of
    if extra == 0:
        return model
    nodes = list(graph)
    first, second = _stretches(nodes, of)
    shift = _shift(first, second)
    last = {value: value for node in second for value in node.outputs}
    block, end = list(second), second[-1]
    _renumber(graph, second, extra)
    for copy in range(1, extra + 1):
        made: dict[ir.Value, ir.Value] = {}
        fresh = []
        for one, two in zip(first, second, strict=True):
            inputs = [_input(graph, a, b, shift, last, made, copy) for a, b in zip(one.inputs, two.inputs, strict=True)]
            node = ir.Node(
                two.domain,
                two.op_type,
                inputs,
                list(two.attributes.values()),
                num_outputs=len(two.outputs),
                overload=two.overload,
                name=f"{two.name}.copy{copy}" if two.name else None,
            )
            node.metadata_props.update(two.metadata_props)
            for old, new in zip(two.outputs, node.outputs, strict=True):
                new.name = f"{old.name}.copy{copy}" if old.name else old.name  # "": an optional output that nobody reads
                new.type, new.shape = old.type, old.shape
                made[old] = new
                if old.is_graph_output():
                    new.name = _numbered(str(old.name), copy)
                    _add_output(graph, old, new)
            fresh.append(node)
        graph.insert_after(end, fresh)
        end = fresh[-1]
        last = {old: made[old] for old in last}
        block += fresh
    _rewire(graph, set(block), last)
    graph.sort()
    return model


def _stretches(nodes: Sequence[ir.Node], of: int) -> tuple[list[ir.Node], list[ir.Node]]:
    """Two neighbouring stretches with the same operators, of the longest period that a graph of `of` layers can have."""
    nodes = list(nodes)
    words = [(node.domain, node.op_type, len(node.inputs)) for node in nodes]
    for period in range(len(nodes) // max(2, of - 1), len(nodes) // (2 * of), -1):  # layers are most of a graph
        run = 0
        for at in range(len(nodes) - period):
            run = run + 1 if words[at] == words[at + period] else 0
            if run >= period and len(set(words[at + 1 - period : at + 1])) > min(2, period - 1):
                begin = at + 1 - period
                first, second = nodes[begin : begin + period], nodes[begin + period : begin + 2 * period]
                if _fit(first, second):
                    return first, second
    raise NotPeriodic(f"no part of the {len(nodes)} nodes repeats")


def _fit(first: Sequence[ir.Node], second: Sequence[ir.Node]) -> bool:
    shift = _shift(first, second)
    outputs = {value for node in (*first, *second) for value in node.outputs}
    weights = False
    for one, two in zip(first, second, strict=True):
        if {n: str(a) for n, a in one.attributes.items()} != {n: str(a) for n, a in two.attributes.items()}:
            return False
        for a, b in zip(one.inputs, two.inputs, strict=True):
            if a is b:
                continue
            if a is None or b is None:
                return False
            if a.is_initializer() and b.is_initializer():
                weights = weights or a.shape == b.shape
                if a.shape != b.shape or a.dtype != b.dtype:
                    return False
            elif a.is_graph_input() and b.is_graph_input():
                if _numbered(str(a.name), 1) != b.name:
                    return False
            elif b in shift.values():
                if shift.get(a) is not b:
                    return False
            elif b not in outputs or a in outputs:  # from before both: only what the first stretch follows may differ
                return False
    return weights


def _shift(first: Sequence[ir.Node], second: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
    return {a: b for one, two in zip(first, second, strict=True) for a, b in zip(one.outputs, two.outputs, strict=False)}


def _input(
    graph: ir.Graph,
    a: ir.Value | None,
    b: ir.Value | None,
    shift: dict[ir.Value, ir.Value],
    last: dict[ir.Value, ir.Value],
    made: dict[ir.Value, ir.Value],
    copy: int,
) -> ir.Value | None:
    """What takes the place of `b`, the second stretch's input, in a copy."""
    if b is None or a is b:
        return b
    if b in made:  # made inside the copy itself
        return made[b]
    if b in shift:  # made by the first stretch: now by the stretch before this copy
        return last[shift[b]]
    if b.is_graph_input():
        return _added_input(graph, b, _numbered(str(b.name), copy))
    if b.is_initializer() and b.const_value is not None:
        name = f"{b.name}.copy{copy}"
        if name not in graph.initializers:
            value = ir.Value(name=name, shape=b.shape, type=b.type, const_value=b.const_value)
            graph.register_initializer(value)
        return graph.initializers[name]
    raise NotPeriodic(f"'{b.name}' comes from before the repeated part")


def _added_input(graph: ir.Graph, like: ir.Value, name: str) -> ir.Value:
    found = next((value for value in graph.inputs if value.name == name), None)
    if found is None:
        found = ir.Value(name=name, shape=like.shape, type=like.type)
        graph.inputs.insert(_after_layer(graph.inputs, name), found)
    return found


def _add_output(graph: ir.Graph, like: ir.Value, value: ir.Value) -> None:
    graph.outputs.insert(_after_layer(graph.outputs, str(value.name)), value)


def _after_layer(values: Sequence[ir.Value], name: str) -> int:
    """Where a value of that name stands among its like: by layer, within one in the order of the first layer."""
    match = _LAYER.match(name)
    assert match is not None
    kinds = [
        found["after"] for value in values if (found := _LAYER.match(str(value.name))) and found["before"] == match["before"]
    ]
    order = list(dict.fromkeys(kinds))
    own = int(match["layer"]), order.index(match["after"])
    places = [
        at
        for at, value in enumerate(values)
        if (found := _LAYER.match(str(value.name)))
        and found["before"] == match["before"]
        and (int(found["layer"]), order.index(found["after"])) < own
    ]
    return places[-1] + 1


def _numbered(name: str, by: int) -> str:
    match = _LAYER.match(name)
    return name if match is None else f"{match['before']}{int(match['layer']) + by}{match['after']}"


def _renumber(graph: ir.Graph, second: Sequence[ir.Node], by: int) -> None:
    """Inputs and outputs of later layers make room. A stretch may begin inside a layer, so each kind has a number of its own."""
    inside = {value for node in second for value in (*node.inputs, *node.outputs) if value is not None}
    named = [(value, match) for value in (*graph.inputs, *graph.outputs) if (match := _LAYER.match(str(value.name)))]
    newest: dict[tuple[str, str], int] = {}
    for value, match in named:
        if value in inside:
            kind = match["before"], match["after"]
            newest[kind] = max(int(match["layer"]), newest.get(kind, -1))
    for value, match in sorted(named, key=lambda pair: -int(pair[1]["layer"])):
        if int(match["layer"]) > newest.get((match["before"], match["after"]), 1 << 30):
            value.name = _numbered(str(value.name), by)


def _rewire(graph: ir.Graph, block: set[ir.Node], last: dict[ir.Value, ir.Value]) -> None:
    """What followed the second stretch follows the last copy."""
    for old, new in last.items():
        for node, index in _users(old):
            if node not in block:
                node.replace_input_with(index, new)


def _users(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    yield from [(use.node, use.idx) for use in value.uses()]
