"""A tiny random GPT-2 in PyTorch and a decoder state over it: both sides of a comparison get the same logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from vlm_edge_runtime.engines.base import RowTokens

VOCAB = 48
EOS = 5


@functools.cache
def toy_model(seed: int = 0, vocab: int = VOCAB) -> GPT2LMHeadModel:
    """Weights so large that what follows depends on everything before, and every token gets its turn."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_positions=128, n_embd=32, n_layer=2, n_head=2, eos_token_id=EOS, bos_token_id=1, pad_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
        model.transformer.wte.weight[EOS] *= 2  # an end comes now and then
    model.generation_config.eos_token_id = EOS
    return model


class ToyState:
    """`DecoderState` whose cache is the text itself: every step runs the whole model again."""

    def __init__(self, model: GPT2LMHeadModel, batch: int, capacity: int = 128) -> None:
        self.batch, self.capacity = batch, capacity
        self._model = model
        self._texts: list[list[int]] = [[] for _ in range(batch)]
        self._pending: list[int | None] = [None] * batch
        self._armed = [False] * batch
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self.runs = 0

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self._texts]

    def fill(self, row: int, tokens: Sequence[int]) -> None:
        self._texts[row] = list(tokens)

    def start(self, row: int, params=None, history=None, next_position: int = 0, token_inputs=None) -> None:
        assert self._texts[row]
        self._armed[row] = True

    def logits(self, row: int) -> np.ndarray:
        return self._read([row])[0]

    @torch.inference_mode()
    def _read(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Logits that follow these rows; what was read once is remembered."""
        missing: dict[int, set[tuple[int, ...]]] = {}
        for row in rows:
            if tuple(self._texts[row]) not in self._known:
                missing.setdefault(len(self._texts[row]), set()).add(tuple(self._texts[row]))
        for texts in missing.values():
            ordered = sorted(texts)
            logits = self._model(torch.tensor(ordered), logits_to_keep=1).logits[:, -1].float().numpy()
            self._known |= dict(zip(ordered, logits, strict=True))
        return [self._known[tuple(self._texts[row])].copy() for row in rows]

    def push(self, row: int, token: int) -> None:
        assert self._armed[row]
        self._pending[row] = token

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Runs what was pushed; a token that nobody wants is chosen, as an engine does."""
        assert max_steps == 1
        self.runs += 1
        for row, token in enumerate(self._pending):
            if self._armed[row]:
                assert token is not None, "an armed row would run the engine's own token"
                self._texts[row].append(token)
                self._pending[row] = None
        self._read([row for row, armed in enumerate(self._armed) if armed])
        return [RowTokens(tokens=[0] if armed else []) for armed in self._armed]

    def truncate(self, row: int, length: int) -> None:
        self._texts[row] = self._texts[row][:length]
        self._armed[row], self._pending[row] = False, None

    def reorder(self, sources: Sequence[int]) -> None:
        self._texts = [list(self._texts[source]) for source in sources]
