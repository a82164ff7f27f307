"""The native sampler's mathematics again, in numpy: same filters, same order, same random stream."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.engines.base import SamplingParams

Logits = npt.NDArray[np.float32]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, from the paper's pseudocode."""
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & low, (left >> 32) ^ c[3] ^ k[1], left & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[0], c[1], c[2], c[3]


def uniform(seed: int, step: int) -> float:
    """Draw `step` of stream `seed`: 53 bits."""
    low = 0xFFFFFFFF
    words = philox((step & low, step >> 32 & low, 0, 0), (seed & low, seed >> 32 & low))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def penalised(logits: Logits, history: list[int], penalty: float) -> Logits:
    """transformers' RepetitionPenaltyLogitsProcessor."""
    scores = logits.copy()
    for token in set(history):
        scores[token] = scores[token] * np.float32(penalty) if scores[token] < 0 else scores[token] / np.float32(penalty)
    return scores


def controlled(logits: Logits, params: SamplingParams, history: list[int]) -> Logits:
    """Biases, penalty and masks, in transformers' order."""
    scores, length = logits.copy(), len(history)
    for sequence, bias in params.sequence_bias:
        before = list(sequence[:-1])
        if history[length - len(before) :] == before:
            scores[sequence[-1]] += np.float32(bias)
    scores = penalised(scores, history, params.repetition_penalty)
    size = params.no_repeat_ngram_size
    if size:
        last = history[length - size + 1 :]
        for start in range(length - size + 1):
            if history[start : start + size - 1] == last and history[start + size - 1] < len(scores):
                scores[history[start + size - 1]] = -np.inf
    if length < params.min_length:
        scores[list(params.eos_token_ids)] = -np.inf
    for at, tokens in params.forced_tokens:
        if at == length:
            scores[:] = -np.inf
            scores[list(tokens)] = 0
    scores[list(params.suppress_tokens)] = -np.inf
    for at, tokens in params.begin_suppress_tokens:
        if at == length:
            scores[list(tokens)] = -np.inf
    return scores


def distribution(logits: Logits, params: SamplingParams, history: list[int]) -> npt.NDArray[np.float64]:
    """What the token is drawn from, float64 [vocab]."""
    scores = controlled(logits, params, history)
    if params.temperature == 0:
        return np.eye(len(scores))[int(np.argmax(scores))]
    scores = scores / np.float32(params.temperature)
    keep = np.isfinite(scores)
    if 0 < params.top_k < len(scores):
        keep &= scores >= np.sort(scores)[-params.top_k]
    weights = np.where(keep, np.exp(scores.astype(np.float64) - float(scores.max())), 0.0)
    if params.top_p < 1:
        order = np.argsort(-scores.astype(np.float64), kind="stable")
        ranked = weights[order]
        above = np.concatenate([[0.0], np.cumsum(ranked)[:-1]])
        dropped = order[above >= params.top_p * ranked.sum()]
        weights[dropped] = 0.0
    weights[weights < params.min_p] = 0.0
    return weights / weights.sum()


def choose(logits: Logits, params: SamplingParams, history: list[int], step: int) -> int:
    """The token that the native sampler chooses at draw `step`."""
    probabilities = distribution(logits, params, history)
    if params.temperature == 0:
        return int(np.argmax(probabilities))
    kept = np.flatnonzero(probabilities)
    place = int(np.searchsorted(np.cumsum(probabilities[kept]), uniform(params.seed, step), side="right"))
    return int(kept[min(place, len(kept) - 1)])


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Log probabilities of raw logits."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())
