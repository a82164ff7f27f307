"""The first node whose output leaves the tolerance, between two graphs that should compute the same.

The graphs may be copies with other weights or attributes, or a portable graph and its lowered form (see pairs.py for which
values are compared). Where a value has no partner the search goes on, and the nodes in between are named with the culprit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from vlm_edge_runtime.errors import ParityError

from .metrics import Array, Distance, worst
from .pairs import compare_values, pair_values
from .probe import Probe, label, reads, scope_of
from .report import short

CHUNK = 48
"""Values exposed in one run: bounds the memory, and ends early where the fault is early."""


class Culprit(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where the numbers go wrong first.

    `before`: the worst of what the node reads; `after`: what it gives. `candidates`: nodes between the last value that was
    right and this one, when they could not be compared one by one. `reason`: what differs about the node itself.
    """

    build: str
    graph: str
    node: str
    op: str
    module: str
    output: str
    before: Distance
    after: Distance
    tolerance: float
    candidates: list[str] = []
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.build}/{self.graph}: {self.node} ({self.op})" + (f" in {self.module}" if self.module else "")
        numbers = f"relative difference {short(self.before.relative)} before, {short(self.after.relative)} after"
        said = f"{where}: {self.after.note or numbers}, {short(self.tolerance)} is allowed"
        if self.candidates:
            said += f"; or one of {', '.join(self.candidates)}"
        return f"{said}. {self.reason}".rstrip()

    def to_builtins(self) -> dict[str, Any]:
        """As a dict."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        return value


def first_divergence(
    reference: Path,
    suspect: Path,
    feeds: Mapping[str, Array],
    tolerance: float,
    *,
    suspect_feeds: Mapping[str, Array] | None = None,
    build: str = "",
    graph: str = "",
) -> Culprit | None:
    """The first node of `suspect` whose output differs from `reference`'s by more than `tolerance` (relative), or None.

    `suspect_feeds`: its inputs, where its signature is another. Raises ParityError when the graphs share no value to compare.
    """
    right, wrong = Probe(reference), Probe(suspect)
    pairs = pair_values(right, wrong)
    shared = list(pairs)
    if not shared:
        raise ParityError(f"{reference.name} and {suspect} share no value: there is nothing to bisect.")
    seen: dict[str, Distance] = {}
    for start in range(0, len(shared), CHUNK):
        names = shared[start : start + CHUNK]
        expected = right.run(feeds, list(dict.fromkeys(pairs[name] for name in names)))
        found = wrong.run(feeds if suspect_feeds is None else suspect_feeds, names)
        for name in names:
            one = compare_values(name, found[name], expected[pairs[name]])
            if one is None:
                continue
            seen[name] = one
            if not one.within(tolerance):
                node = wrong.values()[name].producer()
                assert node is not None  # values() are outputs of nodes
                before, between = _before(wrong, node, seen)
                return Culprit(
                    build=build,
                    graph=graph,
                    node=label(node),
                    op=node.op_type,
                    module=scope_of(node),
                    output=name,
                    before=before,
                    after=one,
                    tolerance=tolerance,
                    candidates=[label(other) for other in between],
                    reason=_reason(right, wrong, pairs, [*between, node]),
                )
    return None


def _before(probe: Probe, node: ir.Node, seen: Mapping[str, Distance]) -> tuple[Distance, list[ir.Node]]:
    """The worst of the compared values that lead to a node, and the nodes in between that could not be compared."""
    known: list[Distance] = []
    between: list[ir.Node] = []
    waiting, visited = [node], {node}
    while waiting:
        for value in reads(waiting.pop()):
            source = value.producer()
            if source is None or source in visited or probe.is_constant(source):
                continue
            if (found := seen.get(str(value.name))) is not None:
                known.append(found)
                continue
            visited.add(source)
            waiting.append(source)
            between.append(source)
    order = {other: i for i, other in enumerate(probe.nodes)}
    return worst(known), sorted(between, key=order.__getitem__)


def _reason(right: Probe, wrong: Probe, pairs: Mapping[str, str], nodes: list[ir.Node]) -> str:
    """What differs about the suspects themselves: a weight, an attribute, the operator."""
    partners = {node.outputs[0].name: node for node in right.nodes}
    said: list[str] = []
    for node in nodes:
        partner = partners.get(pairs.get(str(node.outputs[0].name)))
        if partner is None:
            continue
        # A fused form has attributes of its own; those that both know must agree.
        same = partner.op_type == node.op_type
        for name in {**partner.attributes, **node.attributes} if same else {*partner.attributes} & {*node.attributes}:
            ours, theirs = (_attribute(one, name) for one in (node, partner))
            if ours != theirs:
                said.append(f"attribute {name} of {label(node)} is {ours} instead of {theirs}")
        for value in node.inputs:
            said += _weight_reasons(right, wrong, value)
    return ("Found: " + "; ".join(said) + ".") if said else ""


def _weight_reasons(right: Probe, wrong: Probe, value: ir.Value | None) -> list[str]:
    """How the weight behind an input differs, through nodes that only rearrange weights."""
    if value is None:
        return []
    source = value.producer()
    if source is not None:
        return (
            [said for below in source.inputs for said in _weight_reasons(right, wrong, below)]
            if wrong.is_constant(source)
            else []
        )
    name = str(value.name)
    ours, theirs = wrong.weights().get(name), right.weights().get(name)
    if ours is None or theirs is None:
        return []
    found, expected = ours.numpy(), theirs.numpy()
    return (
        [weight_difference(name, found, expected)] if found.shape != expected.shape or not np.array_equal(found, expected) else []
    )


def weight_difference(name: str, found: Array, expected: Array) -> str:
    """One sentence on how a stored weight differs from what it should be."""
    if found.shape != expected.shape:
        return f"weight {name} has shape {list(found.shape)} instead of {list(expected.shape)}"
    other = found != expected
    zeroed = int((other & (found == 0)).sum())
    count = int(other.sum())
    what = f", {zeroed} of them zero" if zeroed else ""
    return f"weight {name} has {count} of {found.size} values unlike the original{what}"


def _attribute(node: ir.Node, name: str) -> object:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.value
