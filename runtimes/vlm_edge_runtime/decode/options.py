"""Generation options: what the caller asks for, over what `generation_config.json` says, over transformers' defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import OptionError

from . import controls
from .beam import BeamOptions, EarlyStopping
from .controls import Controls, Encode, read_controls
from .option_values import MAX_SEED, any_seed, integer, number, seeds, stops
from .prompt_lookup import NGRAM_SIZE, NUM_TOKENS, PromptLookup, read_lookup

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "MAX_SEED", "GenerationDefaults", "GenerationOptions", "SamplingKeywords"]

DEFAULT_MAX_NEW_TOKENS = 512
"""Longest answer when neither the caller nor `generation_config.json` names one; less where the context ends sooner."""

# transformers samples from the 50 most likely tokens when its configuration says `do_sample` and nothing of `top_k`.
_TRANSFORMERS_TOP_K = 50

# Keys of generation_config.json that we read, besides those of `controls`.
_READ = controls.KEYS | {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length",
    "eos_token_id", "stop_strings", "num_beams", "length_penalty", "early_stopping", "num_return_sequences",
    NUM_TOKENS, NGRAM_SIZE,
}  # fmt: skip
# Keys that change nothing about which tokens come out: bookkeeping, caches, outputs, and assistant details (which matter only
# where an assistant is switched on, and then only for speed).
_HARMLESS = frozenset({
    "_from_model_config", "transformers_version", "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "disable_compile", "compile_config", "low_memory",
    "continuous_batching_config", "prefill_chunk_size", "return_legacy_cache", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp",
})  # fmt: skip
# Keys that ask for what we do not do, with the values at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
    "penalty_alpha": (0, 0.0),
}
# What a file says of a search or of sampling does not bind a caller who switches those off.
_SEARCH = ("length_penalty", "early_stopping", "num_return_sequences")


class SamplingKeywords(TypedDict, total=False):
    """The keyword arguments that `generate`, `stream` and `chat` share. None means: as `generation_config.json` says.

    `temperature`: 0 is greedy, also where the file asks for beams. `top_k`: 0 is off. `top_p`, `min_p`, `top_h`, `typical_p`,
    `epsilon_cutoff`, `eta_cutoff`, `repetition_penalty`: as in transformers; all but the last need sampling.
    `seed`: 0 … 2⁶⁴ − 1, one for every row or a list with one for each; a row's text depends on its own seed and prompt only.
    `stop`: the answer ends before any of these texts. `logprobs`: 0 gives each token's log probability, n > 0 also the n most
    likely tokens. `ignore_eos`: go on to `max_new_tokens` (for measurements). `ignore_config`: keys of
    `generation_config.json` to leave out of account.

    `num_beams` > 1: beam search, with sampling beam sampling; `length_penalty`, `early_stopping` (True, False or "never") and
    `num_return_sequences` are its own. A streamed answer then comes in one piece at the end.

    Length and repetition: `min_new_tokens`, `no_repeat_ngram_size` (0: off), `bad_words` (texts or lists of token ids that
    must not come), `suppress_tokens`, `begin_suppress_tokens` (not as the first token), `forced_bos_token_id`,
    `forced_eos_token_id`, `sequence_bias`, `exponential_decay_length_penalty`, `encoder_repetition_penalty`,
    `encoder_no_repeat_ngram_size`: as in transformers. `guidance_scale`: 1 is off; above it the answer is led away from what
    the model would say without the prompt (classifier-free guidance).

    `prompt_lookup_num_tokens`: speculation without a second model: up to so many tokens are drafted from what followed the last
    `max_matching_ngram_size` tokens (2; else fewer) earlier in the prompt or the answer, and checked in one pass. Off by default
    and for 0; for greedy answers of builds with native kernels. The tokens, and their log probabilities bit for bit, are those of
    an answer without it; answers that repeat the prompt or themselves come faster, others at most a little slower.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool
    ignore_config: Collection[str]
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    min_new_tokens: int | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    encoder_repetition_penalty: float | None
    bad_words: str | Sequence[str | Sequence[int]] | None
    suppress_tokens: int | Sequence[int] | None
    begin_suppress_tokens: int | Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    sequence_bias: Mapping[tuple[int, ...], float] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    guidance_scale: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None


