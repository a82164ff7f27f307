"""Teacher forcing: the logits along an answer that is already there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.decode.stats import Stats
from vlm_edge_runtime.engines.base import SamplingParams

from .parts import Parts
from .prefill import Prefill
from .prompts import PromptRow


def logits_along(parts: Parts, prompt: PromptRow, answer: Sequence[int]) -> npt.NDArray[np.float32]:
    """float32 `[len(answer), vocab]`: the logits before each token of an answer, fed token by token as in generation.

    In a KV cache of its own; nothing is reused or kept of it. Raises ValueError for no tokens.
    """
    if not len(answer):
        raise ValueError("logits_along needs at least one token of an answer.")
    prefill = Prefill(parts, [prompt], Stats(), lambda: None)
    inputs, features = prefill.inputs(prompt)
    state = parts.decoder.allocate(1, len(prompt) + len(answer))
    try:
        if inputs is not None:
            state.bind(0, inputs)
        for _ in prefill.run_row(state, 0, prompt, 0, features):
            pass
        logits = [state.logits(0)]
        if len(answer) > 1:
            prefill.start_row(state, 0, prompt, SamplingParams(), features)
        for token in answer[:-1]:
            state.push(0, int(token))
            logits.append(state.logits(0))
    finally:
        state.close()
    return np.stack(logits)
