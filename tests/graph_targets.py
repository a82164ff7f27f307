"""CPU targets all of whose parts stay graphs: for tests that look into the nodes of a build."""

from __future__ import annotations

import msgspec

from vlm_edge.targets.target import Target, load_target


def graph_target(name: str) -> Target:
    """The target with ONNX Runtime's kernels for all graphs; its builds carry the same name."""
    found = load_target(name)
    options = msgspec.structs.replace(found.options, kernels="onnxruntime", encoder_kernels="onnxruntime")
    return msgspec.structs.replace(found, options=options)
