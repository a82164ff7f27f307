"""`CudaDevice` through the real cuda-bindings, on a stand-in for the driver's library (stand_in_libcuda.c), in own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_kernels import HostKernels, compile_shared

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed (pip install 'vlm-edge[gpu]')")
pytest.importorskip("cuda.bindings.nvrtc")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(scope="module", name="environment")
def _environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("driver")
    HostKernels(folder)
    source = (HERE / "stand_in_libcuda.c").read_text(encoding="utf-8")
    options = ("-Wall", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-ldl")
    library = compile_shared(source, "cuda", folder, *options, compiler="gcc")
    library.rename(folder / "libcuda.so.1")
    found = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}",
        "VLM_HOST_KERNELS": str(folder / "libhost_kernels.so"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'runtimes'}",
    }
    # NVRTC talks to the driver where one is loaded, which the stand-in is no match for: the kernels come from the cache.
    compiled = "from vlm_edge_runtime.engines.cuda_kernels import compiled_kernels; compiled_kernels(86)"
    assert _run(found, "-c", compiled, LD_LIBRARY_PATH="").returncode == 0
    return found


def _run(environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**environment, **more}, check=False)


def test_a_toy_is_decoded_through_cuda_bindings_on_a_stand_in_driver(environment, tmp_path) -> None:
    done = _run(environment, str(HERE / "stand_in_driver_run.py"), str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "decoded\n"), done.stderr


_OPEN = "from vlm_edge_runtime.engines.cuda_device import CudaDevice; d = CudaDevice(); d.allocate(1 << 20); print(d.sm)"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"VLM_NO_GPU": "1"}, "the NVIDIA driver finds no GPU here (CUDA_ERROR_NO_DEVICE)"),
        ({"VLM_DRIVER": "11080"}, "the NVIDIA driver is too old: it serves CUDA 11.8, the installed cuda-bindings need CUDA"),
        ({"VLM_GPU_BYTES": "4096"}, "GPU stand-in GPU has no 1 MiB left"),
        ({"LD_LIBRARY_PATH": ""}, "this machine has no NVIDIA driver"),
    ],
)
def test_one_clear_error_for_each_way_a_stand_in_driver_can_fail(environment, more, message) -> None:
    done = _run(environment, "-c", _OPEN, **more)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vlm_edge_runtime.errors.DeviceError: ") and message in last, done.stderr
