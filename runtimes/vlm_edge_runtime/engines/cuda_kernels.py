"""The decode kernels as machine code for one GPU: compiled by NVRTC when first needed, then kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from vlm_edge_runtime.errors import DeviceError

from .cuda_driver import INSTALL
from .cuda_layout import HEADERS, SOURCES, defines, kernel_files

_PROGRAM = "".join(f'#include "{name}"\n' for name in SOURCES)


def cache_folder() -> Path:
    """Where compiled kernels and TensorRT-RTX's runtime caches are kept: `vlm-edge` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-edge"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a cache file under its name only when it is complete. A cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError:
        return


def compiled_kernels(sm: int, folder: Path | None = None) -> bytes:
    """The kernels' cubin for compute capability `sm` (86 is 8.6), from the cache where it is there.

    Raises DeviceError when NVRTC is missing, or does not know the GPU.
    """
    nvrtc = _nvrtc()
    version = ".".join(str(part) for part in _done(nvrtc, nvrtc.nvrtcVersion()))
    key = hashlib.sha256("\0".join([version, *options(sm), _PROGRAM, *kernel_files().values()]).encode()).hexdigest()[:32]
    path = (folder or cache_folder() / "kernels") / f"decode-sm{sm}-{key}.cubin"
    if path.is_file() and (kept := path.read_bytes()):
        return kept
    cubin = compile_kernels(sm)
    write_atomically(path, cubin)
    return cubin


def options(sm: int) -> list[str]:
    """NVRTC's options. No contraction to fused multiply-add: rounding is the C sampler's."""
    return [f"--gpu-architecture=sm_{sm}", "-std=c++17", "-fmad=false", *defines()]


def compile_kernels(sm: int) -> bytes:
    """Compiles for one compute capability; needs no GPU. Raises DeviceError with the compiler's words."""
    nvrtc = _nvrtc()
    known = [int(arch) for arch in _done(nvrtc, nvrtc.nvrtcGetSupportedArchs())[0]]
    if sm not in known:
        raise DeviceError(
            f"the installed NVRTC compiles for compute capabilities {known[0] / 10} to {known[-1] / 10}, not for {sm / 10}: "
            "install a version of nvidia-cuda-nvrtc that knows this GPU."
        )
    files = {name: text.encode() for name, text in kernel_files().items()}
    names = [*HEADERS, *SOURCES]
    (program,) = _done(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            _PROGRAM.encode(), b"decode.cu", len(names), [files[name] for name in names], [name.encode() for name in names]
        ),
    )
    try:
        given = [option.encode() for option in options(sm)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if int(status) != 0:
            (size,) = _done(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            log = bytearray(size)
            _done(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            raise DeviceError(
                f"the decode kernels do not compile for compute capability {sm / 10}: {bytes(log).decode().strip()}"
            )
        (size,) = _done(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        cubin = bytearray(size)
        _done(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except Exception as error:  # not installed, or a class of cuda-bindings' own for a library that is not there
        raise DeviceError(
            f"NVRTC, which compiles the sampling kernels for the GPU, cannot be loaded ({str(error).splitlines()[0]}). {INSTALL}"
        ) from None
    return nvrtc


def _done(nvrtc: Any, result: Any) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise DeviceError(f"NVRTC failed: {getattr(result[0], 'name', result[0])}.")
    return tuple(result[1:])
