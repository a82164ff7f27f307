"""A token loop in Python, for what the native sampler does not know: rarer processors, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import DecoderState, RowTokens, SamplingParams

from .beam import largest
from .processors import Ids, Processor, Scores, apply, log_softmax


@dataclass(slots=True)
class StepRow:
    """One answer. `ids`: the tokens before it, int64 [n], as processors see them. `processors`: all, in order.

    `guide`: the row of the state that runs the same new tokens after the unconditional prompt; `scale`: how far the answer is
    led away from it.
    """

    ids: Ids
    params: SamplingParams
    processors: Sequence[Processor] = field(default_factory=tuple)
    guide: int | None = None
    scale: float = 1.0


def guided(conditional: Scores, unconditional: Scores, scale: float) -> Scores:
    """Classifier-free guidance of next-token scores (Sanchez et al., arXiv 2306.17806, equation 7), float32 [vocab].

    `scale` 1 gives the conditional log probabilities, above 1 leads away from the unconditional ones.
    """
    given, free = log_softmax(conditional), log_softmax(unconditional)
    return np.asarray(np.float32(scale) * (given - free) + free, dtype=np.float32)


class StepwiseLoop:
    """A token loop (`decode` as the engine's) over the first `len(rows)` rows of a state; guides follow behind them.

    Every row of the state is prefilled. Draws come from the row's own stream, as in the native sampler.
    """

    def __init__(self, state: DecoderState, rows: Sequence[StepRow], cancelled: Callable[[], bool]) -> None:
        self._state = state
        self._rows = list(rows)
        self._cancelled = cancelled
        self._open = [True] * len(rows)
        self._samplers: list[_native.Sampler] | None = None
        self.steps = 0

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` tokens for every open row. Raises DeviceError for NaN or infinite logits."""
        produced = [RowTokens(finished=not is_open) for is_open in self._open]
        for _ in range(max_steps):
            if not any(self._open) or self._cancelled():
                break
            if self.steps:
                self._state.decode(1)  # runs what was pushed; the engine's own choices are replaced
                if self._cancelled():
                    break
            for number in [number for number, is_open in enumerate(self._open) if is_open]:
                self._choose(number, produced[number])
            self.steps += 1
        return produced

    def drop(self, row: int) -> None:
        """The row takes no further part."""
        self._open[row] = False
        guide = self._rows[row].guide
        if guide is not None:
            self._state.truncate(guide, self._state.lengths[guide])

    def _choose(self, number: int, produced: RowTokens) -> None:
        row = self._rows[number]
        logits = self._state.logits(number)
        scores = logits if row.guide is None else guided(logits, self._state.logits(row.guide), row.scale)
        token, _, _ = self._sampler(number, len(logits)).choose(apply(row.processors, row.ids, scores))
        row.ids = np.append(row.ids, token)
        produced.tokens.append(token)
        if row.params.logprobs >= 0:
            logprobs = log_softmax(logits)
            produced.logprobs.append(float(logprobs[token]))
            if row.params.logprobs > 0:
                best = largest(logits, row.params.logprobs)
                produced.top_logprobs.append([(int(one), float(logprobs[one])) for one in best])
        if token in row.params.eos_token_ids:
            produced.finished, self._open[number] = True, False
        for one in (number,) if row.guide is None else (number, row.guide):
            if produced.finished:
                self._state.truncate(one, self._state.lengths[one])  # takes it out of `decode`
            else:
                self._state.push(one, token)

    def _sampler(self, number: int, vocab: int) -> _native.Sampler:
        if self._samplers is None:
            # Processors have done the rest: these only pick, or draw.
            plain = [SamplingParams(temperature=float(row.params.temperature > 0)) for row in self._rows]
            seeded = [replace(one, seed=row.params.seed) for one, row in zip(plain, self._rows, strict=True)]
            self._samplers = [_native.Sampler(vocab, one) for one in seeded]
        return self._samplers[number]
