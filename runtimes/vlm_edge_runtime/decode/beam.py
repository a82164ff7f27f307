"""Beam search over one prompt: the most likely sequences, not the sequence of most likely tokens.

Scores, length penalty, early stopping and the keeping of finished beams are those of transformers' `_beam_search` (5.23), in
float32 as there, so that the same logits give the same sequences and scores. Among equal scores the lower beam, then the lower
token comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import DecoderState, RowTokens
from vlm_edge_runtime.errors import DeviceError

from .processors import Ids, Processor, Scores, apply, log_softmax, softmax

EarlyStopping = bool | Literal["never"]
StopCheck = Callable[[Ids], bool]
"""Whether new tokens, int64 [n], end the text (stop strings)."""

# Added to the score of what must not be chosen any more; transformers' number, which also orders such candidates.
_OUT = np.float32(-1e9)


@dataclass(slots=True, frozen=True)
class BeamOptions:
    """What is asked of the search.

    `num_beams` ≥ 2 sequences are followed. The score of a finished one is the sum of its log probabilities over its length to
    the power of `length_penalty` (above 0: longer ones gain). `early_stopping`: True ends when `num_beams` have finished; False
    when the best open one could not beat the worst of those at its present length; "never" when it could at no length.
    `num_return_sequences` ≤ `num_beams`. `sampled`: continuations are drawn without replacement instead of ranked.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int = 1
    sampled: bool = False


@dataclass(slots=True, frozen=True)
class Hypothesis:
    """A sequence of new tokens (the end of sequence included) with its length-penalised score."""

    tokens: list[int]
    score: float


class BeamSearch:
    """The bookkeeping: takes logits, says which beams go on with which tokens. Knows nothing of engines.

    `prompt`: int64 [n], what processors see before the new tokens. `limit`: most new tokens. `seed`: of the draws.
    """

    def __init__(
        self,
        options: BeamOptions,
        prompt: Ids,
        limit: int,
        eos: Sequence[int],
        processors: Sequence[Processor] = (),
        *,
        stops: StopCheck | None = None,
        seed: int = 0,
    ) -> None:
        beams = options.num_beams
        self._options = options
        self._limit = limit
        self._eos = np.asarray(eos, dtype=np.int64)
        self._processors = processors
        self._stops = stops
        self._seed, self._draws = seed, 0
        self._prompt = len(prompt)
        self._open = np.zeros((beams, len(prompt) + limit), dtype=np.int64)  # the sequences that go on
        self._open[:, : len(prompt)] = prompt
        self._open_scores = np.full(beams, _OUT, dtype=np.float32)
        self._open_scores[0] = 0  # all beams begin alike: only the first one's continuations count
        self._kept = np.zeros((beams, limit), dtype=np.int64)  # the best finished ones, best first
        self._kept_lengths = np.zeros(beams, dtype=np.int64)
        self._kept_scores = np.full(beams, _OUT, dtype=np.float32)
        self._finished = np.zeros(beams, dtype=bool)
        self._improvable = True
        self.length = 0
        """New tokens of the open beams."""
        self.done = False
        self.sources = np.zeros(beams, dtype=np.int64)
        """For each open beam the one it goes on from."""

    @property
    def tokens(self) -> Ids:
        """Each open beam's newest token, int64 [num_beams]."""
        return self._open[:, self._prompt + self.length - 1]

    def advance(self, logits: Scores) -> None:
        """One step: `logits` float32 [num_beams, vocab] are those that follow each open beam."""
        beams, at = self._options.num_beams, self._prompt + self.length
        scores = np.stack(
            [apply(self._processors, ids[:at], log_softmax(row)) for ids, row in zip(self._open, logits, strict=True)]
        )
        scores += self._open_scores[:, None]
        chosen = self._continuations(scores.reshape(-1))
        top_scores = scores.reshape(-1)[chosen]
        sources, tokens = chosen // logits.shape[1], chosen % logits.shape[1]
        sequences = self._open[sources]
        sequences[:, at] = tokens
        self.length += 1
        ended = self._ended(sequences, tokens)

        going_on = top_scores + np.where(ended, _OUT, np.float32(0))
        best = largest(going_on, beams)
        self._open, self._open_scores, self.sources = sequences[best], going_on[best], sources[best]
        # Candidates behind the first `num_beams` only stand by, in case those all end.
        self._keep(sequences[:, self._prompt :], top_scores, ended & (np.arange(len(chosen)) < beams))
        self._improvable = self._improvable and self._can_improve()
        enough = self._options.early_stopping is True and bool(self._finished.all())
        self.done = not self._improvable or enough or bool(ended.all())

    def hypotheses(self) -> list[Hypothesis]:
        """The best finished sequences, best first; before the search is done those of now, open ones where none has finished."""
        wanted = self._options.num_return_sequences
        if self.done or self._finished.any():
            found = zip(self._kept[:wanted], self._kept_lengths, self._kept_scores, strict=False)
            return [Hypothesis(tokens[:length].tolist(), float(score)) for tokens, length, score in found]
        scores = self._penalised(self._open_scores, self.length) if self.length else self._open_scores
        rows = self._open[:wanted, self._prompt : self._prompt + self.length]
        return [Hypothesis(tokens.tolist(), float(score)) for tokens, score in zip(rows, scores, strict=False)]

    def _continuations(self, scores: Scores) -> npt.NDArray[np.int64]:
        """Flat indices of the candidates: `num_beams` of them are left even if all end tokens are chosen."""
        wanted = min(max(2, 1 + len(self._eos)) * self._options.num_beams, len(scores))
        if not self._options.sampled:
            return largest(scores, wanted)
        weights = softmax(scores)
        drawn: list[int] = []
        while len(drawn) < wanted and (total := weights.sum()) > 0:
            target = _native.uniform(self._seed, self._draws) * total
            self._draws += 1
            drawn.append(min(int(np.searchsorted(np.cumsum(weights), target, side="right")), int(np.flatnonzero(weights)[-1])))
            weights[drawn[-1]] = 0.0
        rest = scores.copy()
        rest[drawn] = -np.inf
        return np.concatenate([np.asarray(drawn, dtype=np.int64), largest(rest, wanted - len(drawn))])

    def _ended(self, sequences: Ids, tokens: Ids) -> npt.NDArray[np.bool_]:
        if self.length >= self._limit:
            return np.ones(len(tokens), dtype=bool)
        ended = np.isin(tokens, self._eos)
        if self._stops is not None:
            new = sequences[:, self._prompt : self._prompt + self.length]
            ended |= np.asarray([self._stops(row) for row in new])
        return ended

    def _keep(self, sequences: Ids, scores: Scores, ended: npt.NDArray[np.bool_]) -> None:
        """Merges newly finished sequences into the best ones."""
        penalised = self._penalised(scores, self.length) + np.where(ended, np.float32(0), _OUT)
        merged = np.concatenate([self._kept_scores, penalised])
        best = largest(merged, self._options.num_beams)
        self._kept = np.concatenate([self._kept, sequences])[best]
        self._kept_lengths = np.concatenate([self._kept_lengths, np.full(len(scores), self.length)])[best]
        self._finished = np.concatenate([self._finished, ended])[best]
        self._kept_scores = merged[best]

    def _can_improve(self) -> bool:
        """Whether the best open beam could still enter the finished ones, by transformers' rule of thumb."""
        options = self._options
        length = self._limit if options.early_stopping == "never" and options.length_penalty > 0 else self.length
        best = self._penalised(self._open_scores[:1], length)
        worst = np.where(self._finished, self._kept_scores.min(), _OUT)
        return bool((best > worst).any())

    def _penalised(self, scores: Scores, length: int) -> Scores:
        return np.asarray(scores / float(length**self._options.length_penalty), dtype=np.float32)


