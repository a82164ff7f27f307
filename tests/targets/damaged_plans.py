"""Plans that were damaged on the way: what both kinds of plan must refuse, or run without reading beyond their memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.samples import run_graph
from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

PARTS = ("head", "steps", "tail", "magic", "version")


def refused(path: Path, part: str) -> None:
    """Damages the plan in `path` there, and asserts that it is not opened."""
    data = bytearray(path.read_bytes())
    if part == "head":
        del data[60:]
    elif part == "tail":
        del data[-4096:]
    elif part == "steps":  # the last step writes outside its buffer
        size = int.from_bytes(data[12:16], "little")
        data[16 + size - 200 : 16 + size - 100] = b"\x7f" * 100
    else:
        data[0 if part == "magic" else 8] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(DeviceError, match="plan"):
        _native.Session(str(path), path.stem, plan=True)


def survives(path: Path, feeds: Mapping[str, npt.NDArray[np.generic]], count: int) -> None:
    """Changes single bytes of the plan's description, `count` times, and runs it where it is opened: `make asan` watches."""
    data = path.read_bytes()
    size = int.from_bytes(data[12:16], "little")
    generator = np.random.default_rng(0)
    opened = 0
    for place in generator.integers(16, 16 + size, count):
        changed = bytearray(data)
        changed[place] = int(generator.integers(0, 256))
        path.unlink()  # what is mapped is never written to
        path.write_bytes(bytes(changed))
        try:
            run_graph(PlanSession(path), feeds)
            opened += 1
        except (DeviceError, ValueError, KeyError):
            continue
    assert opened < count
