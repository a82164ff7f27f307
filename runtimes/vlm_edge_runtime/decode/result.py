"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "stop_string", "cancelled"]
"""`stop`: an end-of-sequence token; `length`: `max_new_tokens` or the context; `stop_string`: one of `stop`; `cancelled`."""


@dataclass(slots=True, frozen=True)
class Generation:
    """One row's answer.

    `text`: without special tokens, and without the stop string. `tokens`: every token that was generated, the end of sequence
    and the tokens of a stop string included. `logprobs`: natural-log probability of each token before any filter, where
    asked for; `top_logprobs`: for each token, the most likely (token, log probability) pairs.
    `attention`, where asked for: float32 [new tokens, …], what the decoder looked at to choose each token.
    `prompt_tokens` counts image tokens too. `seed`: what reproduces a sampled answer.

    Of a beam search: `score`, the sum of the tokens' log probabilities over length ** length_penalty; `alternatives`, the
    further sequences that `num_return_sequences` asked for, best first.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    attention: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    score: float | None = None
    alternatives: list[Generation] = field(default_factory=list)
