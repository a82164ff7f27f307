"""onnxruntime-genai, int4 (worker: worker.py), and the vision encoder in plain ONNX Runtime.

Its builder makes the text graph alone; the encoder is exported by PyTorch and quantised by ONNX Runtime (int8, dynamic
activations). A time to the first token is the sum of the two, not a pipeline's.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import Job, arithmetic, files_bytes, main, seconds

PACKAGES = ("onnxruntime-genai", "onnxruntime", "transformers", "torch")
TURN_TOKENS = 8


def paths(job: Job) -> tuple[Path, Path]:
    """The text model's folder, the vision encoder's file."""
    folder = Path(job["folder"]) / "ort_genai"
    return folder / f"text-{job['variant']}", folder / "vision-int8.onnx"


class OrtGenai:
    """`Generator` over the text graph; the image prompt's tokens are as many text tokens, and the encoder's time is added."""

    def __init__(self, job: Job) -> None:
        self.np, self.og = importlib.import_module("numpy"), importlib.import_module("onnxruntime_genai")
        ort = importlib.import_module("onnxruntime")
        self.job, (self.folder, self.encoder) = job, paths(job)
        config = self.og.Config(str(self.folder))
        threads = {"decoder": {"session_options": {"intra_op_num_threads": job["threads"]}}}
        config.overlay(json.dumps({"model": threads}))
        self.model = self.og.Model(config)
        options = ort.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        self.session: Any = None
        if self.encoder.is_file():
            self.session = ort.InferenceSession(str(self.encoder), options, providers=["CPUExecutionProvider"])
        # One tile is run as often as the picture has tiles: a batch of all of them would only hold more in memory.
        self.pixels = (
            self.np.load(job["image"]["arrays"])["pixel_values"].reshape(-1, *job["tile_shape"])[:1] if self.session else None
        )
        self.generator: Any = None

    def _begin(self, ids: Sequence[int], new_tokens: int) -> tuple[Any, float]:
        self.generator = None
        params = self.og.GeneratorParams(self.model)
        most = len(ids) + new_tokens + len(self.job["turn"]["ids"]) + TURN_TOKENS + 2
        params.set_search_options(do_sample=False, max_length=most, min_length=most, batch_size=1)
        self.generator = self.og.Generator(self.model, params)
        began = time.perf_counter()
        self.generator.append_tokens(self.np.array(ids, self.np.int32))
        return self.generator, began

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        generator, began = self._begin(prompt["ids"], new_tokens)
        times = []
        for _ in range(new_tokens):
            generator.generate_next_token()
            times.append(time.perf_counter() - began)
        return times

    def vision(self) -> float | None:
        if self.session is None:
            return None
        return seconds(lambda: [self.session.run(None, {"pixel_values": self.pixels}) for _ in range(self.job["tiles"])])

    def picture(self) -> float | None:
        vision = self.vision()
        if vision is None:
            return None
        return vision + self.text(self.job["image"], 1)[0]

    def turn(self) -> float:
        """Goes on in the same generator, after the tokens of the picture's prompt."""
        generator, _ = self._begin(self.job["image"]["ids"], TURN_TOKENS)
        for _ in range(TURN_TOKENS):
            generator.generate_next_token()

        def follow() -> None:
            generator.append_tokens(self.np.array(self.job["turn"]["ids"], self.np.int32))
            generator.generate_next_token()

        return seconds(follow)

    def facts(self) -> dict[str, Any]:
        onnx = importlib.import_module("onnx")
        graph = onnx.load(str(self.folder / "model.onnx"), load_external_data=False).graph
        gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
        others = {name for node in graph.node if node.op_type != "Gather" for name in node.input}

        def size(tensor: Any) -> int:
            stored = {entry.key: entry.value for entry in tensor.external_data}
            return int(stored["length"]) if "length" in stored else len(tensor.raw_data)

        read = sum(size(tensor) for tensor in graph.initializer if tensor.name in others or tensor.name not in gathered)
        note = "text graph and, by plain ONNX Runtime, vision encoder (int8): their times are added up, no pipeline joins them"
        files = [self.folder, *([self.encoder] if self.session else [])]
        known = {"note": note, "arithmetic": self._arithmetic(onnx, graph)}
        return {"files": files, "token_bytes": read, "kv_bytes": 4, "whole": self.session is not None, **known}

    def _arithmetic(self, onnx: Any, graph: Any) -> dict[str, str | None]:
        """MatMulNBits multiplies in 8 bits at accuracy level 4, in floats at the others below; attention is in floats."""
        levels = {
            next((each.i for each in node.attribute if each.name == "accuracy_level"), 0)
            for node in graph.node
            if node.op_type == "MatMulNBits"
        }
        products = "int8" if levels == {4} else "fp32" if levels and levels <= {0, 1} else None
        vision, known = None, f"MatMulNBits at accuracy level {', '.join(map(str, sorted(levels))) or '–'}"
        if self.session:
            kinds = Counter(node.op_type for node in onnx.load(str(self.encoder), load_external_data=False).graph.node)
            vision = "int8" if kinds["MatMulInteger"] or kinds["DynamicQuantizeMatMul"] else "fp32"
            known += f", {kinds['MatMulInteger']} MatMulInteger in the encoder"
        return arithmetic(products, "fp32", vision, "fp32" if vision else None, f"{known} (the graphs)")


def prepare(job: Job) -> None:
    """The model builder for the text, torch.onnx and ONNX Runtime's quantiser for the vision encoder."""
    folder, encoder = paths(job)
    if not (folder / "done").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "text", "-i", job["text_checkpoint"]]
        cache = folder.parent / "cache"
        subprocess.run([*command, "-o", str(folder), "-p", job["variant"], "-e", "cpu", "-c", str(cache)], check=True)
        (folder / "done").write_text("")
    if not encoder.is_file() and job["model_type"] == "smolvlm":
        _vision(job, encoder)


def _vision(job: Job, encoder: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    quantization = importlib.import_module("onnxruntime.quantization")
    model: Any = AutoModelForImageTextToText.from_pretrained(
        job["checkpoint"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    class Encoder(torch.nn.Module):
        """The vision encoder and the connector, all patches valid, positions in order."""

        def __init__(self) -> None:
            super().__init__()
            self.vision, self.connector = model.model.vision_model, model.model.connector
            self.positions = torch.nn.Parameter(self.vision.embeddings.position_embedding.weight.detach().clone()[None])

        def forward(self, pixels: Any) -> Any:
            hidden = self.vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.positions
            hidden = self.vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
            return self.connector(self.vision.post_layernorm(hidden))

    exact = encoder.with_name("vision-fp32.onnx")
    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["image_features"]}
    axes = {"pixel_values": {0: "tiles"}, "image_features": {0: "tiles"}}
    sample = torch.randn(1, *job["tile_shape"])
    with torch.no_grad():
        torch.onnx.export(Encoder().eval(), (sample,), str(exact), opset_version=17, dynamic_axes=axes, dynamo=False, **names)
    part = encoder.with_name("vision-int8.part.onnx")
    kinds = {"weight_type": quantization.QuantType.QInt8, "per_channel": True, "op_types_to_quantize": ["MatMul", "Gemm"]}
    quantization.quantize_dynamic(str(exact), str(part), **kinds)
    part.rename(encoder)
    print(f"vision encoder {files_bytes([encoder]) / 1e6:.0f} MB")


if __name__ == "__main__":
    main(OrtGenai, prepare, PACKAGES)
