"""Which TensorRT compiles for a target, and what is said where it cannot."""

import sys
import types

import msgspec
import pytest
from engine_builds import stand_in_tensorrt

from vlm_edge.targets import load_target
from vlm_edge.targets.tensorrt import seam
from vlm_edge.targets.tensorrt.seam import AHEAD_OF_TIME_SM, Gpu, NotHere, check_sm, load_library
from vlm_edge_runtime.errors import TargetError

ORIN = Gpu("Orin", 87)


def test_what_rtx_compiles_for_is_what_its_library_says():
    import tensorrt_rtx

    known = {name for name in dir(tensorrt_rtx.ComputeCapability) if name.startswith("SM")}
    assert known == {f"SM{sm}" for sm in AHEAD_OF_TIME_SM}


def test_rtx_is_here():
    library = load_library(load_target("rtx-40"), (89,), gpu=None)
    assert library.flavour == "tensorrt-rtx" and library.ahead_of_time and library.version.startswith("1.")
    assert not seam.has_timing_cache(library)


@pytest.mark.parametrize("sm", [87, 90, 110])
def test_rtx_does_not_compile_for(sm):
    with pytest.raises(TargetError, match=rf"not for SM {sm}: choose a target of backend tensorrt"):
        check_sm(load_target("rtx-40"), (86, sm))


def test_compute_capabilities_are_sorted_and_told_once():
    assert check_sm(load_target("rtx-40"), (120, 86, 86)) == (86, 120)
    with pytest.raises(TargetError, match="name one, for example 89"):
        check_sm(load_target("rtx-40"), ())
    with pytest.raises(TargetError, match=r"is for SM 87, not for SM 86"):
        check_sm(load_target("jetson-orin-nano"), (86,))


def test_a_jetson_engine_is_not_made_here():
    with pytest.raises(NotHere, match=r"this one has no GPU; .* \(SM 87, JetPack 7\.2\)"):
        load_library(load_target("jetson-orin-nano"), (87,), gpu=None)
    with pytest.raises(NotHere, match=r"a GeForce RTX 4090 \(SM 89\)"):
        load_library(load_target("jetson-orin-nano"), (87,), gpu=Gpu("GeForce RTX 4090", 89))


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(TargetError, match=r"comes with JetPack 7\.2 .*--system-site-packages"):
        load_library(load_target("jetson-orin-nano"), (87,), gpu=ORIN)
    with pytest.raises(TargetError, match=r"pip install 'vlm-edge\[tensorrt-rtx\]'"):
        load_library(load_target("rtx-40"), (89,), gpu=None)


def test_a_library_that_does_not_load_with_a_stand_in(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(TargetError, match=r"is installed and does not load \(libnvinfer"):
        load_library(load_target("jetson-orin-nano"), (87,), gpu=ORIN)


def test_versions_with_a_stand_in_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt("10.3.0.30"))
    library = load_library(load_target("jetson-orin-nano-jp62"), (87,), gpu=ORIN)
    assert library.flavour == "tensorrt" and not library.ahead_of_time and seam.has_timing_cache(library)
    with pytest.raises(TargetError, match=r">=10\.16,<10\.17, JetPack 7\.2, installed is 10\.3\.0\.30"):
        load_library(load_target("jetson-orin-nano"), (87,), gpu=ORIN)


def test_a_version_of_rtx_that_the_target_does_not_allow():
    target = load_target("rtx-40")
    older = msgspec.structs.replace(target, device=msgspec.structs.replace(target.device, tensorrt=">=1.2,<1.3"))
    with pytest.raises(TargetError, match=r"is for tensorrt-rtx >=1\.2,<1\.3, installed is 1\."):
        load_library(older, (89,), gpu=None)


def test_the_flag_of_strong_typing_with_a_stand_in_tensorrt():
    """TensorRT 10 has it beside EXPLICIT_BATCH; a version without it knows nothing but strong typing."""
    asked = []
    builder = types.SimpleNamespace(create_network=asked.append)
    for flags in (types.SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1), types.SimpleNamespace()):
        module = types.ModuleType("tensorrt")
        module.NetworkDefinitionCreationFlag = flags
        seam.create_network(seam.Library(module, "tensorrt", "10.3"), builder)
    assert asked == [2, 0]


def test_timings_are_kept_with_a_stand_in_tensorrt():
    """A cache of another GPU or version is not taken: the builder begins with an empty one."""
    given = []

    class Cache:
        def __init__(self, data):
            self.data = data

        def serialize(self):
            return self.data

    class Config:
        cache = None

        def create_timing_cache(self, data):
            given.append(data)
            return Cache(data)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert ignore_mismatch is False
            if cache.data == b"foreign":
                return False
            self.cache = cache
            return True

        def get_timing_cache(self):
            return self.cache

    library = seam.Library(types.ModuleType("tensorrt"), "tensorrt", "10.16")
    config = Config()
    seam.set_timings(library, config, b"foreign")
    assert given == [b"foreign", b""] and seam.timings(config) == b""
    seam.set_timings(library, config, b"own")
    assert seam.timings(config) == b"own"


def test_no_gpu_here_or_a_named_one():
    found = seam.local_gpu()
    assert found is None or (found.name and 50 <= found.sm < 200)
