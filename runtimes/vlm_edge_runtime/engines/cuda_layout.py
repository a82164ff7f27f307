"""The structures of kernels/decode_layout.h as numpy types; the compiler checks that both have the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np

EMITTED, FINISHED, HALTED = 1, 2, 4
"""Flags of a record; its status stands above them (see `sample_status`)."""

_STATUS_SHIFT = 8
_STATUS_TEXTS = {
    1: "NaN",
    2: "infinity",
    3: "only minus infinity",
    4: "no token that the generation options (forced, suppressed, bad words, n-grams, shortest length) allow",
}


def _structure(*fields: tuple[str, type | str]) -> np.dtype[np.void]:
    return np.dtype(list(fields), align=True)


def _all(names: str, kind: type | str) -> list[tuple[str, type | str]]:
    return [(name, kind) for name in names.split()]


RECORD = _structure(*_all("token flags", np.int32), ("logprob", np.float64))
ROW = _structure(
    *_all("pending position", np.int64),
    *_all("length active marked running", np.int32),
    *_all("temperature top_p min_p", np.float64),
    *_all("seed draws", np.uint64),
    ("top_k", np.int64),
    ("penalty", np.float32),
    ("logprobs", np.int32),
    *_all("rules min_length", np.int64),
    *_all("constrained ngram begin_count forced_count bias_count spare", np.int32),
    *_all("tokens history seen seen_list", np.int64),
    *_all("seen_count status best", np.int32),
    *_all("largest threshold raw_largest", np.float32),
)
KEPT = _structure(*_all("from from_stride to to_stride bytes", np.int64))
GUARDED = _structure(*_all("past present save heads entry", np.int64))
CONTROL = _structure(*_all("slot halted", np.int32))
STEP = _structure(
    *_all("rows control ring logits scores weights partials ids past positions kept guarded stride", np.int64),
    *_all("batch capacity bucket vocab axes wide_ids wide_positions slots blocks kept_count guarded_count spare", np.int32),
)

KERNELS = (
    "vlm_begin",
    "vlm_save_last",
    "vlm_restore_last",
    "vlm_keep",
    "vlm_finish",
    "vlm_controls",
    "vlm_weights",
    "vlm_choose",
)
SOURCES = ("decode_step.cu", "decode_sample.cu", "decode_draw.cu")
HEADERS = ("decode_layout.h",)
MAX_THREADS = 512
"""Threads of a block at most; a power of two."""


def kernel_files() -> dict[str, str]:
    """The kernels' source texts by file name."""
    folder = resources.files("vlm_edge_runtime.engines") / "kernels"
    return {name: (folder / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)}


def defines() -> list[str]:
    """Compiler options by which the sources check this file's sizes."""
    sizes = {"RECORD": RECORD, "ROW": ROW, "STEP": STEP, "KEPT": KEPT, "GUARDED": GUARDED}
    return [f"-D{name}_BYTES={kind.itemsize}" for name, kind in sizes.items()]


def status_text(flags: int) -> str | None:
    """What is wrong with a row's logits, by its record's flags; None where nothing is."""
    return _STATUS_TEXTS.get(flags >> _STATUS_SHIFT)


def lists(*groups: Sequence[int]) -> list[int]:
    """Token lists as the kernels read them: each one its count, then its tokens."""
    return [number for group in groups for number in (len(group), *group)]
