"""Builds the C extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests: `make asan`.

Then with ThreadSanitizer, for whole sessions on several threads (`--races`: only that). The instrumented extensions lie in
folders of their own (.cache/asan, .cache/tsan), ahead of the ordinary one on the path, so that nothing else sees them. Leaks are
looked for by the tests themselves (memory steady over many states), not by LeakSanitizer, which would report what Python and ONNX
Runtime keep on purpose.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "asan"
RACES_FOLDER = ROOT / ".cache" / "tsan"
RACES = "tests/runtimes/native/test_native_races.py"
ENGINES = ROOT / "tests" / "runtimes" / "engines"
TESTS = (
    "tests/runtimes/native",
    *sorted(str(path.relative_to(ROOT)) for path in ENGINES.glob("test_engines_*.py")),
    "tests/runtimes/engines/test_cuda_loop.py",
    "tests/runtimes/engines/test_ort_cuda_loop.py",
    "tests/runtimes/engines/test_ort_cuda_bound_run.py",
    "tests/targets/test_targets_native_plan.py",
    "tests/targets/test_targets_native_encoder.py",
    "tests/targets/test_targets_native_decoder_steps.py",
    "tests/targets/test_targets_native_graph_steps.py",
    "tests/targets/test_targets_native_patches.py",
    "tests/targets/test_targets_native_texts.py",
    "tests/targets/test_targets_native_embed.py",
    "tests/targets/test_targets_native_hostile_calls.py",
    "tests/targets/test_targets_plan_version.py",
    "tests/runtimes/bundle/test_bundle_verify.py",
)
"""What runs C of the extension. Engines for GPUs do so through the same loop; their kernels have a sanitizer of their own."""
SANITIZERS = "address,undefined"


def build(folder: Path = FOLDER, sanitizers: str = SANITIZERS) -> Path:
    """Builds into `folder`; returns what to put on the path: a copy of the package with the instrumented extension."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "vlm_edge_runtime"
    shutil.copytree(
        ROOT / "runtimes" / "vlm_edge_runtime", package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    )
    environment = os.environ | {"VLM_EDGE_SANITIZE": sanitizers}
    arguments = ["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    subprocess.run([sys.executable, "setup.py", "--quiet", *arguments], cwd=ROOT, env=environment, check=True)
    return folder


def library(name: str) -> str:
    """Path of one of the compiler's runtime libraries."""
    compiler = os.environ.get("CC", "gcc").split()
    return subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def races() -> int:
    """Builds with ThreadSanitizer and runs sessions on several threads; pytest's exit status."""
    environment = os.environ | {"VLM_EDGE_TSAN": str(build(RACES_FOLDER, "thread"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", RACES]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """Builds, runs the tests, returns pytest's exit status."""
    if sys.argv[1:] == ["--races"]:
        return races()
    folder = build()
    preload = [library("libasan.so"), library("libubsan.so"), library("libstdc++.so")]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONMALLOC": "malloc",
        "VLM_EDGE_SANITIZED": "1",
    }
    check = "from vlm_edge_runtime import _native; print(_native.__file__)"
    loaded = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout
    if Path(loaded.strip()).parent != folder / "vlm_edge_runtime":
        raise SystemExit(f"the tests would load {loaded.strip()} and not the instrumented extension in {folder}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "1800", *(sys.argv[1:] or TESTS)]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return status if status or sys.argv[1:] else races()


if __name__ == "__main__":
    sys.exit(main())
