"""llama.cpp through llama-cpp-python's ctypes layer: Q4_0 with a Q8_0 projector file, Q8_0 with an f16 one (worker: worker.py).

Only the generated bindings are imported, not the package's Python classes, so that no more than the library itself is counted.
The prompt's tokens, the batches and the greedy choice follow llama.cpp's own mtmd example (tools/mtmd/mtmd-cli.cpp).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import Job, arithmetic, files_bytes, main, seconds

PACKAGES = ("llama-cpp-python",)
TYPES = {"q4_0": 2, "q8_0": 7}
"""llama_ftype of the text model's files."""
PROJECTOR = {"q4_0": "q8_0", "q8_0": "f16"}
"""The type of the vision encoder's file beside it: the smallest, and the one that was the fastest on AVX2."""
TURN_TOKENS = 8
CONTEXT = 2048


def bindings() -> tuple[Any, Any]:
    """llama_cpp.llama_cpp and llama_cpp.mtmd_cpp, without what the package imports around them."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("llama-cpp-python is not installed in this environment")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp"), importlib.import_module("llama_cpp.mtmd_cpp")


def files_of(job: Job) -> tuple[Path, Path]:
    """The text model's and the vision encoder's file."""
    folder = Path(job["folder"]) / "llama_cpp"
    tiles = "" if job["tiles"] > 1 or not job["splits"] else "-1-tile"
    return folder / f"text-{job['variant']}.gguf", folder / f"mmproj-{PROJECTOR[job['variant']]}{tiles}.gguf"


class LlamaCpp:
    """One context; the KV cache (f16) is emptied before each prompt."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.l, self.m = bindings()
        self.log = self.l.llama_log_callback(lambda level, text, data: None)
        for module, name in ((self.l, "llama_log_set"), (self.m, "mtmd_log_set"), (self.m, "mtmd_helper_log_set")):
            getattr(module, name)(self.log, None)
        self.l.llama_backend_init()
        text, projector = files_of(job)
        self.files = [text, projector]
        self.model = self.l.llama_model_load_from_file(str(text).encode(), self.l.llama_model_default_params())
        params = self.l.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = job["threads"]
        self.context = self.l.llama_init_from_model(self.model, params)
        vision = self.m.mtmd_context_params_default()
        vision.use_gpu, vision.print_timings, vision.warmup, vision.n_threads = False, False, False, job["threads"]
        self.mtmd = self.m.mtmd_init_from_file(str(projector).encode(), self.model, vision)
        if not (self.model and self.context and self.mtmd):
            raise SystemExit(f"llama.cpp does not load {text.name} with {projector.name}")
        self.vocabulary = self.l.llama_vocab_n_tokens(self.l.llama_model_get_vocab(self.model))
        self.numpy = importlib.import_module("numpy")
        self.past = 0

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if self.l.llama_decode(self.context, self.l.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        self.past += len(ids)

    def _greedy(self) -> int:
        logits = self.l.llama_get_logits_ith(self.context, -1)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def _empty(self) -> None:
        self.l.llama_memory_clear(self.l.llama_get_memory(self.context), True)
        self.past = 0

    def _chunks(self) -> Any:
        """mtmd's chunks of the picture, preprocessed: text around tiles, and tiles."""
        width, height = self.job["image"]["size"]
        pixels = Path(self.job["image"]["raw"]).read_bytes()
        bitmap = self.m.mtmd_bitmap_init(width, height, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels))
        chunks = self.m.mtmd_input_chunks_init()
        marker = self.m.mtmd_default_marker()
        text = self.m.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        if self.m.mtmd_tokenize(self.mtmd, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1):
            raise SystemExit("mtmd_tokenize failed")
        self.m.mtmd_bitmap_free(bitmap)
        return chunks

    def _each(self, chunks: Any) -> list[tuple[bool, Any]]:
        """The chunks that are used: all of a split picture, of one tile the last (the whole picture) alone."""
        count = self.m.mtmd_input_chunks_size(chunks)
        found = [self.m.mtmd_input_chunks_get(chunks, index) for index in range(count)]
        kinds = [(self.m.mtmd_input_chunk_get_type(one) == self.m.MTMD_INPUT_CHUNK_TYPE_IMAGE, one) for one in found]
        return kinds if self.job["tiles"] > 1 else [next(one for one in kinds if one[0])]

    def _image_chunk(self, chunk: Any) -> None:
        if self.m.mtmd_encode_chunk(self.mtmd, chunk):
            raise SystemExit("mtmd_encode_chunk failed")
        past = ctypes.c_int32(self.past)
        embedded = self.m.mtmd_get_output_embd(self.mtmd)
        none = self.m.mtmd_helper_post_decode_callback(0)  # a null function pointer
        failed = self.m.mtmd_helper_decode_image_chunk(
            self.mtmd, self.context, chunk, embedded, self.past, 0, CONTEXT, ctypes.byref(past), none, None
        )
        if failed:
            raise SystemExit("mtmd_helper_decode_image_chunk failed")
        self.past = past.value

    def _image_prompt(self) -> float:
        self._empty()
        chunks = self._chunks()
        ids, token = self.job["image"]["ids"], self.job["image"]["token_id"]
        before = ids[: ids.index(token)]
        after = ids[len(ids) - ids[::-1].index(token) :]
        began = time.perf_counter()  # preprocessing is not counted, as for the other peers
        if self.job["tiles"] == 1:
            self._decode(before)
        for image, chunk in self._each(chunks):
            if image:
                self._image_chunk(chunk)
            else:
                count = ctypes.c_size_t()
                tokens = self.m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                self._decode([tokens[index] for index in range(count.value)])
        self._decode(after)
        self._greedy()
        taken = time.perf_counter() - began
        self.m.mtmd_input_chunks_free(chunks)
        return taken

    def picture(self) -> float:
        return self._image_prompt()

    def turn(self) -> float:
        if self.past == 0:
            self._image_prompt()
        for _ in range(TURN_TOKENS):
            self._decode([self._greedy()])

        def follow() -> None:
            self._decode(self.job["turn"]["ids"])
            self._greedy()

        return seconds(follow)

    def vision(self) -> float:
        chunks = self._chunks()
        images = [chunk for image, chunk in self._each(chunks) if image]
        taken = seconds(lambda: [self.m.mtmd_encode_chunk(self.mtmd, chunk) for chunk in images])
        self.m.mtmd_input_chunks_free(chunks)
        return taken

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        self._empty()
        times: list[float] = []
        began = time.perf_counter()
        ids = prompt["ids"]
        for _ in range(new_tokens):
            self._decode(ids)
            ids = [self._greedy()]
            times.append(time.perf_counter() - began)
        return times

    def facts(self) -> dict[str, Any]:
        # The embedding table is the head as well (tied), so the whole text file is read for each token.
        kind = PROJECTOR[self.job["variant"]]
        note = f"vision encoder {kind}; preprocessing not counted; RSS with Python and NumPy; second turn in the same context"
        known = "ggml-cpu's sources: rows of Q8_0 against Q4_0 and Q8_0, floats against f16"
        own = arithmetic("int8", "fp32", "int8" if kind == "q8_0" else "fp32", "fp32", known)
        kept = {"token_bytes": files_bytes(self.files[:1]), "kv_bytes": 2, "whole": True}
        return {"files": self.files, **kept, "note": note, "arithmetic": own}


