"""OpenVINO, int4 or int8 weights (worker: worker.py). Variants: `vlm-…` the whole model, `llm-…` its decoder alone.

OpenVINO GenAI's pipeline refuses SmolVLM ("Unsupported 'idefics3' VLM model type"), so the whole model goes through
optimum-intel's class, and the decoder alone through GenAI's LLMPipeline, which decodes faster. Qwen2-VL goes through GenAI's
VLMPipeline.
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import Clock, Job, arithmetic, clock_of, files_bytes, main, seconds

PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "nncf", "transformers", "torch")
GROUPS = {"int4": ("--sym", "--group-size", "64", "--ratio", "1.0")}
"""128 does not divide SmolLM2's 576."""


def folder_of(job: Job) -> Path:
    """Where the exported model lies."""
    return Path(job["folder"], "openvino_genai", job["variant"])


def settings(job: Job) -> dict[str, Any]:
    """OpenVINO's properties for one prompt at a time."""
    return {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


class Pipeline:
    """openvino_genai's LLMPipeline, or VLMPipeline where it knows the model."""

    def __init__(self, job: Job) -> None:
        self.genai = importlib.import_module("openvino_genai")
        self.ov, self.numpy = importlib.import_module("openvino"), importlib.import_module("numpy")
        self.job, self.folder = job, folder_of(job)
        self.whole, self.asked = job["variant"].startswith("vlm"), -1
        make = self.genai.VLMPipeline if self.whole else self.genai.LLMPipeline
        self.pipeline = make(str(self.folder), "CPU", **settings(job))
        genai = self.genai

        def write(clock: Clock, token: Any) -> Any:
            clock.tick()
            return genai.StreamingStatus.RUNNING

        self.clock = clock_of(genai.StreamerBase, write=write)

    def _generate(self, given: Any, new_tokens: int, **images: Any) -> tuple[list[float], Any]:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        if self.whole:
            config.apply_chat_template = False
        clock = self.clock()
        if self.whole:
            done = self.pipeline.generate(given, generation_config=config, streamer=clock, **images)
        else:
            done = self.pipeline.generate(given, config, clock)
        return clock.calls, done

    def _image(self) -> Any:
        width, height = self.job["image"]["size"]
        pixels = self.numpy.frombuffer(Path(self.job["image"]["raw"]).read_bytes(), self.numpy.uint8)
        return self.ov.Tensor(pixels.reshape(1, height, width, 3).copy())

    def _text(self) -> str:
        self.asked += 1
        return reordered(self.job["image"]["text"], self.asked)

    def picture(self) -> float | None:
        if not self.whole:
            return None
        return self._generate(self._text(), 1, images=[self._image()])[0][0]

    def turn(self) -> float | None:
        if not self.whole:
            return None
        self.pipeline.start_chat()
        self._generate(self.job["image"]["text"], 8, images=[self._image()])
        times, _ = self._generate(self.job["turn"]["text"], 1)
        self.pipeline.finish_chat()
        return times[0]

    def vision(self) -> float | None:
        if not self.whole:
            return None
        _, done = self._generate(self._text(), 1, images=[self._image()])
        return float(done.perf_metrics.get_prepare_embeddings_duration().mean) / 1e3

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        if self.whole:
            return self._generate(prompt["text"], new_tokens)[0]
        ids = self.numpy.array([prompt["ids"]], self.numpy.int64)
        tokens = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(self.numpy.ones_like(ids)))
        return self._generate(tokens, new_tokens)[0]

    def facts(self) -> dict[str, Any]:
        device = self.ov.Core()
        device.set_property("CPU", settings(self.job))
        kind = NAMES.get(device.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name())
        own = arithmetic(kind, kind, kind, kind, "INFERENCE_PRECISION_HINT of the device; the pipeline hides its compiled models")
        return facts(self.folder, self.whole, "GenAI pipeline" if self.whole else "GenAI LLMPipeline: the decoder alone", own)


def reordered(text: str, call: int) -> str:
    """The image prompt with its words in another order in each call, as many in all: the pipeline keeps prefixes.

    From the second call on words stand before the image, so that it is no part of what was kept.
    """
    image, *words = text.split(" ")
    if call == 0 or len(words) < 2:
        return text
    random.Random(call).shuffle(words)
    before = len(words) // 2
    return "".join(f" {word}" for word in words[:before]) + image + "".join(f" {word}" for word in words[before:])


