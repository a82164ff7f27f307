"""Length and repetition controls and the rarer filters, as `generation_config.json` names them: read, checked, and given to

whoever chooses tokens. What the native sampler knows goes into each row's SamplingParams; the rest needs a loop in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import OptionError

from . import processors
from .option_values import flag, integer, number, tokens
from .processors import Processor

Encode = Callable[[str], Sequence[int]]
"""A text to token ids, without special tokens."""

Biases = tuple[tuple[tuple[int, ...], float], ...]

KEYS = frozenset({
    "min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits", "top_h",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "guidance_scale",
})  # fmt: skip
"""Keys of generation_config.json that are read here."""

FILTERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Those that need sampling."""


@dataclass(slots=True, frozen=True)
class Controls:
    """Checked values. Lengths in tokens; `min_length` counts the prompt (of an encoder-decoder: the decoder's), which

    `min_new_tokens` does not and which it overrules. `sequence_bias` holds the bad words too. 0, 1 or None: off.
    """

    min_length: int = 0
    min_new_tokens: int | None = None
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    sequence_bias: Biases = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    exponential_decay: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    guidance_scale: float = 1.0

    @property
    def in_python(self) -> bool:
        """Whether the native sampler does not know all that is asked for (beam search aside)."""
        filters = self.top_h is not None or self.typical_p < 1 or self.epsilon_cutoff > 0 or self.eta_cutoff > 0
        encoder = self.encoder_no_repeat_ngram_size > 0 or self.encoder_repetition_penalty != 1
        return filters or encoder or self.exponential_decay is not None or self.guided

    @property
    def guided(self) -> bool:
        """Whether each prompt needs an unconditional row beside it."""
        return self.guidance_scale != 1

    def for_row(self, sampling: SamplingParams, prompt_tokens: int, limit: int) -> SamplingParams:
        """The row's parameters. `prompt_tokens`: those before the new ones, the history of `start`; at most `limit` come."""
        least = self.min_length if self.min_new_tokens is None else prompt_tokens + self.min_new_tokens
        first_forced = self.forced_bos_token_id is not None and prompt_tokens == 1
        forced: list[tuple[int, tuple[int, ...]]] = []
        if self.forced_bos_token_id is not None:
            forced.append((1, (self.forced_bos_token_id,)))
        if self.forced_eos_token_ids:
            forced.append((prompt_tokens + limit - 1, self.forced_eos_token_ids))
        begin = ((prompt_tokens + first_forced, self.begin_suppress_tokens),) if self.begin_suppress_tokens else ()
        return replace(
            sampling,
            min_length=least if sampling.eos_token_ids else 0,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            suppress_tokens=self.suppress_tokens,
            begin_suppress_tokens=begin,
            forced_tokens=tuple(forced),
            sequence_bias=self.sequence_bias,
        )

    def processors(self, params: SamplingParams, prompt_tokens: int, source: Sequence[int], *, beams: bool) -> list[Processor]:
        """All of a row's processors in transformers' order, guidance excepted. `params`: what `for_row` gave.

        `source`: the tokens that the encoder-related controls look at, an encoder's or else the prompt's; none: they are off.
        """
        found: list[Processor] = []
        text = tuple(source)
        if params.sequence_bias:
            found.append(processors.SequenceBias(params.sequence_bias))
        if self.encoder_repetition_penalty != 1 and text:
            found.append(processors.RepetitionPenalty(1 / self.encoder_repetition_penalty, text))
        if params.repetition_penalty != 1:
            found.append(processors.RepetitionPenalty(params.repetition_penalty))
        if params.no_repeat_ngram_size:
            found.append(processors.NoRepeatNGram(params.no_repeat_ngram_size))
        if self.encoder_no_repeat_ngram_size and text:
            found.append(processors.NoRepeatNGram(self.encoder_no_repeat_ngram_size, text))
        if params.min_length:
            found.append(processors.MinLength(params.min_length, params.eos_token_ids))
        found += [processors.Forced(length, listed) for length, listed in params.forced_tokens]
        if self.remove_invalid_values:
            found.append(processors.RemoveInvalid())
        if self.exponential_decay is not None and params.eos_token_ids:
            start, factor = self.exponential_decay
            found.append(processors.ExponentialDecay(prompt_tokens + start, factor, params.eos_token_ids))
        if params.suppress_tokens:
            found.append(processors.Suppress(params.suppress_tokens))
        found += [processors.Suppress(listed, length) for length, listed in params.begin_suppress_tokens]
        if params.temperature > 0:
            found += self._warpers(params, max(2, 1 + len(params.eos_token_ids)) if beams else 1)
        if self.renormalize_logits:
            found.append(processors.Normalise())
        return found

    def _warpers(self, params: SamplingParams, keep: int) -> list[Processor]:
        from . import warpers  # here and not above: the native sampler has the common ones

        found: list[Processor] = []
        if params.temperature != 1:
            found.append(warpers.Temperature(params.temperature))
        if self.top_h is not None:
            found.append(warpers.TopH(self.top_h))
        if params.top_k:
            found.append(warpers.TopK(params.top_k, keep))
        if params.top_p < 1:
            found.append(warpers.TopP(params.top_p, keep))
        if params.min_p:
            found.append(warpers.MinP(params.min_p, keep))
        if self.typical_p < 1:
            found.append(warpers.Typical(self.typical_p, keep))
        if self.epsilon_cutoff:
            found.append(warpers.Epsilon(self.epsilon_cutoff, keep))
        if self.eta_cutoff:
            found.append(warpers.Epsilon(self.eta_cutoff, keep, eta=True))
        return found


