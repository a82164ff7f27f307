"""OpenVINO, int4 or int8 weights (worker: worker.py). Variants: `vlm-…` the whole model, `llm-…` its decoder alone.

OpenVINO GenAI's pipeline refuses SmolVLM ("Unsupported 'idefics3' VLM model type"), so the whole model goes through
optimum-intel's class, and the decoder alone through GenAI's LLMPipeline, which decodes faster. Qwen2-VL goes through GenAI's
VLMPipeline.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import Job, files_bytes, main, seconds

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
        self.whole = job["variant"].startswith("vlm")
        make = self.genai.VLMPipeline if self.whole else self.genai.LLMPipeline
        self.pipeline = make(str(self.folder), "CPU", **settings(job))
        genai = self.genai

        base: Any = genai.StreamerBase

        class Clock(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.began = time.perf_counter()
                self.calls: list[float] = []

            def write(self, token: Any) -> Any:
                self.calls.append(time.perf_counter() - self.began)
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        self.clock = Clock

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

    def picture(self) -> float | None:
        if not self.whole:
            return None
        return self._generate(self.job["image"]["text"], 1, images=[self._image()])[0][0]

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
        _, done = self._generate(self.job["image"]["text"], 1, images=[self._image()])
        return float(done.perf_metrics.get_prepare_embeddings_duration().mean) / 1e3

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        if self.whole:
            return self._generate(prompt["text"], new_tokens)[0]
        ids = self.numpy.array([prompt["ids"]], self.numpy.int64)
        tokens = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(self.numpy.ones_like(ids)))
        return self._generate(tokens, new_tokens)[0]

    def facts(self) -> dict[str, Any]:
        return facts(self.folder, self.whole, "GenAI pipeline" if self.whole else "GenAI LLMPipeline: the decoder alone")


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
        base: Any = importlib.import_module("transformers.generation.streamers").BaseStreamer

        class Clock(base):  # type: ignore[misc]
            def __init__(self) -> None:
                self.began = time.perf_counter()
                self.calls: list[float] = []

            def put(self, value: Any) -> None:
                self.calls.append(time.perf_counter() - self.began)

            def end(self) -> None:
                pass

        self.clock = Clock

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
        return facts(self.folder, True, "optimum-intel around OpenVINO (GenAI refuses this model); preprocessing not counted")


def facts(folder: Path, whole: bool, note: str) -> dict[str, Any]:
    """The language model's weights lie in one file: layers and head; a whole model's embedding table is in another."""
    weights = folder / ("openvino_language_model.bin" if whole else "openvino_model.bin")
    return {
        "files": [folder],
        "token_bytes": files_bytes([weights]),
        "kv_bytes": 1,
        "whole": whole,
        "note": note + "; u8 KV cache",
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
