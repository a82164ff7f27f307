"""The tests that every engine passes, on the TensorRT engine over stand-ins of GPU and TensorRT (`host_device`).

Toy decoders are lowered by the passes of TensorRT builds, with caches updated in place and in two sets that take turns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from host_engine import toy_bench, toy_engine
from host_kernels import HostKernels
from test_engines_beams import *  # noqa: F403
from test_engines_binding import *  # noqa: F403
from test_engines_inputs import *  # noqa: F403
from toy_bench import OPTIONS, TOYS, Bench
from toy_decoder import Toy

from vlm_edge_runtime.engines import EngineOptions


@pytest.fixture(scope="module", params=["in place", "two sets"], name="make")
def _make(request, tmp_path_factory) -> Callable[..., Bench]:
    folder = tmp_path_factory.mktemp("stand-ins")
    kernels = HostKernels(folder)
    benches: dict[str, Bench] = {}

    def make(toy: Toy, options: EngineOptions = OPTIONS) -> Bench:
        key = repr((toy.__class__.__name__, [getattr(toy, name) for name in toy.__slots__ if name[0] != "_"], options))
        if key not in benches:
            native = request.param == "in place"
            engine = toy_engine(folder / str(len(benches)), kernels, toy, native=native, options=options)
            benches[key] = toy_bench(engine, toy)
        return benches[key]

    return make


@pytest.fixture(params=TOYS, name="bench")
def _bench(request, make) -> Bench:
    return make(TOYS[request.param])