@dataclass(slots=True, frozen=True)
class GenerationOptions:
    """Resolved options of one call. `max_new_tokens` None: up to DEFAULT_MAX_NEW_TOKENS, or the end of the context.

    `beams`: None without a search, `lookup` without speculation. `max_length` counts the prompt (of an encoder-decoder: what the
    decoder begins with).
    """

    max_new_tokens: int | None
    max_length: int | None
    sampling: SamplingParams
    seeds: tuple[int, ...] | None
    stop: tuple[str, ...]
    controls: Controls = field(default_factory=Controls)
    beams: BeamOptions | None = None
    lookup: PromptLookup | None = None

    @property
    def in_python(self) -> bool:
        """Whether the tokens must be chosen by a loop in Python (beam search aside)."""
        return self.controls.in_python

    def for_row(self, row: int, prompt_tokens: int, limit: int) -> SamplingParams:
        """The row's own parameters. Without a seed each row draws a fresh one.

        `prompt_tokens`: those before the new ones (the history that `DecoderState.start` gets); at most `limit` come.
        """
        seed = any_seed() if self.seeds is None else self.seeds[row if len(self.seeds) > 1 else 0]
        return self.controls.for_row(replace(self.sampling, seed=seed), prompt_tokens, limit)

    def new_tokens(self, prompt_tokens: int, context_length: int, prefix: int = 0) -> int:
        """How long the answer may get after a prompt; may be 0 or less when there is no room for the default.

        `prefix`: entries of the context that are no tokens of the prompt (image features in front of it).
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        room = context_length - prompt_tokens - prefix
        if self.max_length is not None:
            return min(room, max(1, self.max_length - prompt_tokens))
        return min(room, DEFAULT_MAX_NEW_TOKENS)


class GenerationDefaults:
    """What a bundle's `generation_config.json` says. `eos_token_ids` of the contract count where the file names none.

    `encode`: how a text becomes token ids (for `bad_words`).
    """

    def __init__(
        self, config: Mapping[str, Any], eos_token_ids: Sequence[int], vocab_size: int, encode: Encode | None = None
    ) -> None:
        self._config = {key: value for key, value in config.items() if value is not None}
        self._vocab_size = vocab_size
        self._encode = encode
        eos = self._config.get("eos_token_id")
        self.eos_token_ids = tuple(eos_token_ids) if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    def unsupported(self, ignore: Collection[str] = ()) -> dict[str, Any]:
        """The keys that ask for something this runtime does not do."""
        return {key: value for key, value in self._config.items() if key not in ignore and not _ignorable(key, value)}

    def resolve(self, rows: int, keywords: Mapping[str, Any]) -> GenerationOptions:
        """Options of one call for `rows` rows. Raises OptionError naming the option, its value and the valid range."""
        unknown = set(keywords) - set(SamplingKeywords.__annotations__)
        if unknown:
            known = ", ".join(sorted(SamplingKeywords.__annotations__))
            raise OptionError(f"unknown generation option {', '.join(map(repr, sorted(unknown)))}; known are: {known}.")
        ignore = keywords.get("ignore_config", ())
        ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        if unsupported := self.unsupported(ignore):
            stated = ", ".join(f"{key} = {value!r}" for key, value in unsupported.items())
            raise OptionError(
                f"generation_config.json asks for {stated}, which this runtime does not do. To generate without it, pass "
                f"ignore_config={sorted(unsupported)!r}, or remove it from the checkpoint's file and export again."
            )
        config = {key: value for key, value in self._config.items() if key not in ignore}
        given = {key: value for key, value in keywords.items() if value is not None}
        merged = {**config, **given}
        limit = merged.get("max_new_tokens")
        sampling = self._sampling(config, given, merged)
        if "min_new_tokens" in given and limit is not None and given["min_new_tokens"] > limit:
            raise OptionError(f"min_new_tokens={given['min_new_tokens']!r} is more than max_new_tokens={limit!r}.")
        options = GenerationOptions(
            max_new_tokens=None if limit is None else integer("max_new_tokens", limit, 1),
            max_length=None if "max_length" not in config else integer("max_length", config["max_length"], 1),
            sampling=sampling,
            seeds=seeds(given["seed"], rows) if "seed" in given else None,
            stop=stops(merged.get("stop", merged.get("stop_strings", ()))),
            controls=read_controls(merged, sampling.eos_token_ids, self._vocab_size, self._encode),
            beams=self._beams(given, merged, sampled=sampling.temperature > 0),
        )
        if options.beams is not None and options.controls.guided:
            raise OptionError("guidance_scale and num_beams > 1 do not go together: leave one of them out.")
        if options.beams is not None and sampling.logprobs >= 0:
            raise OptionError(
                f"logprobs={sampling.logprobs} is not available in a beam search, whose answers have a score: leave it out, or "
                "pass num_beams=1."
            )
        return replace(options, lookup=read_lookup(config, given, _without_lookup(options)))

    def _sampling(self, config: Mapping[str, Any], given: Mapping[str, Any], merged: Mapping[str, Any]) -> SamplingParams:
        sampled = bool(config.get("do_sample", False))
        temperature = number("temperature", given.get("temperature", config.get("temperature", 1.0) if sampled else 0.0), 0.0)
        if temperature == 0 and "temperature" not in given:
            for name in ("top_k", "top_p", "min_p", *controls.FILTERS):
                if name in given:
                    raise OptionError(
                        f"{name}={given[name]!r} has no effect on greedy decoding, which is this bundle's default: "
                        "pass a temperature above 0 with it."
                    )
        top_k = integer("top_k", merged.get("top_k", _TRANSFORMERS_TOP_K if sampled else 0), 0)
        logprobs = given.get("logprobs")
        return SamplingParams(
            temperature=temperature,
            top_k=0 if top_k >= self._vocab_size else top_k,
            top_p=number("top_p", merged.get("top_p", 1.0), 0.0, 1.0, open_low=True),
            min_p=number("min_p", merged.get("min_p", 0.0), 0.0, 1.0),
            repetition_penalty=number("repetition_penalty", merged.get("repetition_penalty", 1.0), 0.0, open_low=True),
            eos_token_ids=() if given.get("ignore_eos", False) else self.eos_token_ids,
            logprobs=-1 if logprobs is None else integer("logprobs", int(logprobs), 0, self._vocab_size),
        )

    def _beams(self, given: Mapping[str, Any], merged: Mapping[str, Any], *, sampled: bool) -> BeamOptions | None:
        greedy = given.get("temperature") == 0 and "num_beams" not in given
        count = 1 if greedy else integer("num_beams", merged.get("num_beams", 1), 1)
        if count == 1:
            for name in _SEARCH:
                if name in given and not (name == "num_return_sequences" and given[name] == 1):
                    raise OptionError(
                        f"{name}={given[name]!r} has no effect without beams: pass num_beams of 2 or more with it"
                        + (", or the prompt several times with seeds of its own." if name == "num_return_sequences" else ".")
                    )
            return None
        early: EarlyStopping = merged.get("early_stopping", False)
        if not isinstance(early, bool) and early != "never":
            raise OptionError(f'early_stopping={early!r} must be True, False or "never".')
        return BeamOptions(
            num_beams=count,
            length_penalty=number("length_penalty", merged.get("length_penalty", 1.0), -float("inf")),
            early_stopping=early,
            num_return_sequences=integer("num_return_sequences", merged.get("num_return_sequences", 1), 1, count),
            sampled=sampled,
        )


def _without_lookup(options: GenerationOptions) -> str | None:
    """What is asked for besides that drafts cannot be checked with."""
    if options.sampling.temperature > 0:
        return f"sampling (temperature={options.sampling.temperature:g})"
    if options.beams is not None:
        return f"a beam search (num_beams={options.beams.num_beams})"
    if options.controls.guided:
        return f"guidance (guidance_scale={options.controls.guidance_scale:g})"
    if options.in_python:
        return "filters, encoder_… controls or exponential_decay_length_penalty, which single steps are needed for"
    return None


def _ignorable(key: str, value: Any) -> bool:
    # `is`-like comparison for False: 0 == False, and `num_beam_groups: 0` would not be neutral.
    empty = value is False or value in ([], {}, "")
    return key in _READ or key in _HARMLESS or empty or value in _NEUTRAL.get(key, ())
