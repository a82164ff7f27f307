"""The C loop over captured steps, on a stand-in of the driver's library: order, lookahead, and what ends a call."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest
from host_device import StandInLibcuda
from host_kernels import compile_shared
from onnx import TensorProto, helper

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.cuda_layout import EMITTED, FINISHED, HALTED, RECORD
from vlm_edge_runtime.engines.ort_library import ensure_runtime
from vlm_edge_runtime.errors import DeviceError

SLOTS, BATCH = 4, 2
GRAPHS, EVENTS = (11, 12), (21, 22)


class Scripted:
    """A device whose steps publish what a script says. Work is done when it is waited for; `log` tells the order of calls."""

    def __init__(self, folder: Path, script: list[list[tuple[int, int]]]) -> None:
        self.libcuda = StandInLibcuda(folder)
        self.loop = _native.CudaLoop(self.libcuda.path)
        self.ring = np.zeros((SLOTS, BATCH), RECORD)
        self.log: list[str] = []
        self.script, self.launched, self.done = script, 0, 0
        self.marks: dict[int, int] = {}
        for graph in GRAPHS:
            self.libcuda.launches[graph] = lambda graph=graph: self._launch(graph)
        for event in EVENTS:
            self.libcuda.records[event] = lambda event=event: self._record(event)
            self.libcuda.waits[event] = lambda event=event: self._wait(event)

    def run(self, steps: int, turn: int = 0, base: int = 0) -> tuple[np.ndarray, int]:
        ring = self.ring.ctypes.data
        data, launched = self.loop.run(7, EVENTS, GRAPHS, turn, ring, SLOTS, BATCH, base, steps)
        return np.frombuffer(data, RECORD).reshape(-1, BATCH), launched

    def _launch(self, graph: int) -> None:
        self.log.append(f"launch {graph}")
        self.launched += 1

    def _record(self, event: int) -> None:
        self.marks[event] = self.launched

    def _wait(self, event: int) -> None:
        self.log.append("wait")
        while self.done < self.marks[event]:
            step = self.script[self.done] if self.done < len(self.script) else [(-1, 0)] * BATCH
            for row, (token, flags) in enumerate(step):
                self.ring[self.done % SLOTS, row] = (token, flags, token / 2)
            self.done += 1


def _going(count: int) -> list[list[tuple[int, int]]]:
    return [[(10 + i, EMITTED), (20 + i, EMITTED)] for i in range(count)]


def test_one_step_is_launched_ahead_and_graphs_take_turns(tmp_path) -> None:
    device = Scripted(tmp_path, _going(9))
    records, launched = device.run(6, turn=1)
    assert launched == 6
    assert records["token"].tolist() == [[10 + i, 20 + i] for i in range(6)]
    assert records["logprob"][2].tolist() == [6, 11]
    ahead = ["launch 12", "launch 11", "wait", "launch 12", "wait", "launch 11", "wait", "launch 12", "wait", "launch 11"]
    assert device.log == [*ahead, "wait", "wait"]


def test_the_ring_goes_on_where_it_was(tmp_path) -> None:
    device = Scripted(tmp_path, _going(9))
    device.run(3)
    records, _ = device.run(3, base=3)
    assert records["token"][:, 0].tolist() == [13, 14, 15]


@pytest.mark.parametrize(
    ("last", "steps"),
    [
        ([(5, EMITTED | FINISHED), (6, EMITTED | FINISHED)], 3),  # end-of-sequence in both rows
        ([(5, EMITTED | FINISHED), (-1, 0)], 3),  # the other row had ended before
        ([(-1, HALTED), (-1, HALTED)], 3),  # no room
        ([(5, EMITTED), (-1, 1 << 8)], 3),  # unusable logits
    ],
)
def test_what_ends_a_call(tmp_path, last, steps) -> None:
    device = Scripted(tmp_path, [*_going(2), last, [(-1, 0), (-1, 0)]])
    records, launched = device.run(20)
    assert len(records) == steps + 1 and launched == steps + 1, "the step that was ahead is waited for"
    assert records["flags"][steps - 1].tolist() == [flags for _, flags in last]
    assert records["flags"][steps].tolist() == [0, 0]


def test_one_row_that_ends_does_not_end_the_others(tmp_path) -> None:
    script = [*_going(1), [(5, EMITTED | FINISHED), (6, EMITTED)], *[[(-1, 0), (7 + i, EMITTED)] for i in range(5)]]
    records, _ = Scripted(tmp_path, script).run(6)
    assert records["token"][:, 1].tolist() == [20, 6, 7, 8, 9, 10]


def test_cancel_ends_a_call_from_another_thread(tmp_path) -> None:
    device = Scripted(tmp_path, _going(10_000))
    reached, cancelled = threading.Event(), threading.Event()
    wait = device.libcuda.waits[EVENTS[0]]

    def slow() -> None:
        wait()
        reached.set()
        assert cancelled.wait(60)

    device.libcuda.waits[EVENTS[0]] = slow

    def cancel() -> None:
        assert reached.wait(60)
        device.loop.cancel()
        cancelled.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    records, launched = device.run(10_000)  # with the interpreter lock held, `cancel` could not run
    thread.join()
    assert len(records) == launched == 2
    assert device.loop.cancelled
    records, launched = device.run(5)
    assert (len(records), launched) == (0, 0), "it lasts …"
    device.loop.resume()
    assert len(device.run(5, base=2)[0]) == 5, "… until it is taken back"


@pytest.mark.parametrize(
    ("table", "call"), [("launches", "cuGraphLaunch"), ("records", "cuEventRecord"), ("waits", "cuEventSynchronize")]
)
def test_a_drivers_error_is_told_with_its_name(tmp_path, table, call) -> None:
    device = Scripted(tmp_path, _going(9))
    getattr(device.libcuda, table).clear()
    with pytest.raises(DeviceError, match=rf"{call} failed in a decode step: CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        device.run(3)


def _adder(bad: bool = False) -> tuple[_native.BoundRun, np.ndarray]:
    """A run of ONNX Runtime that adds 1 to what it finds; `bad`: one that fails (an index outside its table)."""
    ensure_runtime()
    element, kind = (TensorProto.INT64, "Gather") if bad else (TensorProto.FLOAT, "Add")
    info = [helper.make_tensor_value_info(name, element, [1]) for name in ("x", "y")]
    stored = helper.make_tensor("w", element, [1], [1])
    nodes = [helper.make_node(kind, ["w", "x"], ["y"])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [stored])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    run, memory = _native.BoundRun(_native.Session(model, "adder")), np.array([7], np.int64 if bad else np.float32)
    run.bind_input("x", memory.ctypes.data, [1])
    run.bind_output("y", memory.ctypes.data, [1])
    return run, memory


def test_runs_of_onnxruntime_go_between_graphs(tmp_path) -> None:
    device = Scripted(tmp_path, _going(9))
    run, memory = _adder()
    seen = []
    device.libcuda.launches[13] = lambda: seen.append(float(memory[0]))
    step = (GRAPHS[0], run, run, 13)
    data, launched = device.loop.run(7, EVENTS, (step, step), 0, device.ring.ctypes.data, SLOTS, BATCH, 0, 4)
    assert launched == 4 and len(np.frombuffer(data, RECORD)) == 4 * BATCH
    assert seen == [9, 11, 13, 15] and run.runs == 8 and memory[0] == 15
    assert device.log.count("launch 11") == 4


def test_a_run_that_fails_ends_the_call_with_onnxruntimes_words(tmp_path) -> None:
    device = Scripted(tmp_path, _going(9))
    run, _ = _adder(bad=True)
    step = [GRAPHS[0], run]
    with pytest.raises(DeviceError, match="indices element out of data bounds"):
        device.loop.run(7, EVENTS, (step, step), 0, device.ring.ctypes.data, SLOTS, BATCH, 0, 4)


@pytest.mark.parametrize("step", [(), ("a",), None, 1.5, (11, (12,)), (0,), (11,) * 9])
def test_what_is_no_step_is_refused(tmp_path, step) -> None:
    device = Scripted(tmp_path, [])
    with pytest.raises((TypeError, ValueError)):
        device.loop.run(7, EVENTS, (step, step), 0, device.ring.ctypes.data, SLOTS, BATCH, 0, 4)


def test_libraries_that_are_no_driver_are_refused(tmp_path) -> None:
    with pytest.raises(DeviceError, match=r"the CUDA driver's library cannot be used: .*no-such-library"):
        _native.CudaLoop("no-such-library.so")
    other = compile_shared("int cuGraphLaunch(void) { return 0; }\n", "other", tmp_path, compiler="gcc")
    with pytest.raises(DeviceError, match="has no function cuEventRecord: the driver is too old"):
        _native.CudaLoop(str(other))
    assert ctypes.CDLL(str(other)).cuGraphLaunch() == 0


def test_arguments_are_checked(tmp_path) -> None:
    device = Scripted(tmp_path, [])
    for wrong in ({"steps": 0}, {"steps": 1, "turn": -1}):
        with pytest.raises(ValueError, match=r"CudaLoop\.run: expected"):
            device.run(**wrong)
