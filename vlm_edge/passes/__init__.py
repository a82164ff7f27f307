"""Graph passes: portable ONNX in, ONNX that a target is fast at out. One pass per file, no torch.

`targets/pipeline.py` says which passes a graph goes through. To write one: subclass `base.GraphPass`, use the verbs in
`graph.py`, keep weights lazy, and compare a small graph before and after on ONNX Runtime in tests/passes.
"""

from .base import Changes, GraphPass, run_passes

__all__ = ["Changes", "GraphPass", "run_passes"]
