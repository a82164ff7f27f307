"""Checkpoint → portable ONNX: loading, the traced attention, tracing, shared weights, the comparison with PyTorch."""

from .pipeline import export

__all__ = ["export"]
