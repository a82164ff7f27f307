"""The toy decoder of the native tests serves here too."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

from host_device import PromptDevice
from host_kernels import HostKernels
from toy_bench import OPTIONS, TOYS, Bench
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime.engines import EngineOptions, open_engine
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine
from vlm_edge_runtime.engines.ort_cuda_place import Place, host_place

CUDA_LOOP = "CUDA loop on the CPU provider"


@pytest.fixture(scope="session", name="kernels")
def _kernels(tmp_path_factory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session", name="place")
def _place(kernels, tmp_path_factory) -> Callable[..., Place]:
    """A place on the CPU provider: the GPU's memory and kernels are this process's."""

    def make(**options) -> Place:
        return host_place(PromptDevice(kernels, tmp_path_factory.mktemp("device")), **options)

    return make


@pytest.fixture(scope="module", params=["portable", "lowered", CUDA_LOOP], name="make")
def _make(request, tmp_path_factory, place) -> Callable[..., Bench]:
    benches: dict[str, Bench] = {}

    def make(toy: Toy, options: EngineOptions = OPTIONS) -> Bench:
        key = repr((toy.__class__.__name__, [getattr(toy, name) for name in toy.__slots__ if name[0] != "_"], options))
        if key not in benches:
            bundle = toy_bundle(tmp_path_factory.mktemp("toy"), toy, None if request.param == "portable" else "lowered")
            if request.param == CUDA_LOOP:
                engine: Engine = OrtCudaEngine(bundle, options, _place=place())
            else:
                engine = open_engine(bundle, "cpu", options)
            benches[key] = Bench(engine, toy)
        return benches[key]

    return make


@pytest.fixture(params=TOYS, name="bench")
def _bench(request, make) -> Bench:
    return make(TOYS[request.param])
