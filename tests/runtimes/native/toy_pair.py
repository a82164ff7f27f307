"""A toy's sessions and a plain Python loop over its portable form, for the tests of the C loop."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import reference_sampling as reference
from toy_decoder import Toy

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.engines.ort_library import ensure_runtime

PROMPTS = [[3, 5, 7, 11, 13, 17, 19], [2, 4], list(range(20, 41))]
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.15)


class Pair:
    """Both sessions of a toy, and a plain Python loop over its portable form."""

    def __init__(self, toy: Toy) -> None:
        ensure_runtime()
        self.toy = toy
        self.decoder = _native.Session(toy.lowered_model(), "decoder")
        self.embed_tokens = _native.Session(toy.embed_model(), "embed_tokens")
        # The portable form wants position_ids even where the lowered one counts by itself.
        self.twin = Toy(rotary=toy.rotary, axes=toy.axes or 1)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.portable = ort.InferenceSession(self.twin.portable_model(), options, providers=["CPUExecutionProvider"])

    def state(self, batch: int = 1, capacity: int = 64, chunk: int = 0) -> _native.DecoderState:
        return _native.DecoderState(self.decoder, self.embed_tokens, batch, capacity, chunk)

    def embed(self, tokens: list[int]) -> np.ndarray:
        return np.asarray(self.embed_tokens.run({"input_ids": np.array([tokens], np.int64)})["inputs_embeds"])[0]

    def positions(self, first: int, count: int) -> np.ndarray:
        line = np.arange(first, first + count, dtype=np.int64)
        # The axes of M-RoPE differ inside an image; the largest of them leads.
        return np.stack([line, line // 2, line // 3]) if self.toy.axes == 3 else line

    def fill(self, state: _native.DecoderState, row: int, tokens: list[int]) -> None:
        state.prefill(row, self.embed(tokens), self.positions(state.lengths[row], len(tokens)))

    def start(self, state: _native.DecoderState, row: int, prompt: list[int], params: SamplingParams) -> None:
        state.start(row, params, np.array(prompt, np.int64), len(prompt))

    def expected(self, prompt: list[int], steps: int, params: SamplingParams) -> list[int]:
        """Re-runs the whole sequence for every token, without any cache."""
        tokens, generated = list(prompt), []
        empty = {name: np.zeros((1, self.toy.kv_heads, 0, self.toy.size), np.float32) for name in self.toy.past_names}
        for step in range(steps):
            positions = self.positions(0, len(prompt))
            later = np.arange(len(prompt), len(tokens), dtype=np.int64)
            positions = np.concatenate([positions, np.broadcast_to(later, (*positions.shape[:-1], len(later)))], axis=-1)
            feeds = {"inputs_embeds": self.embed(tokens)[None], "attention_mask": np.ones((1, len(tokens)), np.int64), **empty}
            feeds["position_ids"] = positions[..., None, :]
            logits = self.portable.run(["logits"], feeds)[0][0, -1]
            token = reference.choose(logits, params, prompt + generated, step)
            generated.append(token)
            tokens.append(token)
            if token in params.eos_token_ids:
                break
        return generated


def as_array(logits: bytes) -> np.ndarray:
    """Logits as a vector."""
    return np.frombuffer(logits, np.float32)


def fields_of(params: SamplingParams) -> dict[str, object]:
    """Keyword arguments that make the same parameters."""
    return {name: getattr(params, name) for name in SamplingParams.__slots__}
