"""Run by test_ort_cuda_provider_stand_in.py in a process of its own: the CUDA engine over stand-ins for CUDA's libraries.

`cut`: stderr gets a line before each call, so that what the provider called in it can be told apart.
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "native")]

from toy_bundle import halved, toy_bundle  # noqa: E402
from toy_decoder import Toy  # noqa: E402

from vlm_edge_runtime.engines import SamplingParams, ort_cuda_place  # noqa: E402
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine  # noqa: E402


def cut(what: str) -> None:
    print(f"== {what}", file=sys.stderr, flush=True)


def main(folder: Path) -> None:
    ort_cuda_place.wheel_cuda_version = lambda: None  # the driver's stand-in says what it likes
    bundle = toy_bundle(folder, Toy(), "lowered", backend="ort-cuda")
    (folder / "lowered.onnx").write_bytes(halved((folder / "lowered.onnx").read_bytes()))
    engine = OrtCudaEngine(bundle)
    decoder = engine.decoder()
    state = decoder.allocate(2, 40)
    for row in range(2):
        state.prefill(row, decoder.embed(np.array([3, 4, 5], np.int64)), np.arange(3))
        state.start(row, SamplingParams(temperature=0.7 * row), np.array([3, 4, 5], np.int64), 3)
    for steps in (2, 3, 4):
        cut(f"decode {steps}")
        state.decode(steps)
    cut("end")
    print(engine.uncaptured, engine.step_counts.captured, engine.place.captures, f"{engine.place.device.stream:#x}")
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
