"""TensorRT-RTX's default engine: documented to run on SM 8.0, 8.6, 8.9, 12.0 and later; does it load on this GPU?

The engine is built in a process that sees no GPU, with no compute capability named, and loaded in another one that does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

_SIZE = 64


def build_default(file: str) -> dict[str, Any]:
    """Builds y = relu(x · w) in half precision for no named GPU and writes the engine to `file`."""
    trt = importlib.import_module("tensorrt_rtx")

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    given = network.add_input("x", trt.float16, (_SIZE, _SIZE))
    weights = np.eye(_SIZE, dtype=np.float16)
    constant = network.add_constant((_SIZE, _SIZE), trt.Weights(weights)).get_output(0)
    product = network.add_matrix_multiply(given, trt.MatrixOperation.NONE, constant, trt.MatrixOperation.NONE).get_output(0)
    result = network.add_activation(product, trt.ActivationType.RELU).get_output(0)
    result.name = "y"
    network.mark_output(result)
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise SystemExit("TensorRT-RTX built no engine")
    Path(file).write_bytes(memoryview(plan))
    return {"version": trt.__version__, "bytes": Path(file).stat().st_size}


def load_default(file: str) -> dict[str, Any]:
    """Loads the engine on the GPU of this process. `loads` false is a finding, not a failure."""
    trt = importlib.import_module("tensorrt_rtx")

    lines: list[str] = []
    methods = {"__init__": trt.ILogger.__init__, "log": lambda self, severity, message: lines.append(message)}
    said = type("Said", (trt.ILogger,), methods)()
    runtime = trt.Runtime(said)
    engine = runtime.deserialize_cuda_engine(Path(file).read_bytes())
    context = engine.create_execution_context() if engine is not None else None
    return {
        "version": trt.__version__,
        "loads": engine is not None,
        "context": context is not None,
        "said": lines[-3:],
    }
