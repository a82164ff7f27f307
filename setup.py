"""Builds `vlm_edge_runtime._native`, one limited-API (abi3) extension from every C file in runtimes/native."""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
SANITIZE = os.environ.get("VLM_EDGE_SANITIZE", "")  # "address,undefined" for `make asan`
COMPILE_ARGS = ["-std=c11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fno-math-errno"]
LINK_ARGS = ["-ldl", "-lm", "-lpthread"]
if SANITIZE:
    COMPILE_ARGS += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    LINK_ARGS += [f"-fsanitize={SANITIZE}"]

# Free-threaded builds have no limited API.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "vlm_edge_runtime._native",
            sources=sorted(str(p.relative_to(HERE)) for p in (HERE / "runtimes/native").rglob("*.c")),
            depends=sorted(
                str(p.relative_to(HERE)) for p in (HERE / "runtimes/native").rglob("*.*") if p.suffix in (".h", ".inc")
            ),
            include_dirs=["runtimes/native"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED else [],
            py_limited_api=LIMITED,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
