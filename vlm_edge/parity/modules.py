"""The first module of the original whose output the exported graph gets wrong.

The original runs with a hook on every module; the graph's nodes say which module they come from. A module's output is the
one value that leaves its nodes (is read by another module, or by nobody in it). What has no such value, or another shape, is
not compared. Inside the first wrong module the stored weights are compared with the checkpoint's, which tells its nodes apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vlm_edge.export.trace import quiet
from vlm_edge_runtime.errors import ParityError

from .bisect import CHUNK, Culprit, weight_difference
from .metrics import Array, Distance, distance, worst
from .probe import Probe, label, scope_of
from .reference import TorchReference

_TRANSPOSED = ".T"
"""A linear layer's weight is stored transposed under this suffix by the exporter."""


def first_wrong_module(
    reference: TorchReference, role: str, path: Path, tolerance: float, *, build: str = "portable"
) -> Culprit | None:
    """The first node (by module) of the graph at `path` that leaves the tolerance against PyTorch, over the plan's cases.

    None when every module that can be compared is within it. Raises ParityError when none can be compared.
    """
    probe = Probe(path)
    plan = reference.plans[role]
    leaving = _module_outputs(probe)
    compared = 0
    for case in plan.cases:
        if case.padding:  # rows of padding hold whatever each implementation leaves there
            continue
        with torch.no_grad(), quiet():
            inputs = plan.sample(case)
            original = _record(reference.model, lambda case=case, inputs=inputs: plan.reference(case, inputs))
            if not original:  # a reference that remembers its answers runs nothing; the module that was traced does
                original = _record(reference.model, lambda inputs=inputs: plan.module(*inputs))
        feeds = {spec.name: tensor.detach().numpy() for spec, tensor in zip(plan.inputs, inputs, strict=True)}
        # Two modules may end in one value (a block and its last layer): the innermost says more.
        pairs = [(name, module) for module, name in leaving.items() if module in original]
        order = {name: i for i, name in enumerate(probe.values())}
        pairs.sort(key=lambda pair: (order[pair[0]], -pair[1].count(".")))
        seen: dict[str, Distance] = {}
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            found = probe.run(feeds, list(dict.fromkeys(name for name, _ in chunk)))
            for name, module in chunk:
                expected = original[module]
                if found[name].shape != expected.shape:
                    continue
                compared += 1
                one = distance(found[name], expected)
                if not one.within(tolerance):
                    return _culprit(probe, reference, role, build, name, module, seen, one, tolerance)
                seen[name] = one
    if not compared:
        raise ParityError(f"{role}: no module of the original can be matched with the graph (was it exported by this version?).")
    return None


def _record(model: Any, call: Any) -> dict[str, Array]:
    """Runs `call` and returns the first tensor that each module put out; modules that ran more than once are left out."""
    outputs: dict[str, Array] = {}
    repeated: set[str] = set()
    handles = []

    def hook(name: str) -> Any:
        def keep(module: torch.nn.Module, given: Any, result: Any) -> None:
            tensor = result[0] if isinstance(result, (tuple, list)) and result else result
            if name in outputs:
                repeated.add(name)
            if isinstance(tensor, torch.Tensor):
                outputs[name] = tensor.detach().clone().numpy()

        return keep

    try:
        handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
        call()
    finally:
        for handle in handles:
            handle.remove()
    return {name: array for name, array in outputs.items() if name not in repeated}


def _module_outputs(probe: Probe) -> dict[str, str]:
    """Module path → name of the one value that leaves the module's nodes."""
    values = probe.values()
    graph_outputs = set(probe.model.graph.outputs)
    leaving: dict[str, list[str]] = {}
    for name, value in values.items():
        node = value.producer()
        scope = scope_of(node) if node is not None else ""
        parts = scope.split(".") if scope else []
        readers = [scope_of(user) for user, _ in value.uses()]
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            inside = [reader == module or reader.startswith(module + ".") for reader in readers]
            if value in graph_outputs or not all(inside):
                leaving.setdefault(module, []).append(name)
    chosen: dict[str, str] = {}
    for module, names in leaving.items():
        inner = [name for name in names if values[name] not in graph_outputs]  # a decoder block also puts out its cache
        if len(inner) == 1 or (not inner and len(names) == 1):
            chosen[module] = (inner or names)[0]
    return chosen