def read_controls(merged: Mapping[str, Any], eos: Sequence[int], vocab_size: int, encode: Encode | None) -> Controls:
    """Controls from the caller's keywords over the file's keys. Raises OptionError."""
    get = merged.get
    decay = get("exponential_decay_length_penalty")
    forced_bos, new = get("forced_bos_token_id"), get("min_new_tokens")
    controls = Controls(
        min_length=integer("min_length", get("min_length", 0), 0),
        min_new_tokens=None if new is None else integer("min_new_tokens", new, 0),
        no_repeat_ngram_size=integer("no_repeat_ngram_size", get("no_repeat_ngram_size", 0), 0),
        encoder_no_repeat_ngram_size=integer("encoder_no_repeat_ngram_size", get("encoder_no_repeat_ngram_size", 0), 0),
        encoder_repetition_penalty=number(
            "encoder_repetition_penalty", get("encoder_repetition_penalty", 1.0), 0.0, open_low=True
        ),
        sequence_bias=(
            *_biases(get("sequence_bias", ()), vocab_size),
            *_never(_sequences("bad_words_ids", get("bad_words_ids", ()), vocab_size, None), eos),
            *_never(_sequences("bad_words", get("bad_words", ()), vocab_size, encode), eos),
        ),
        forced_bos_token_id=None if forced_bos is None else integer("forced_bos_token_id", forced_bos, 0, vocab_size - 1),
        forced_eos_token_ids=tokens("forced_eos_token_id", get("forced_eos_token_id", ()), vocab_size),
        suppress_tokens=tokens("suppress_tokens", get("suppress_tokens", ()), vocab_size, drop=True),
        begin_suppress_tokens=tokens("begin_suppress_tokens", get("begin_suppress_tokens", ()), vocab_size, drop=True),
        exponential_decay=None if decay is None else _decay(decay),
        remove_invalid_values=flag("remove_invalid_values", get("remove_invalid_values", False)),
        renormalize_logits=flag("renormalize_logits", get("renormalize_logits", False)),
        top_h=None if get("top_h") is None else number("top_h", get("top_h"), 0.0, 1.0, open_low=True),
        typical_p=number("typical_p", get("typical_p", 1.0), 0.0, 1.0, open_low=True),
        epsilon_cutoff=number("epsilon_cutoff", get("epsilon_cutoff", 0.0), 0.0, 1.0),
        eta_cutoff=number("eta_cutoff", get("eta_cutoff", 0.0), 0.0, 1.0),
        guidance_scale=number("guidance_scale", get("guidance_scale", 1.0), 0.0),
    )
    first = () if controls.forced_bos_token_id is None else (controls.forced_bos_token_id,)
    for name, forced in (("forced_bos_token_id", first), ("forced_eos_token_id", controls.forced_eos_token_ids)):
        if forced and set(forced) <= set(controls.suppress_tokens):
            raise OptionError(f"{name}={list(forced)} is in suppress_tokens too, which leaves no token: remove it from one.")
    return controls


def _biases(value: Any, vocab_size: int) -> Biases:
    """`sequence_bias`: {(tokens): bias}, or [[tokens, bias], …] as JSON has it."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        listed = [(sequence, bias) for sequence, bias in pairs]
    except (TypeError, ValueError):
        raise OptionError(
            f"sequence_bias={value!r} must map sequences of token ids to numbers, or list [[ids, number], …]."
        ) from None
    return tuple((_sequences("sequence_bias", [sequence], vocab_size, None)[0], _bias(bias)) for sequence, bias in listed)


def _bias(value: Any) -> float:
    return -float("inf") if value == -float("inf") else number("sequence_bias", value, -float("inf"))


def _sequences(name: str, value: Any, vocab_size: int, encode: Encode | None) -> list[tuple[int, ...]]:
    """Sequences of token ids; a text becomes those that it has at the beginning of a line and after a space."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence):
        raise OptionError(f"{name}={value!r} must be a list of {'texts or ' if encode else ''}lists of token ids.")
    found: list[tuple[int, ...]] = []
    for one in listed:
        if isinstance(one, str) and one and encode is not None:
            found += dict.fromkeys(tuple(encode(text)) for text in (one, f" {one}"))
        elif isinstance(one, Sequence) and not isinstance(one, str) and one:
            found.append(tokens(name, one, vocab_size))
        else:
            raise OptionError(
                f"{name}={value!r}: {one!r} is not {'a text or ' if encode else ''}a list of at least one token id."
            )
    return found


def _never(sequences: Sequence[tuple[int, ...]], eos: Sequence[int]) -> Biases:
    """Bad words as biases of −∞; an end-of-sequence token by itself is none, as in transformers."""
    return tuple((sequence, -float("inf")) for sequence in sequences if not (len(sequence) == 1 and sequence[0] in eos))


def _decay(value: Any) -> tuple[int, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise OptionError(f"exponential_decay_length_penalty={value!r} must be a pair: (first token, factor).")
    name = "exponential_decay_length_penalty"
    return integer(name, value[0], 0), number(name, value[1], 0.0, open_low=True)
