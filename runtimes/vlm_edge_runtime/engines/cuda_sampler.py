"""A row's sampler on the device: its parameters, the tokens so far, and the rules on what may come next, for the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .base import SamplingParams
from .cuda_device import Device
from .cuda_layout import lists
from .cuda_memory import Buffers


def on_device(params: SamplingParams) -> bool:
    """Whether the kernels know all that is asked for. They do not rank tokens for `logprobs` above 0; that is the C sampler's."""
    return params.logprobs <= 0


def is_constrained(params: SamplingParams) -> bool:
    """Whether there is a rule on what may come next."""
    return bool(
        params.min_length > 0
        or params.no_repeat_ngram_size > 0
        or params.suppress_tokens
        or params.begin_suppress_tokens
        or params.forced_tokens
        or params.sequence_bias
    )


def rule_table(params: SamplingParams) -> npt.NDArray[np.int32]:
    """The rules in the order that decode_layout.h gives (Row.rules)."""
    table = lists(params.eos_token_ids, params.suppress_tokens)
    for length, tokens in (*params.begin_suppress_tokens, *params.forced_tokens):
        table += [min(length, np.iinfo(np.int32).max), *lists(tokens)]
    for sequence, bias in params.sequence_bias:
        table += [int(np.float32(bias).view(np.int32)), *lists(sequence)]
    return np.array(table, dtype=np.int32)


class RowSampler:
    """Device memory of one row's sampler, used again by the next `start` of the row."""

    def __init__(self, device: Device, vocab: int) -> None:
        self._device = device
        self._vocab = vocab
        self._memory = Buffers(device)

    def arm(self, row: Any, params: SamplingParams, history: npt.NDArray[np.int64], room: int) -> None:
        """Fills a Row's sampler fields. `room`: how many tokens may still be added to the history."""
        constrained = is_constrained(params)
        row["temperature"], row["top_p"], row["min_p"] = params.temperature, params.top_p, params.min_p
        row["seed"], row["draws"] = params.seed & (2**64 - 1), 0
        row["top_k"], row["penalty"], row["logprobs"] = params.top_k, params.repetition_penalty, params.logprobs
        row["rules"] = self._memory.put("rules", rule_table(params))
        row["min_length"], row["ngram"] = params.min_length, params.no_repeat_ngram_size
        row["constrained"] = constrained
        row["begin_count"], row["forced_count"] = len(params.begin_suppress_tokens), len(params.forced_tokens)
        row["bias_count"] = len(params.sequence_bias)
        row["tokens"] = len(history)
        row["history"] = row["seen"] = row["seen_list"] = row["seen_count"] = 0
        if constrained and (params.no_repeat_ngram_size > 0 or params.sequence_bias):
            row["history"] = self._memory.reserve("history", 4 * (len(history) + room))
            self._device.upload(int(row["history"]), history.astype(np.int32))
        if params.repetition_penalty != 1:
            known = history[(history >= 0) & (history < self._vocab)]
            distinct, first = np.unique(known, return_index=True)
            seen = np.zeros(self._vocab, dtype=np.uint8)
            seen[distinct] = 1
            row["seen"] = self._memory.put("seen", seen)
            row["seen_list"] = self._memory.reserve("seen_list", 4 * self._vocab)
            self._device.upload(int(row["seen_list"]), known[np.sort(first)].astype(np.int32))
            row["seen_count"] = len(distinct)

    def close(self) -> None:
        """Frees the memory."""
        self._memory.close()
