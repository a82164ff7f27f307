"""The toy decoder of the native tests serves here too."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

from toy_bench import OPTIONS, TOYS, Bench
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime.engines import EngineOptions, open_engine


@pytest.fixture(scope="module", params=["portable", "lowered"], name="make")
def _make(request, tmp_path_factory) -> Callable[..., Bench]:
    benches: dict[str, Bench] = {}

    def make(toy: Toy, options: EngineOptions = OPTIONS) -> Bench:
        key = repr((toy.__class__.__name__, [getattr(toy, name) for name in toy.__slots__ if name[0] != "_"], options))
        if key not in benches:
            bundle = toy_bundle(tmp_path_factory.mktemp("toy"), toy, request.param if request.param == "lowered" else None)
            benches[key] = Bench(open_engine(bundle, "cpu", options), toy)
        return benches[key]

    return make


@pytest.fixture(params=TOYS, name="bench")
def _bench(request, make) -> Bench:
    return make(TOYS[request.param])
