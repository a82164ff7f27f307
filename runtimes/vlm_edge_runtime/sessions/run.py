"""One call of `generate` or `stream`: prefill what is not kept already, then decode until every row has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_edge_runtime.decode.beam import BeamLoop, Hypothesis
from vlm_edge_runtime.decode.cancel import CancelLike, CancelToken
from vlm_edge_runtime.decode.options import GenerationOptions
from vlm_edge_runtime.decode.processors import Ids
from vlm_edge_runtime.decode.prompt_lookup import PromptLookupLoop
from vlm_edge_runtime.decode.result import FinishReason, Generation
from vlm_edge_runtime.decode.row_text import RowText
from vlm_edge_runtime.decode.stats import Stats
from vlm_edge_runtime.engines.base import Array, RowTokens, SamplingParams

from .media import Features
from .parts import ATTENTION, Parts
from .prefill import Prefill
from .prefix_cache import Slots
from .prompts import PromptRow
from .token_loop import TokenLoop, Wanted, check_progress, token_loop

_CHUNK_SECONDS = 0.05
_MAX_CHUNK = 64


@dataclass(slots=True)
class _Row:
    prompt: PromptRow
    params: SamplingParams
    limit: int
    text: RowText
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    attention: list[Array] = field(default_factory=list)
    finish: FinishReason | None = None
    prefilled: bool = False


class _Cancelled(Exception):
    """Leaves the prefill when the run was cancelled."""


class Run:
    """A call in progress. Holds nothing before `begin` and nothing after `close`.

    `begin`, then `advance` until `done`, then `close` (always). Any thread may set `cancel`.
    """

    def __init__(
        self,
        parts: Parts,
        prompts: Sequence[PromptRow],
        options: GenerationOptions,
        *,
        began: float,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
    ) -> None:
        self._parts = parts
        self._options = options
        self._width = options.beams.num_beams if options.beams is not None else 1
        self._attention = return_attention
        self._began = began
        self._outside = cancel
        self.cancel = CancelToken()
        self._attached: int | None = None
        self._reaching: int | None = None
        self._slots: Slots | None = None
        self._loop: TokenLoop | None = None
        self._step_s = 0.0
        self.closed = False
        context = parts.plan.context_length
        self._rows = []
        for number, prompt in enumerate(prompts):
            tokens = len(prompt.history)
            limit = options.new_tokens(tokens, context, len(prompt) - tokens)
            params = options.for_row(number, tokens, limit)
            self._rows.append(_Row(prompt, params, limit, RowText(parts.prompts.tokenizer.stream(), options.stop)))
        # Tokens beyond a stop string would be computed in vain; an Event can only be looked at between steps.
        watched = cancel is not None and not isinstance(cancel, CancelToken)
        self._single_steps = bool(options.stop) or watched or return_attention
        self.stats = Stats(
            rows=len(prompts),
            prompt_tokens=sum(prompt.prompt_tokens for prompt in prompts),
            image_tokens=sum(prompt.media_tokens for prompt in prompts),
            preprocess_s=time.perf_counter() - began,
        )

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(row.finish is not None for row in self._rows)

    def begin(self) -> None:
        """Takes a KV cache, encodes what is needed, and prefills every row."""
        if isinstance(self._outside, CancelToken):
            self._attached = self._outside.attach(self.cancel.cancel)
        try:
            self._check_cancelled()
            parts, prompts = self._parts, [row.prompt for row in self._rows]
            if self._options.controls.guided:
                prompts += [parts.prompts.unconditional(prompt) for prompt in prompts]
            prefill = Prefill(parts, prompts, self.stats, self._check_cancelled, self._width)
            needed = max(len(row.prompt) + row.limit for row in self._rows)
            self._slots = slots = prefill.acquire(parts.plan.capacity(len(prompts) * self._width, needed))
            self._reaching = self.cancel.attach(slots.state.cancel)
            plain = self._width > 1 or self._options.in_python
            filled: list[dict[str, Features]] = []

            def ready(number: int, prompt: PromptRow, features: dict[str, Features]) -> None:
                filled.append(features)
                if number < len(self._rows):
                    self._rows[number].prefilled = True
                params = SamplingParams() if plain else self._rows[number].params
                prefill.start_row(slots.state, number * self._width, prompt, params, features)

            prefill.fill(slots, ready)
            if self._width > 1:
                self._spread(slots, prefill, filled)
            wanted = [self._wanted(row) for row in self._rows]
            self._loop = token_loop(slots.state, self._options, wanted, self._is_cancelled, self._stops)
        except _Cancelled:
            self._end_all("cancelled")
        except Exception:
            self._break()
            raise

    def advance(self, max_steps: int = _MAX_CHUNK) -> list[str]:
        """Up to `max_steps` more tokens for each row; the text that became certain, per row.

        Fewer when steps are slow, so that Ctrl-C and cancellation are noticed in time.
        """
        pieces = ["" for _ in self._rows]
        if self._slots is None or self._loop is None or self._is_cancelled():
            return self._end_all("cancelled")
        open_rows = [row for row in self._rows if row.finish is None]
        steps = max(1, min([max_steps, self._quick_steps(), *(row.limit - len(row.tokens) for row in open_rows)]))
        started = time.perf_counter()
        before = self._loop.steps
        try:
            produced = self._loop.decode(steps)
            now = time.perf_counter()
            self._clock(started, now, self._loop.steps - before)
            if isinstance(self._loop, PromptLookupLoop):
                self.stats.drafted_tokens, self.stats.accepted_tokens = self._loop.drafted, self._loop.accepted
            if not self._is_cancelled():
                check_progress(self._loop.steps - before)
            for number, (row, new) in enumerate(zip(self._rows, produced, strict=True)):
                if row.finish is None:
                    pieces[number] = self._take(number, row, new)
        except Exception:
            self._break()
            raise
        if self._is_cancelled() and not self.done:
            pieces = [piece + last for piece, last in zip(pieces, self._end_all("cancelled"), strict=True)]
        return pieces

    def close(self) -> None:
        """Gives the KV cache back, with what it now stands for. Safe at any moment, more than once."""
        self.closed = True
        if self._attached is not None and isinstance(self._outside, CancelToken):
            self._outside.detach(self._attached)
            self._attached = None
        if self._reaching is not None:
            # The cache may serve another call from now on, which a late `cancel` must not reach.
            self.cancel.detach(self._reaching)
            self._reaching = None
        slots, self._slots = self._slots, None
        if slots is None:
            return
        for number, row in enumerate(self._rows):
            if row.prefilled:
                kept = row.tokens[: row.text.tokens_within()] if row.text.stopped else row.tokens
                # Of a search's rows nobody knows later which beam they hold: the prompt is what they share.
                slots.contents[number * self._width] = row.prompt.continued(kept if self._width == 1 else [])
        self._parts.kept.release(slots)

    def results(self) -> list[Generation]:
        """The rows' answers so far; a row that has not ended counts as cancelled."""
        return [self._result(number, row) for number, row in enumerate(self._rows)]

    def _result(self, number: int, row: _Row) -> Generation:
        wanted = row.params.logprobs
        best, *others = self._hypotheses(number) or [None]
        return Generation(
            text=row.text.text,
            tokens=list(row.tokens),
            finish_reason=row.finish or "cancelled",
            prompt_tokens=row.prompt.prompt_tokens,
            seed=row.params.seed,
            logprobs=list(row.logprobs) if wanted >= 0 else None,
            top_logprobs=[list(top) for top in row.top_logprobs] if wanted > 0 else None,
            attention=np.asarray(row.attention, dtype=np.float32) if self._attention else None,
            score=best.score if best is not None else None,
            alternatives=[self._alternative(row, other) for other in others if other is not None],
        )

    def _hypotheses(self, number: int) -> list[Hypothesis | None]:
        """What the search returns for a prompt; nothing before it is done, or without one."""
        if not isinstance(self._loop, BeamLoop) or not self._rows[number].tokens:
            return []
        return [*self._loop.hypotheses(number)]

    def _alternative(self, row: _Row, found: Hypothesis) -> Generation:
        other = _Row(row.prompt, row.params, row.limit, RowText(self._parts.prompts.tokenizer.stream(), self._options.stop))
        self._read(other, found.tokens)
        self._end(other, self._reason(other))
        return Generation(
            text=other.text.text,
            tokens=other.tokens,
            finish_reason=other.finish or "length",
            prompt_tokens=row.prompt.prompt_tokens,
            seed=row.params.seed,
            score=found.score,
        )

    # --- loops in Python ---

    def _spread(self, slots: Slots, prefill: Prefill, features: Sequence[dict[str, Features]]) -> None:
        """Fills each prompt's other rows with what its first one holds."""
        width = self._width
        slots.state.reorder([row // width * width for row in range(len(self._rows) * width)])
        for number, row in enumerate(self._rows):
            for beam in range(number * width + 1, (number + 1) * width):
                slots.contents[beam] = row.prompt.content_ids
                prefill.start_row(slots.state, beam, row.prompt, SamplingParams(), features[number])

    def _wanted(self, row: _Row) -> Wanted:
        source = row.prompt.source.ids if row.prompt.source is not None else row.prompt.history
        history = row.prompt.history
        pictures = [modality.token_id for modality in self._parts.contract.modalities if modality.token_id is not None]
        barred = np.isin(history, pictures) | (history >= self._parts.decoder.vocab_size)
        return Wanted(row.params, row.limit, history, source, np.where(barred, -1, history))

    def _stops(self, tokens: Ids) -> bool:
        """Whether a stop string is completed by new tokens."""
        text = RowText(self._parts.prompts.tokenizer.stream(), self._options.stop)
        for token in tokens.tolist():
            if token not in self._rows[0].params.eos_token_ids:
                text.push(token)
        return text.stopped

    # --- decode ---

    def _take(self, number: int, row: _Row, new: RowTokens) -> str:
        """Adds a row's new tokens and returns the text they make certain."""
        before = len(row.tokens)
        row.logprobs += new.logprobs
        row.top_logprobs += new.top_logprobs
        if self._attention and new.tokens:
            # The graph ran for the token before it: what it looked at to say this one.
            assert self._slots is not None
            row.attention.append(self._slots.state.outputs(number)[ATTENTION])
        pieces = self._read(row, new.tokens)
        if row.text.stopped or new.finished or len(row.tokens) >= row.limit:
            pieces += self._end(row, self._reason(row))
        if row.text.stopped:
            self._take_out(number, len(row.prompt) + row.text.tokens_within())
        elif row.finish is not None and not new.finished:
            self._take_out(number)
        self.stats.new_tokens += len(row.tokens) - before
        return pieces

    def _read(self, row: _Row, tokens: Sequence[int]) -> str:
        """Adds tokens up to a stop string and returns the text they make certain."""
        pieces: list[str] = []
        for token in tokens:
            row.tokens.append(token)
            if token in row.params.eos_token_ids:
                continue
            pieces.append(row.text.push(token))
            if row.text.stopped:
                break
        return "".join(pieces)

    def _reason(self, row: _Row) -> FinishReason:
        if row.text.stopped:
            return "stop_string"
        return "stop" if row.tokens and row.tokens[-1] in row.params.eos_token_ids else "length"

    def _take_out(self, number: int, length: int | None = None) -> None:
        """Ends a row's part in decode while others go on, and forgets its entries from `length` on."""
        assert self._slots is not None and self._loop is not None
        self._slots.touch()
        self._loop.drop(number)
        if self._width > 1:
            return
        held = 0 if self._parts.memory.graphs.recurrent else self._slots.state.lengths[number]
        self._slots.state.truncate(number, held if length is None else min(length, held))

    def _end(self, row: _Row, reason: FinishReason) -> str:
        last = row.text.finish()
        row.finish = "stop_string" if row.text.stopped else reason
        return last

    def _end_all(self, reason: FinishReason) -> list[str]:
        return [self._end(row, reason) if row.finish is None else "" for row in self._rows]

    def _clock(self, started: float, now: float, steps: int) -> None:
        stats = self.stats
        if stats.steps == 0 and steps:
            stats.ttft_s = now - self._began
            # Sampling the first token is part of the first one's time; what follows in the same call is decode.
            if steps > 1:
                stats.decode_s += (now - started) * (steps - 1) / steps
        else:
            stats.decode_s += now - started
        if steps:
            self._step_s = (now - started) / steps if stats.steps else 0.0
        stats.steps += steps

    def _quick_steps(self) -> int:
        """How many steps fit into a time that nobody notices; one until a whole step was timed."""
        if self._single_steps or self._step_s <= 0:
            return 1
        return max(1, min(_MAX_CHUNK, int(_CHUNK_SECONDS / self._step_s)))

    def _is_cancelled(self) -> bool:
        return self.cancel.is_set() or (self._outside is not None and self._outside.is_set())

    def _check_cancelled(self) -> None:
        if self._is_cancelled():
            raise _Cancelled

    def _break(self) -> None:
        if self._slots is not None:
            self._slots.broken = True
