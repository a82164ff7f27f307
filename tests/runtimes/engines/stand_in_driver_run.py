"""Run by test_cuda_stand_in_driver.py in a process of its own, where libcuda.so.1 is the stand-in.

The real `CudaDevice`, through the real cuda-bindings, decodes a toy whose "engines" are ONNX Runtime sessions: in TensorRT's
place, and as the CUDA engine has them, but for the CPU provider.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "native"), *sys.argv[2:]]

from host_engine import toy_bench, toy_engine  # noqa: E402
from toy_bench import PROMPTS  # noqa: E402
from toy_bundle import toy_bundle  # noqa: E402
from toy_decoder import Toy  # noqa: E402

from vlm_edge_runtime import _native  # noqa: E402
from vlm_edge_runtime.engines import SamplingParams  # noqa: E402
from vlm_edge_runtime.engines.cuda_device import CudaDevice  # noqa: E402
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine  # noqa: E402
from vlm_edge_runtime.engines.ort_cuda_place import host_place  # noqa: E402
from vlm_edge_runtime.errors import DeviceError  # noqa: E402

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Device(CudaDevice):
    """What TensorRT queues on the stream is here a function of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = []
        self._library = ctypes.CDLL("libcuda.so.1")

    def enqueue(self, work) -> None:
        function = _HostFunction(lambda _: work())
        self.kept.append(function)
        assert self._library.cuLaunchHostFunc(ctypes.c_void_p(self.stream), function, None) == 0


def main(folder: Path) -> None:
    sampled = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=11)
    for native in (True, False):
        toy = Toy(recurrent=True, feature=True, shared=True)
        device = Device()
        assert (device.name, device.sm) == ("stand-in GPU", 86)
        free = device.free_memory()
        engine = toy_engine(folder / str(native), None, toy, native=native, device=device)
        bench = toy_bench(engine, toy)
        state = bench.filled(40)
        tokens = [[], [], []]
        for steps in (1, 2, 5):
            for row, produced in enumerate(state.decode(steps)):
                tokens[row] += produced.tokens
        assert tokens == [bench.expected(row, 8) for row in range(3)], tokens
        assert engine.step_counts.captured == 7 - (1 if native else 2), engine.step_counts
        logits = state.step(np.array([1, 2, 3]))
        state.reorder([2, 1, 1])
        np.testing.assert_array_equal(state.logits(0), logits[2])
        other = bench.decoder.allocate(1, 40)
        bench.bind(other, 0, bench.source(0))
        other.copy_prefix(0, state, 1, state.lengths[1])
        rest = {name: array[:2] for name, array in bench.source(0).prompt.items()}
        for copy, row in ((state, 1), (other, 0)):
            bench.prefill(copy, row, [4, 5], rest)
        np.testing.assert_array_equal(other.logits(0), state.logits(1))
        state.truncate(2, 0)
        bench.fill(state, 2, PROMPTS[2], bench.source(2), sampled)
        reference = _native.Sampler(toy.vocab, sampled)
        for token in PROMPTS[2]:
            reference.accept(token)
        for _ in range(4):
            values = state.logits(2)
            expected, _, _ = reference.choose(values)
            assert state.decode(1)[2].tokens == [expected]
            state.push(2, expected)
            reference.accept(expected)
        state.close()
        other.close()
        engine.close()
        try:
            device.use()
        except DeviceError as error:
            assert "is closed" in str(error)
        assert free > 0
    toy = Toy(recurrent=True, feature=True, shared=True, cross=True)
    engine = OrtCudaEngine(toy_bundle(folder, toy, "lowered"), _place=host_place(CudaDevice()))
    bench = toy_bench(engine, toy)
    state = bench.filled(40)
    tokens = [[], [], []]
    for steps in (1, 2, 5):
        for row, produced in enumerate(state.decode(steps)):
            tokens[row] += produced.tokens
    assert tokens == [bench.expected(row, 8) for row in range(3)], tokens
    assert engine.step_counts.captured == 6 and engine.step_counts.host_sampled == 0, engine.step_counts
    state.truncate(2, 0)
    bench.fill(state, 2, PROMPTS[2], bench.source(2), sampled)
    assert len(state.decode(4)[2].tokens) == 4
    engine.close()
    print("decoded")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
