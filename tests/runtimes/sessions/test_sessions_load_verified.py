"""`load` refuses a file that was changed before anything is answered, and leaves no thread behind."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from vlm_edge_runtime import BundleError, load


@pytest.fixture(scope="module")
def bundle(portable_bundle, tmp_path_factory) -> Path:
    return Path(shutil.copytree(portable_bundle("tiny-llava"), tmp_path_factory.mktemp("verified") / "b.vlm"))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("name", ["tokenizer.json", "portable/decoder.onnx", "portable/weights.onnx.data"])
def test_a_changed_file_is_refused_by_load(bundle, name):
    path, before = bundle / name, threads()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(BundleError, match=rf"{path.name} has SHA-256"):
            load(bundle, build="portable")
        path.write_bytes(content[:-1])
        with pytest.raises(BundleError, match=rf"{path.name} is truncated"):
            load(bundle, build="portable", verify=False)
    finally:
        path.write_bytes(content)
    assert threads() <= before


def test_a_loaded_bundle_leaves_no_thread_that_verifies(bundle):
    with load(bundle, build="portable", threads=1) as vlm:
        assert not [name for name in threads() if "verify" in name]
        assert vlm.count_tokens("a") > 0
