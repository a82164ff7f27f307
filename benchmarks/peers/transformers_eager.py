"""transformers, eager, in this project's own environment; float32 or bfloat16 (worker: see worker.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.worker import Job, arithmetic, clock_of, cpu_flags, files_bytes, main, seconds

PACKAGES = ("torch", "transformers")
TURN_TOKENS = 8
"""Tokens of the first turn's answer that a second turn follows."""


class Eager:
    """`generate` of the checkpoint's own class; a second turn passes the first one's cache on, as its documentation shows."""

    def __init__(self, job: Job) -> None:
        import numpy as np
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.generation.streamers import BaseStreamer

        torch.set_grad_enabled(False)
        torch.set_num_threads(job["threads"])
        self.torch, self.job = torch, job
        self.dtype = torch.bfloat16 if job["variant"] == "bf16" else torch.float32
        self.model = AutoModelForImageTextToText.from_pretrained(job["checkpoint"], dtype=self.dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.arrays = {name: torch.from_numpy(value) for name, value in np.load(job["image"]["arrays"]).items()}
        self.arrays = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in self.arrays.items()}

        self.clock = clock_of(BaseStreamer)
        self.kept: Any = None

    def _generate(self, ids: Sequence[int], new_tokens: int, **inputs: Any) -> tuple[list[float], Any]:
        tokens = self.torch.tensor([ids])
        clock = self.clock()
        done = self.model.generate(
            input_ids=tokens,
            attention_mask=self.torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            **inputs,
        )
        return clock.calls[1:], done  # the first call shows the prompt

    def picture(self) -> float:
        times, _ = self._generate(self.job["image"]["ids"], 1, **self.arrays)
        return times[0]

    def turn(self) -> float:
        _, first = self._generate(self.job["image"]["ids"], TURN_TOKENS, **self.arrays)
        ids = [*first.sequences[0].tolist(), *self.job["turn"]["ids"]]
        times, _ = self._generate(ids, 1, past_key_values=first.past_key_values)
        return times[0]

    def vision(self) -> float:
        return seconds(lambda: self.model.get_image_features(**self.arrays))

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        return self._generate(prompt["ids"], new_tokens)[0]

    def facts(self) -> dict[str, Any]:
        size = 2 if self.dtype == self.torch.bfloat16 else 4
        decoder = self.model.model.get_decoder() if hasattr(self.model.model, "get_decoder") else self.model.model.text_model
        embedding = self.model.get_input_embeddings().weight
        layers = sum(weight.numel() for weight in decoder.parameters()) - embedding.numel()
        files = [file for file in self.job["checkpoint_files"] if files_bytes([file])]
        numbers = layers + self.model.get_output_embeddings().weight.numel()
        note = "files are the checkpoint as it was written; the second turn passes the first one's cache on"
        known = {"arithmetic": self._arithmetic(), "note": note}
        return {"files": files, "token_bytes": numbers * size, "kv_bytes": size, "whole": True, **known}

    def _arithmetic(self) -> dict[str, str | None]:
        """oneDNN multiplies bfloat16 where the CPU does; elsewhere PyTorch converts, and what bounds that is not known."""
        if self.dtype == self.torch.bfloat16:
            native = "avx512_bf16" in cpu_flags() and bool(self.torch.ops.mkldnn._is_mkldnn_bf16_supported())
            kind, known = ("bf16", "oneDNN multiplies bfloat16 here") if native else (None, "the CPU has no bfloat16")
        else:
            precision = self.torch.get_float32_matmul_precision()
            kind, known = ("fp32" if precision == "highest" else None), f"float32 matmul precision '{precision}'"
        return arithmetic(kind, kind, kind, kind, f"{known} (PyTorch's own word)")


def prepare(job: Job) -> None:
    """Nothing: the checkpoint is the artefact."""


if __name__ == "__main__":
    main(Eager, prepare, PACKAGES)
