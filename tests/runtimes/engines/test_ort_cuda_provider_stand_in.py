"""The CUDA engine with the real CUDA provider of onnxruntime-gpu, over stand-ins for CUDA's libraries whose kernels do nothing.

What it shows: which calls ONNX Runtime makes on our stream for a token. The wheel has 256 MB, so this runs only where
VLM_EDGE_ONNXRUNTIME_GPU names a folder with its libraries (of `pip download --no-deps onnxruntime-gpu`, unzipped).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from host_kernels import HostKernels, compile_shared

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed (pip install 'vlm-edge[gpu]')")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = os.environ.get("VLM_EDGE_ONNXRUNTIME_GPU", "")
PROVIDER = "libonnxruntime_providers_cuda.so"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="VLM_EDGE_ONNXRUNTIME_GPU names no folder with onnxruntime-gpu's libraries"),
]


def _stand_ins(folder: Path) -> None:
    """libcuda (with our kernels), libcudart, and libraries of functions that do nothing, as the provider is linked with them."""
    needed = subprocess.run(["nm", "-D", "--undefined-only", f"{FOLDER}/{PROVIDER}"], capture_output=True, text=True, check=True)
    wanted: dict[str, list[str]] = defaultdict(list)
    for name, library in re.findall(r" (\w+)@(lib(?:cudart|cublas|cublasLt)\.so\.\d+)", needed.stdout):
        wanted[library].append(name)
    linked = subprocess.run(["readelf", "-d", f"{FOLDER}/{PROVIDER}"], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"\[(lib(?:cu)\w+\.so\.\d+)\]", linked):
        source = ""
        if library.startswith("libcudart"):
            source = (HERE / "stand_in_cudart.c").read_text(encoding="utf-8")
        elif library.startswith("libcuda."):
            source = (HERE / "stand_in_libcuda.c").read_text(
                encoding="utf-8"
            ) + "EXPORT int cuTensorMapEncodeTiled(void) { return 0; }\n"
        written = set(re.findall(r"^EXPORT [\w *]*?\*?(\w+)\(", source, re.MULTILINE))
        hidden = "" if source else '#define EXPORT __attribute__((visibility("default")))\n'
        source += hidden + "".join(
            f"EXPORT int {name}(void) {{ return 0; }}\n" for name in wanted[library] if name not in written
        )
        options = ["-fvisibility=hidden", f"-Wl,-soname,{library}", "-ldl", "-w"]
        if wanted[library]:
            versions = folder / f"{library}.map"
            versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
            options.append(f"-Wl,--version-script={versions}")
        name = library.split(".")[0].removeprefix("lib")
        compile_shared(source, name, folder, *options, compiler="gcc").rename(folder / library)


def test_a_token_is_two_graph_launches_on_our_stream_over_stand_ins_for_cuda(tmp_path) -> None:
    HostKernels(tmp_path)
    _stand_ins(tmp_path)
    library = next(Path(FOLDER).glob("libonnxruntime.so*"))
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "VLM_EDGE_ONNXRUNTIME": str(library),
        "VLM_HOST_KERNELS": str(tmp_path / "libhost_kernels.so"),
        "VLM_GPU_ZEROS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "runtimes")])),
    }
    compiled = "from vlm_edge_runtime.engines.cuda_kernels import compiled_kernels; compiled_kernels(86)"
    subprocess.run([sys.executable, "-c", compiled], env={**environment, "LD_LIBRARY_PATH": ""}, check=True)
    command = [sys.executable, str(HERE / "stand_in_provider_run.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    uncaptured, captured, captures, stream = done.stdout.split()
    # The embedding and its conversion to fp16, the decoder and its logits' to fp32: four runs a step, four graphs.
    assert (uncaptured, captured, captures) == ("None", "7", "2")
    calls = dict(re.findall(r"== (.+)\n((?:(?!==).*\n)*)", done.stderr))
    first, then = calls["decode 3"].splitlines(), calls["decode 4"].splitlines()
    assert sum("begin capture" in line for line in first) == sum("end capture" in line for line in first) == 4
    assert all(stream in line for line in first if "capture" in line), "on the engine's own stream"
    assert not any("malloc while capturing" in line or "host function" in line for line in first)
    assert then == [f"[cudart] graph stream {stream}"] * 4 * 4, "no copy, no wait, nothing launched by itself"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
