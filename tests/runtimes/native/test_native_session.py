"""Graphs through ONNX Runtime's C API: signatures, buffers in and out, errors, threads, lifetimes."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines import ort_library
from vlm_edge_runtime.engines.ort_library import ensure_runtime
from vlm_edge_runtime.errors import DeviceError

KINDS = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> None:
    ensure_runtime()


def _model(nodes: list, inputs: list, outputs: list, weights: list | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _affine() -> onnx.ModelProto:
    """y = x·w + 1, z = shape of x."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "one"], ["y"]),
        helper.make_node("Shape", ["x"], ["z"]),
    ]
    weights = [
        numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
    ]
    return _model(
        nodes,
        [info("x", TensorProto.FLOAT, ["rows", 3])],
        [info("y", TensorProto.FLOAT, ["rows", 4]), info("z", TensorProto.INT64, [2])],
        weights,
    )


def _slow(steps: int = 60) -> bytes:
    """Many products of a 256 × 256 matrix with itself."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"h{i}", "x"], [f"h{i + 1}" if i < steps - 1 else "y"])
        for i in range(steps)
    ]
    return _model(
        nodes, [info("x", TensorProto.FLOAT, [256, 256])], [info("y", TensorProto.FLOAT, [256, 256])]
    ).SerializeToString()


def _session(model: onnx.ModelProto | bytes, name: str = "graph") -> _native.Session:
    return _native.Session(model if isinstance(model, bytes) else model.SerializeToString(), name)


def test_signature_and_outputs() -> None:
    session = _session(_affine(), "affine")
    assert session.name == "affine"
    assert session.inputs == [("x", "float32", ("rows", 3))]
    assert session.outputs == [("y", "float32", ("rows", 4)), ("z", "int64", (2,))]
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    outputs = session.run({"x": x})
    np.testing.assert_allclose(np.asarray(outputs["y"]), x @ np.arange(12, dtype=np.float32).reshape(3, 4) + 1, atol=1e-5)
    assert np.asarray(outputs["z"]).tolist() == [5, 3]
    assert outputs["y"].shape == (5, 4) and outputs["y"].dtype == "float32"


@pytest.mark.parametrize("dtype", sorted(KINDS))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_every_type_passes_through(dtype, shape) -> None:
    info = helper.make_tensor_value_info
    dims = [None] * len(shape)
    session = _session(
        _model([helper.make_node("Identity", ["x"], ["y"])], [info("x", KINDS[dtype], dims)], [info("y", KINDS[dtype], dims)])
    )
    x = np.asarray(np.random.default_rng(1).integers(0, 2, shape)).astype(dtype)
    result = np.asarray(session.run({"x": x})["y"])
    assert result.dtype == np.dtype(dtype) and result.shape == shape
    np.testing.assert_array_equal(result, x)


def test_outputs_outlive_the_session() -> None:
    session = _session(_affine())
    result = np.asarray(session.run({"x": np.ones((2, 3), np.float32)})["y"])
    expected = result.copy()
    session.close()
    del session
    gc.collect()
    np.testing.assert_array_equal(result, expected)
    result += 1  # the memory is ours to write


def test_wrong_feeds_name_the_graph_and_the_input() -> None:
    session = _session(_affine(), "projector")
    good = np.zeros((2, 3), np.float32)
    cases = {
        r"graph 'projector': input 'x' is missing": {"y": good},
        r"graph 'projector': 2 inputs were given, it has 1": {"x": good, "y": good},
        r"graph 'projector': input 'x' is float64, expected float32": {"x": good.astype(np.float64)},
        r"graph 'projector': input 'x' has 1 dimensions, expected 2": {"x": good[0]},
        r"graph 'projector': input 'x' has size 4 in dimension 1, expected 3": {"x": np.zeros((2, 4), np.float32)},
        r"graph 'projector': input 'x' is not a C-contiguous array": {"x": np.zeros((3, 2), np.float32).T},
    }
    for message, feeds in cases.items():
        with pytest.raises(DeviceError, match=message):
            session.run(feeds)
    with pytest.raises(TypeError):
        session.run([good])  # type: ignore[arg-type]
    assert np.asarray(session.run({"x": good})["y"]).shape == (2, 4)


def test_use_after_close_is_an_error() -> None:
    session = _session(_affine())
    session.close()
    session.close()
    for call in (lambda: session.run({}), lambda: session.inputs, lambda: session.name):
        with pytest.raises(DeviceError, match="closed"):
            call()


def test_refused_models_raise_and_leave_nothing(tmp_path) -> None:
    with pytest.raises(DeviceError, match="graph 'broken'"):
        _native.Session(b"not a model", "broken")
    with pytest.raises(DeviceError, match="graph 'absent'"):
        _native.Session(str(tmp_path / "none.onnx"), "absent")
    with pytest.raises(ValueError, match="threads"):
        _native.Session(b"x", "g", threads=0)
    with pytest.raises(ValueError, match="empty"):
        _native.Session(b"", "g")
    with pytest.raises(TypeError):
        _native.Session(b"x", "g", {"key": 1})  # type: ignore[dict-item]


def test_unicode_path_and_external_data(tmp_path) -> None:
    folder = tmp_path / "modèle ノード"
    folder.mkdir()
    model = _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        [numpy_helper.from_array(np.eye(64, dtype=np.float32) * 3, "w")],
    )
    path = folder / "graph.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="graph.onnx.data", size_threshold=0)
    result = _native.Session(str(path), "external").run({"x": np.ones((1, 64), np.float32)})
    np.testing.assert_array_equal(np.asarray(result["y"]), np.full((1, 64), 3, np.float32))
    (folder / "graph.onnx.data").unlink()
    with pytest.raises(DeviceError, match="graph 'external'"):
        _native.Session(str(path), "external")


def test_config_entries_reach_onnx_runtime() -> None:
    with pytest.raises(DeviceError, match="graph 'g'"):
        _native.Session(_affine().SerializeToString(), "g", {"k" * 5000: "v"})
    assert _native.Session(_affine().SerializeToString(), "g", {"session.intra_op.allow_spinning": "0"}, 0).inputs


def test_sessions_that_agree_share_one_pool() -> None:
    gc.collect()
    model = _affine().SerializeToString()
    first = _native.Session(model, "a", threads=3, spin=False)
    if not first.shared_pool:
        pytest.skip("another test's session still holds the pool")
    same, other = _native.Session(model, "b", threads=3, spin=False), _native.Session(model, "c", threads=2, spin=False)
    assert same.shared_pool and not other.shared_pool
    for session in (first, same, other):
        session.run({"x": np.ones((2, 3), np.float32)})
        session.close()


def test_lock_is_released_while_running() -> None:
    """A waiting thread gets its turn inside the run: impossible while the run holds the interpreter lock."""
    session = _session(_slow())
    go, went = threading.Event(), threading.Event()

    def step() -> None:
        go.wait()
        went.set()

    thread = threading.Thread(target=step)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # no forced switches: only a released lock lets the other thread in
    try:
        go.set()
        early = went.is_set()
        session.run({"x": np.eye(256, dtype=np.float32)})
        inside = went.is_set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert inside and not early


def test_runs_from_many_threads_and_a_close_in_between() -> None:
    session = _session(_slow(20))
    x = np.eye(256, dtype=np.float32)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                np.testing.assert_array_equal(np.asarray(session.run({"x": x})["y"]), x)
        except DeviceError as error:
            if "closed" not in str(error):
                failures.append(error)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    session.close()
    for thread in threads:
        thread.join()
    assert not failures


def test_library_that_is_missing_or_wrong(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(ort_library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(DeviceError, match="not a file"):
        ort_library.find_library()
    monkeypatch.delenv(ort_library.LIBRARY_VARIABLE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="pip install"):
        ort_library.find_library()


def test_old_versions_are_refused() -> None:
    ort_library.check_version("1.23.0")
    ort_library.check_version("1.100.2-dev")
    with pytest.raises(DeviceError, match=r"ONNX Runtime 1\.22\.1 is too old, needed is 1\.23"):
        ort_library.check_version("1.22.1")


@pytest.mark.parametrize("content", ["not a library", None])
def test_other_libraries_are_refused_in_a_fresh_process(tmp_path, content) -> None:
    """A file that is no library, and a library that is not ONNX Runtime (the extension itself)."""
    library = tmp_path / "libonnxruntime.so"
    library.write_bytes(Path(_native.__file__).read_bytes() if content is None else content.encode())
    code = (
        "from vlm_edge_runtime import _native\nfrom vlm_edge_runtime.errors import DeviceError\n"
        f"try:\n    _native.load_runtime({str(library)!r})\nexcept DeviceError as error:\n    print(error)\n"
        "try:\n    _native.Session(b'x', 'g')\nexcept DeviceError as error:\n    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot use ONNX Runtime at" in output and "is not loaded" in output


def test_a_process_that_never_closes_ends_cleanly() -> None:
    code = (
        "import numpy as np\nfrom vlm_edge_runtime import _native\nfrom vlm_edge_runtime.engines import ort_library as o\n"
        "o.ensure_runtime()\ns = _native.Session(o._doubling_model(), 'g', threads=2)\n"
        "keep = np.asarray(s.run({'x': np.ones((1, 3), np.float32)})['y'])\nprint(keep.tolist(), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[2.0, 2.0, 2.0]]\n", "")
