"""The decode kernels through the real NVRTC, without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed (pip install 'vlm-edge[gpu]')")

from vlm_edge_runtime.engines import cuda_kernels, cuda_layout  # noqa: E402
from vlm_edge_runtime.errors import DeviceError  # noqa: E402

SM = (75, 80, 86, 87, 89, 90, 110, 120)


def _check(cubin: bytes) -> None:
    assert cubin[:4] == b"\x7fELF"
    for name in cuda_layout.KERNELS:
        assert name.encode() in cubin


def test_kernels_compile_once_and_are_kept(tmp_path, monkeypatch) -> None:
    first = cuda_kernels.compiled_kernels(86, tmp_path)
    _check(first)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("decode-sm86-") and kept.read_bytes() == first
    monkeypatch.setattr(cuda_kernels, "compile_kernels", lambda sm: pytest.fail("compiled again"))
    assert cuda_kernels.compiled_kernels(86, tmp_path) == first


@pytest.mark.slow
@pytest.mark.parametrize("sm", SM)
def test_kernels_compile_for_every_gpu_that_targets_name(sm) -> None:
    _check(cuda_kernels.compile_kernels(sm))


def test_a_gpu_that_the_compiler_does_not_know(tmp_path) -> None:
    with pytest.raises(DeviceError, match=r"compiles for compute capabilities 7\.5 to .*, not for 6\.1: install"):
        cuda_kernels.compiled_kernels(61, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_sizes_of_the_shared_structures_do_not_compile(monkeypatch) -> None:
    wrong = [one.replace("ROW_BYTES=", "ROW_BYTES=1") for one in cuda_layout.defines()]
    monkeypatch.setattr(cuda_kernels, "defines", lambda: wrong)
    with pytest.raises(DeviceError, match=r"cuda_layout\.py differs"):
        cuda_kernels.compile_kernels(86)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    _check(cuda_kernels.compiled_kernels(86, tmp_path / "file" / "below"))


_WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(sys.argv[1]):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from vlm_edge_runtime.engines.cuda_device import CudaDevice
CudaDevice()
"""


def test_without_cuda_bindings_one_sentence_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT, "cuda"], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "DeviceError: cuda-bindings, through which the GPU is reached, cannot be imported" in last
    assert "pip install 'vlm-edge[gpu]'" in last
