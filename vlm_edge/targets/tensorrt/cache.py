"""What an engine depends on, as one key; and the timings of kernels that are kept between builds on a device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vlm_edge_runtime.bundle.engine_files import graph_digest
from vlm_edge_runtime.bundle.engine_profile import EngineProfile
from vlm_edge_runtime.bundle.manifest import GraphEntry

from .seam import Gpu, Library, platform_tag

_FORM = 3
"""Raised when this module compiles the same graph otherwise than before: older engines are then stale."""


def engine_key(
    entry: GraphEntry, profiles: Sequence[EngineProfile], library: Library, sm: Sequence[int], settings: Mapping[str, Any]
) -> str:
    """SHA-256 over everything that an engine is made from: an equal key is an equal engine, and nothing is to be compiled.

    The graph's files, profiles and settings, the builder and its version, the compute capabilities, the platform.
    """
    parts = {
        "form": _FORM,
        "graph": graph_digest(entry),
        "profiles": msgspec.to_builtins(list(profiles)),
        "settings": dict(settings),
        "builder": library.flavour,
        "version": library.version,
        "sm": sorted(sm),
        "platform": platform_tag(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TimingCache:
    """Timings of one graph's kernels on one GPU by one version of TensorRT, in a file of the user's cache folder.

    A damaged or foreign file costs time, never a wrong engine: TensorRT checks what it reads and starts anew. The file is
    replaced by rename, so a loss of power leaves the old one.
    """

    def __init__(self, gpu: Gpu, library: Library, entry: GraphEntry, folder: Path | None = None) -> None:
        device = re.sub(r"[^A-Za-z0-9]+", "-", f"{gpu.name}-sm{gpu.sm}").strip("-").lower()
        self.path = (folder or _folder()) / f"{device}.{library.version}.{graph_digest(entry)[:16]}.timings"

    def read(self) -> bytes:
        """What an earlier build measured; empty where there was none."""
        with contextlib.suppress(OSError):
            return self.path.read_bytes()
        return b""

    def write(self, data: bytes) -> None:
        """Keeps the timings. A cache that cannot be written (read-only home, full disk) is not an error of the build."""
        if not data:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=self.path.parent)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink(missing_ok=True)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-edge" / "timings"
