"""llama.cpp from the source package of llama-cpp-python: the two libraries that the bench loads, compiled for this CPU.

pip's own build compiles the package's other half too (llama-common, 52 of its objects) in a folder that it throws away when it is
stopped. Here the build folder stays, so that a build which was stopped goes on, and its output is in a log from the first line.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .run import run

VERSION = "0.3.36"
TARGETS = ("llama", "mtmd")
LIBRARIES = ("vendor/llama.cpp/tools/mtmd/libmtmd*", "bin/lib*")


def build(host: str, python: str, folder: Path, log: Path) -> None:
    """Downloads, compiles, installs into `python`'s environment, which has cmake, ninja and scikit-build-core already.

    `host`: an interpreter with pip; `folder`: keeps the source and the objects. Raises PeerError.
    """
    source, objects, tools = folder / "source", folder / "build", Path(python).parent
    pip = [host, "-m", "pip", "--python", python]
    if not (source / "vendor" / "llama.cpp").is_dir():
        wanted = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", "--dest", str(folder)]
        run([*pip, "download", *wanted, f"llama-cpp-python=={VERSION}"], log, "llama.cpp's source cannot be had")
        unpack(folder / f"llama_cpp_python-{VERSION}.tar.gz", source)
    without = [f"--config-settings=cmake.define.{name}=OFF" for name in ("LLAMA_BUILD", "LLAVA_BUILD")]
    bare = [*pip, "install", "--no-deps", "--no-build-isolation", "--no-compile", *without, str(source)]
    path = f"{tools}:{os.environ['PATH']}"
    run(bare, log, "llama-cpp-python's Python files cannot be installed", PATH=path)
    configure = [str(tools / "cmake"), "-S", str(source), "-B", str(objects), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    run(configure, log, "llama.cpp cannot be configured (it needs a C++ compiler)", PATH=path)
    compile_ = [str(tools / "cmake"), "--build", str(objects), "--target", *TARGETS]
    what = f"llama.cpp cannot be compiled (what is compiled stays in {objects}; the same command goes on)"
    run(compile_, log, what, PATH=path)
    library = next(Path(python).parents[1].glob("lib/python*/site-packages/llama_cpp")) / "lib"
    library.mkdir(exist_ok=True)
    for pattern in LIBRARIES:
        for file in objects.glob(pattern):
            if ".so" in file.name or ".dylib" in file.name:
                (library / file.name).unlink(missing_ok=True)
                shutil.copy(file, library / file.name, follow_symlinks=False)


def unpack(archive: Path, folder: Path) -> None:
    """A source package's only folder becomes `folder`."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.unpack_archive(archive, part)
    shutil.rmtree(folder, ignore_errors=True)
    next(part.iterdir()).rename(folder)
    part.rmdir()
