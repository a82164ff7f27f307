"""Run by test_cuda_kernel_races.py under ThreadSanitizer: samples a few steps on host-compiled kernels, four threads a block."""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "native")]

import host_kernels  # noqa: E402
import test_cuda_sampling as sampling  # noqa: E402

_compile = host_kernels.compile_shared
_NO_BARRIER = """#define VLM_HOST
#include <pthread.h>
static int no_barrier(pthread_barrier_t *) { return 0; }
#define pthread_barrier_wait no_barrier
"""


def _sanitized(source: str, name: str, folder: Path, *options: str, compiler: str = "g++") -> Path:
    if name == "host_kernels":
        options = (*options, "-fsanitize=thread", "-g", "-O1")
        if sys.argv[2] == "without":
            source = source.replace("#define VLM_HOST\n", _NO_BARRIER)
    return _compile(source, name, folder, *options, compiler=compiler)


def main(folder: Path) -> None:
    host_kernels.compile_shared = _sanitized
    kernels = host_kernels.HostKernels(folder)
    random = np.random.default_rng(0)
    params = list(sampling.CASES.values())
    rows = sampling.Rows(kernels, folder, params, [5, 7, 8, 5, 7], 4)
    for kind in ("wide", "ties", "with minus infinity"):
        rows.sample(sampling._logits(kind, random, len(params)))
        rows.rows["active"] = 1
    print("sampled")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
