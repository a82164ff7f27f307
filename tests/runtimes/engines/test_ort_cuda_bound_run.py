"""Runs over addresses, which the CUDA engine's C loop is made of, on the CPU provider; and what refuses without the right one."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.ort_cuda_models import cast
from vlm_edge_runtime.engines.ort_library import ensure_runtime
from vlm_edge_runtime.errors import DeviceError


def _model(nodes: list, size: int, last: str) -> bytes:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in ("x0", last)]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


def _run(model: bytes) -> _native.BoundRun:
    ensure_runtime()
    return _native.BoundRun(_native.Session(model, "small"))


def test_a_bound_run_reads_and_writes_where_it_is_told() -> None:
    run = _run(_model([helper.make_node("Add", ["x0", "x0"], ["y"])], 3, "y"))
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((2, 3), np.float32)
    run.bind_input("x0", x.ctypes.data, x.shape)
    run.bind_output("y", y.ctypes.data, y.shape)
    for _ in range(2):
        run.run()
        np.testing.assert_array_equal(y, 2 * x)
        x += 1
    assert run.runs == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("z", 8, (2, 3)), "graph 'small' has no input 'z'"),
        (("x0", 8, (2, 4)), "'x0' has size 4 in dimension 1, expected 3"),
        (("x0", 8, (2,)), "'x0' is float32 of 2 dimensions, bound were 1"),
        (("x0", 0, (2, 3)), "'x0' was bound to no memory"),
        (("x0", 8, (-1, 3)), "'x0' has size -1"),
        (("x0", 8, (1 << 62, 3)), "'x0' has size"),
    ],
)
def test_what_cannot_be_bound_is_refused(arguments, message) -> None:
    run = _run(_model([helper.make_node("Add", ["x0", "x0"], ["y"])], 3, "y"))
    with pytest.raises(DeviceError, match=message):
        run.bind_input(*arguments)


def test_a_run_with_nothing_bound_is_an_error_of_its_graph() -> None:
    with pytest.raises(DeviceError, match="graph 'small': At least one output should be requested"):
        _run(_model([helper.make_node("Add", ["x0", "x0"], ["y"])], 3, "y")).run()


def test_the_interpreter_lock_is_free_while_a_bound_run_runs() -> None:
    size, rounds = 700, 12
    run = _run(_model([helper.make_node("MatMul", [f"x{i}", "x0"], [f"x{i + 1}"]) for i in range(rounds)], size, f"x{rounds}"))
    x, y = np.full((size, size), 1e-3, np.float32), np.zeros((size, size), np.float32)
    run.bind_input("x0", x.ctypes.data, x.shape)
    run.bind_output(f"x{rounds}", y.ctypes.data, y.shape)
    entered, left = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        run.run()
        left.set()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    counted = 0
    while not left.is_set():
        counted += 1
    thread.join()
    assert counted > 1000  # a run that kept the lock would let this thread count only around it


def test_the_small_models_are_valid_onnx() -> None:
    onnx.checker.check_model(onnx.load_from_string(cast(3, "float32", "float16")), full_check=True)


def test_the_library_of_the_cpu_wheel_refuses_the_cuda_provider(tmp_path: Path) -> None:
    """The provider's functions are in the table where they are looked for: what answers is ONNX Runtime's own refusal."""
    if "CUDAExecutionProvider" in __import__("onnxruntime").get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here")
    ensure_runtime()
    with pytest.raises(DeviceError, match="graph 'small': CUDA execution provider is not enabled in this build"):
        _native.Session(cast(1, "float32", "float16"), "small", cuda={"device_id": "0", "user_compute_stream": "4096"})
    with pytest.raises(DeviceError, match="too many options"):
        _native.Session(cast(1, "float32", "float16"), "small", cuda={str(number): "" for number in range(40)})