_CONVERT = """
import runpy, sys
root = sys.argv.pop(1)
sys.path[:0] = [root + "/gguf-py", root]
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}  # the tokenizer's hash is in no list
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def prepare(job: Job) -> None:
    """Converts to GGUF with llama.cpp's converter, quantises with the library."""
    text, projector = files_of(job)
    folder = text.parent
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(job["environment"], "source", "vendor", "llama.cpp")
    if not root.is_dir():
        raise SystemExit(f"{root} is missing: remove {job['environment']}/env/installed.txt, and it is unpacked again")
    convert = [sys.executable, "-c", _CONVERT.format(pre=job["pre_tokenizer"]), str(root)]

    def make(out: Path, *arguments: str) -> None:
        if not out.is_file():
            part = out.with_suffix(".part")
            subprocess.run([*convert, *arguments, "--outfile", str(part)], check=True)
            part.rename(out)

    half = folder / "text-f16.gguf"
    if not text.is_file():
        make(half, job["text_checkpoint"], "--outtype", "f16")
        library, _ = bindings()
        params = library.llama_model_quantize_default_params()
        params.ftype, params.nthread = TYPES[job["variant"]], job["threads"]
        part = text.with_suffix(".part")
        if library.llama_model_quantize(str(half).encode(), str(part).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama_model_quantize to {job['variant']} failed")
        part.rename(text)
    kind = PROJECTOR[job["variant"]]
    whole = folder / f"mmproj-{kind}.gguf"
    make(whole, job["checkpoint"], "--mmproj", "--outtype", kind)
    if job["splits"] and not projector.is_file():  # a largest edge of one tile, so that preprocessing does not enlarge to 2048
        shutil.copy(whole, projector)
        side = json.loads(Path(job["checkpoint"], "config.json").read_text())["vision_config"]["image_size"]
        edge = ["clip.vision.preproc_image_size", str(side)]
        tool = [sys.executable, "-m", "gguf.scripts.gguf_set_metadata", "--force", str(projector), *edge]
        subprocess.run(tool, check=True, env=os.environ | {"PYTHONPATH": f"{root}/gguf-py"})


if __name__ == "__main__":
    main(LlamaCpp, prepare, PACKAGES)