class Optimum:
    """optimum-intel's OVModelForVisualCausalLM: transformers' generate around OpenVINO's graphs."""

    def __init__(self, job: Job) -> None:
        import numpy as np
        import torch

        self.torch, self.job, self.folder = torch, job, folder_of(job)
        torch.set_num_threads(job["threads"])
        kind = importlib.import_module("optimum.intel.openvino").OVModelForVisualCausalLM
        self.model = kind.from_pretrained(str(self.folder), ov_config=settings(job))
        self.model.generation_config.eos_token_id = None
        self.arrays = {name: torch.from_numpy(value) for name, value in np.load(job["image"]["arrays"]).items()}
        self.clock = clock_of(importlib.import_module("transformers.generation.streamers").BaseStreamer)

    def _generate(self, ids: Sequence[int], new_tokens: int, **inputs: Any) -> list[float]:
        tokens = self.torch.tensor([ids])
        inputs |= {"input_ids": tokens, "attention_mask": self.torch.ones_like(tokens)}
        clock = self.clock()
        self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        return list(clock.calls[1:])

    def picture(self) -> float:
        return self._generate(self.job["image"]["ids"], 1, **self.arrays)[0]

    def turn(self) -> None:
        return None

    def vision(self) -> float:
        ids = self.torch.tensor([self.job["image"]["ids"]])
        arrays = dict(self.arrays)
        pixels = arrays.pop("pixel_values")
        return seconds(lambda: self.model.get_vision_embeddings(pixels, ids, **arrays))

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        return self._generate(prompt["ids"], new_tokens)

    def facts(self) -> dict[str, Any]:
        (decoder, attention), (encoder, seeing) = (
            executed(part.request) for part in (self.model.language_model, self.model.vision_embeddings)
        )
        known = "the primitives in the compiled models after running"
        own = arithmetic(decoder, attention, encoder, seeing or encoder, known)
        note = "optimum-intel around OpenVINO (GenAI refuses this model), whose generate keeps no cache for a second turn; "
        note += "preprocessing not counted"
        return facts(self.folder, True, note, own)


NAMES = {"bf16": "bf16", "f32": "fp32", "i8": "int8", "I8": "int8"}
"""OpenVINO's words for numbers."""


def executed(request: Any) -> tuple[str | None, str | None]:
    """In what a compiled model (or a request of it) that has run multiplies: matrices with weights, and attention.

    From the nodes that it says it runs: `brgemm_avx512_bf16` is a product in bfloat16. None where most do not say.
    """
    compiled = request.get_compiled_model() if hasattr(request, "get_compiled_model") else request
    found: dict[str, Counter[str | None]] = {"FullyConnected": Counter(), "ScaledDotProductAttention": Counter()}
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts_of = node.get_rt_info()
        kind = str(facts_of["layerType"].value)
        if kind in found:
            found[kind][NAMES.get(str(facts_of["primitiveType"].value).rsplit("_", 1)[-1])] += 1
    products, attention = ([name for name, _ in count.most_common(1)] or [None] for count in found.values())
    return products[0], attention[0]


def facts(folder: Path, whole: bool, note: str, own: dict[str, str | None]) -> dict[str, Any]:
    """The language model's weights lie in one file: layers and head; a whole model's embedding table is in another."""
    weights = folder / ("openvino_language_model.bin" if whole else "openvino_model.bin")
    return {
        "files": [folder],
        "token_bytes": files_bytes([weights]),
        "kv_bytes": 1,
        "whole": whole,
        "note": note + "; u8 KV cache",
        "arithmetic": own,
    }


def make(job: Job) -> Pipeline | Optimum:
    """GenAI where it can."""
    return Optimum(job) if job["variant"].startswith("vlm") and job["model_type"] == "smolvlm" else Pipeline(job)


def prepare(job: Job) -> None:
    """optimum-cli export openvino, with the weights compressed."""
    out = folder_of(job)
    if (out / "done").is_file():
        return
    kind, weights = job["variant"].split("-")
    what = (
        (job["plain_checkpoint"], "image-text-to-text")
        if kind == "vlm"
        else (job["plain_text_checkpoint"], "text-generation-with-past")
    )
    command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "-m", what[0], "--task", what[1]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*command, "--weight-format", weights, *GROUPS.get(weights, ()), str(out)], check=True, env=environment)
    (out / "done").write_text("")


if __name__ == "__main__":
    main(make, prepare, PACKAGES)
