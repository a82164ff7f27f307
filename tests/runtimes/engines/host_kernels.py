"""The CUDA kernels compiled as plain C++ (a block's threads as threads of the process), to be run on memory of this process."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from vlm_edge_runtime.engines import cuda_layout

_LAUNCHER = """
#define VLM_HOST
#include "decode_step.cu"
#include "decode_sample.cu"
#include "decode_draw.cu"

typedef void (*Kernel)(const Step *);
typedef struct {
    Kernel kernel;
    const Step *step;
    Dim thread, block, threads, blocks;
} Work;

static void *work(void *argument) {
    const Work *w = (const Work *)argument;
    threadIdx = w->thread;
    blockIdx = w->block;
    blockDim = w->threads;
    gridDim = w->blocks;
    w->kernel(w->step);
    return NULL;
}

KERNEL void launch(Kernel kernel, const Step *step, unsigned x, unsigned y, unsigned threads) {
    for (unsigned block = 0; block < x * y; block++) {
        Work works[MAX_THREADS];
        pthread_t ids[MAX_THREADS];
        for (unsigned i = 0; i < threads; i++) {
            works[i] = (Work){kernel, step, {i, 0}, {block % x, block / x}, {threads, 1}, {x, y}};
        }
        if (threads == 1) {
            work(&works[0]);
            continue;
        }
        pthread_barrier_init(&block_barrier, NULL, threads);
        for (unsigned i = 0; i < threads; i++) {
            pthread_create(&ids[i], NULL, work, &works[i]);
        }
        for (unsigned i = 0; i < threads; i++) {
            pthread_join(ids[i], NULL);
        }
        pthread_barrier_destroy(&block_barrier);
    }
}
"""

_FOLDER = resources.files("vlm_edge_runtime.engines") / "kernels"


def compile_shared(source: str, name: str, folder: Path, *options: str, compiler: str = "g++") -> Path:
    """A shared library from one source text. Skips the test where there is no compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    suffix = ".cpp" if compiler == "g++" else ".c"
    (folder / f"{name}{suffix}").write_text(source, encoding="utf-8")
    library = folder / f"lib{name}.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", *options, "-o", str(library), str(folder / f"{name}{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return library


class HostKernels:
    """`launch(name, step address, grid, threads)`, at once."""

    def __init__(self, folder: Path) -> None:
        options = ("-std=c++20", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden", f"-I{_FOLDER}")
        self._library = ctypes.CDLL(str(compile_shared(_LAUNCHER, "host_kernels", folder, *options, *cuda_layout.defines())))
        self._launch = self._library.launch
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
        self._launch.restype = None
        self._kernels = {name: ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value for name in cuda_layout.KERNELS}

    def launch(self, name: str, step: int, grid: tuple[int, int], threads: int = 1) -> None:
        self._launch(self._kernels[name], step, grid[0], grid[1], threads)