class BeamLoop:
    """A token loop (`decode` as the engine's) that searches for every prompt with `num_beams` rows of a state of its own.

    All rows are filled with their prompt and started, without end-of-sequence tokens. An answer comes whole, when its search
    is done: until then `decode` gives no tokens for it.
    """

    def __init__(self, state: DecoderState, searches: Sequence[BeamSearch], cancelled: Callable[[], bool]) -> None:
        self._state = state
        self._searches = list(searches)
        self._told = [False] * len(searches)
        self._width = state.batch // len(searches)
        self._cancelled = cancelled
        self.steps = 0
        """Steps so far, the first one's choice from the prompts' logits included."""

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` steps; the best sequences of the searches that end with them. Raises DeviceError for NaN logits."""
        for _ in range(max_steps):
            going_on = [number for number, search in enumerate(self._searches) if not search.done]
            if not going_on or self._cancelled():
                break
            if self.steps:
                self._run(going_on)
                if self._cancelled():
                    break
            for number in going_on:
                search = self._searches[number]
                logits = np.stack([self._state.logits(row) for row in self._rows(number)])
                if np.isnan(logits).any() or np.isposinf(logits).any():
                    raise DeviceError("the decoder computed logits that contain NaN or infinity: there is no next token.")
                search.advance(logits)
                if search.done:
                    self._retire(number)
            self.steps += 1
        return [self._answer(number) for number in range(len(self._searches))]

    def drop(self, row: int) -> None:
        """Nothing: a search ends by itself."""

    def hypotheses(self, number: int) -> list[Hypothesis]:
        """The sequences to return for a prompt, best first."""
        return self._searches[number].hypotheses()

    def _rows(self, number: int) -> range:
        return range(number * self._width, (number + 1) * self._width)

    def _run(self, numbers: Sequence[int]) -> None:
        """Puts the beams in their new places and runs their newest tokens as one batch, searches that are done left out."""
        sources = list(range(self._state.batch))
        for number in numbers:
            rows = self._rows(number)
            sources[rows.start : rows.stop] = [rows.start + source for source in self._searches[number].sources.tolist()]
        self._state.reorder(sources)
        for number in numbers:
            for row, token in zip(self._rows(number), self._searches[number].tokens.tolist(), strict=True):
                self._state.push(row, token)
        self._state.decode(1)  # its own choices are replaced by the next push

    def _retire(self, number: int) -> None:
        for row in self._rows(number):
            self._state.truncate(row, self._state.lengths[row])  # takes it out of `decode`

    def _answer(self, number: int) -> RowTokens:
        if not self._searches[number].done or self._told[number]:
            return RowTokens(finished=self._told[number])
        self._told[number] = True
        return RowTokens(tokens=list(self.hypotheses(number)[0].tokens), finished=True)


def largest(values: Scores, count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, the lower index first among equals."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if count >= len(values):
        return np.argsort(-values, kind="stable")[:count]
    least = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > least)
    chosen = np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]])
    return chosen[np.argsort(-values[chosen], kind="stable")]