def _culprit(
    probe: Probe,
    reference: TorchReference,
    role: str,
    build: str,
    name: str,
    module: str,
    seen: dict[str, Distance],
    after: Distance,
    tolerance: float,
) -> Culprit:
    node = probe.values()[name].producer()
    assert node is not None  # values() are outputs of nodes
    suspects, edges = _since_right(probe, node, seen)
    guilty, reasons = node, []
    for suspect in suspects:
        said = [text for value in suspect.inputs for text in _wrong_weights(probe, reference.model, value)]
        said += _wrong_epsilon(suspect, reference.model)
        if said:
            guilty, reasons = suspect, said
            break
    others = [label(one) for one in suspects if one is not guilty] if not reasons else []
    return Culprit(
        build=build,
        graph=role,
        node=label(guilty),
        op=guilty.op_type,
        module=scope_of(guilty) or module,
        output=str(guilty.outputs[0].name),
        before=worst(edges),
        after=after,
        tolerance=tolerance,
        candidates=others,
        reason=f"Found: {'; '.join(reasons)}." if reasons else "",
    )


def _since_right(probe: Probe, node: ir.Node, seen: dict[str, Distance]) -> tuple[list[ir.Node], list[Distance]]:
    """The nodes between the values that were right and `node`, itself last, and the distances of those values."""
    found, edges = {node}, []
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            source = value.producer() if value is not None else None
            if value is None or source is None or source in found or probe.is_constant(source):
                continue
            if (right := seen.get(str(value.name))) is not None:
                edges.append(right)
                continue
            found.add(source)
            waiting.append(source)
    return [one for one in probe.nodes if one in found and _computes(one)], edges


def _computes(node: ir.Node) -> bool:
    """False for nodes that only work out shapes: all their outputs are integers."""
    return any(value.dtype is None or value.dtype.is_floating_point() for value in node.outputs)


def _wrong_weights(probe: Probe, model: Any, value: ir.Value | None) -> list[str]:
    """How a stored weight differs from the checkpoint's tensor of its name."""
    if value is None:
        return []
    source = value.producer()
    if source is not None:
        return (
            [said for below in source.inputs for said in _wrong_weights(probe, model, below)] if probe.is_constant(source) else []
        )
    name = str(value.name).removesuffix(".stored")
    stored = probe.weights().get(str(value.name))
    original = _tensor(model, name.removesuffix(_TRANSPOSED))
    if stored is None or original is None:
        return []
    found = stored.numpy()
    expected = original.T if name.endswith(_TRANSPOSED) else original
    if found.shape != expected.shape and found.shape == expected.T.shape:
        expected = expected.T
    return [] if np.array_equal(found, expected) else [weight_difference(name, found, expected)]


def _wrong_epsilon(node: ir.Node, model: Any) -> list[str]:
    """Whether a normalisation adds another epsilon than its module does (both are kept as float32 somewhere on the way)."""
    attribute = node.attributes.get("epsilon")
    scope = scope_of(node)
    if attribute is None or not scope:
        return []
    try:
        module = model.get_submodule(scope)
    except AttributeError:  # a module that only exists while tracing
        return []
    wanted = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    found = attribute.as_float()
    if not isinstance(wanted, float) or np.float32(wanted) == np.float32(found):
        return []
    return [f"epsilon of {label(node)} is {found:g} instead of {wanted:g}"]


def _tensor(model: Any, name: str) -> Array | None:
    try:
        return model.get_parameter(name).detach().numpy()  # type: ignore[no-any-return]
    except AttributeError:
        pass
    try:
        return model.get_buffer(name).detach().numpy()  # type: ignore[no-any-return]
    except AttributeError:
        return None
