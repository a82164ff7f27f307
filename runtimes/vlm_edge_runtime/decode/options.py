"""Generation options: what the caller asks for, over what `generation_config.json` says, over transformers' defaults."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import OptionError

DEFAULT_MAX_NEW_TOKENS = 512
"""Longest answer when neither the caller nor `generation_config.json` names one; less where the context ends sooner."""

MAX_SEED = 2**64 - 1
# transformers samples from the 50 most likely tokens when its configuration says `do_sample` and nothing of `top_k`.
_TRANSFORMERS_TOP_K = 50

# Keys of generation_config.json that we read.
_READ = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length",
    "eos_token_id", "stop_strings",
})  # fmt: skip
# Keys that change nothing about which tokens a single greedy or sampled sequence has: bookkeeping, caches, beam-search and
# assistant details (which matter only where `num_beams`, `prompt_lookup_num_tokens` … switch those on), and outputs.
_HARMLESS = frozenset({
    "_from_model_config", "transformers_version", "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "disable_compile", "compile_config", "low_memory",
    "continuous_batching_config", "prefill_chunk_size", "return_legacy_cache", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "early_stopping", "length_penalty",
    "num_beam_groups", "diversity_penalty", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "use_mtp",
    "renormalize_logits", "remove_invalid_values",
})  # fmt: skip
# Keys that change the answer, with the value at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
}


class SamplingKeywords(TypedDict, total=False):
    """The keyword arguments that `generate`, `stream` and `chat` share. None means: as `generation_config.json` says.

    `temperature`: 0 is greedy. `top_k`: 0 is off. `top_p`, `min_p`, `repetition_penalty`: as in transformers; the first two
    need sampling. `seed`: 0 … 2⁶⁴ − 1, one for every row or a list with one for each; a row's text depends on its own
    seed and prompt only. `stop`: the answer ends before any of these texts. `logprobs`: 0 gives each token's log probability,
    n > 0 also the n most likely tokens. `ignore_eos`: go on to `max_new_tokens` (for measurements). `ignore_config`: keys
    of `generation_config.json` to leave out of account.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool
    ignore_config: Collection[str]


@dataclass(slots=True, frozen=True)
class GenerationOptions:
    """Resolved options of one call. `max_new_tokens` None: up to DEFAULT_MAX_NEW_TOKENS, or the end of the context."""

    max_new_tokens: int | None
    max_length: int | None
    sampling: SamplingParams
    seeds: tuple[int, ...] | None
    stop: tuple[str, ...]

    def for_row(self, row: int) -> SamplingParams:
        """The row's own parameters. Without a seed each row draws a fresh one."""
        if self.seeds is None:
            return replace(self.sampling, seed=secrets.randbits(63))
        return replace(self.sampling, seed=self.seeds[row if len(self.seeds) > 1 else 0])

    def new_tokens(self, prompt_tokens: int, context_length: int) -> int:
        """How long the answer may get after a prompt; may be 0 or less when there is no room for the default."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        room = context_length - prompt_tokens
        if self.max_length is not None:
            return min(room, max(1, self.max_length - prompt_tokens))
        return min(room, DEFAULT_MAX_NEW_TOKENS)


class GenerationDefaults:
    """What a bundle's `generation_config.json` says. `eos_token_ids` of the contract count where the file names none."""

    def __init__(self, config: Mapping[str, Any], eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._config = {key: value for key, value in config.items() if value is not None}
        self._vocab_size = vocab_size
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
        stop = merged.get("stop", merged.get("stop_strings", ()))
        return GenerationOptions(
            max_new_tokens=None if limit is None else _integer("max_new_tokens", limit, 1),
            max_length=None if "max_length" not in config else _integer("max_length", config["max_length"], 1),
            sampling=self._sampling(config, given, merged),
            seeds=_seeds(given["seed"], rows) if "seed" in given else None,
            stop=_stops(stop),
        )

    def _sampling(self, config: Mapping[str, Any], given: Mapping[str, Any], merged: Mapping[str, Any]) -> SamplingParams:
        sampled = bool(config.get("do_sample", False))
        temperature = _number("temperature", given.get("temperature", config.get("temperature", 1.0) if sampled else 0.0), 0.0)
        if temperature == 0 and "temperature" not in given:
            for name in ("top_k", "top_p", "min_p"):
                if name in given:
                    raise OptionError(
                        f"{name}={given[name]!r} has no effect on greedy decoding, which is this bundle's default: "
                        "pass a temperature above 0 with it."
                    )
        top_k = _integer("top_k", merged.get("top_k", _TRANSFORMERS_TOP_K if sampled else 0), 0)
        logprobs = given.get("logprobs")
        return SamplingParams(
            temperature=temperature,
            top_k=0 if top_k >= self._vocab_size else top_k,
            top_p=_number("top_p", merged.get("top_p", 1.0), 0.0, 1.0, open_low=True),
            min_p=_number("min_p", merged.get("min_p", 0.0), 0.0, 1.0),
            repetition_penalty=_number("repetition_penalty", merged.get("repetition_penalty", 1.0), 0.0, open_low=True),
            eos_token_ids=() if given.get("ignore_eos", False) else self.eos_token_ids,
            logprobs=-1 if logprobs is None else _integer("logprobs", int(logprobs), 0, self._vocab_size),
        )


def _ignorable(key: str, value: Any) -> bool:
    # `is`-like comparison for False: 0 == False, and `num_beams: 0` would not be neutral.
    empty = value is False or value in ([], {}, "")
    return key in _READ or key in _HARMLESS or empty or value in _NEUTRAL.get(key, ())


def _number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    bracket = "(" if open_low else "["
    valid = f"{bracket}{low:g}, {'∞)' if high == math.inf else f'{high:g}]'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OptionError(f"{name}={value!r} is not a finite number; it must lie in {valid}.")
    if value < low or value > high or (open_low and value == low):
        raise OptionError(f"{name}={value!r} is out of range; it must lie in {valid}.")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    valid = f"{low} or more" if high is None else f"{low} … {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise OptionError(f"{name}={value!r} must be an integer, {valid}.")
    return value


def _seeds(seed: Any, rows: int) -> tuple[int, ...]:
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != rows:
            raise OptionError(f"seed has {len(seed)} values for {rows} prompts: give one number, or one for each prompt.")
        return tuple(_integer("seed", value, 0, MAX_SEED) for value in seed)
    return (_integer("seed", seed, 0, MAX_SEED),)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise OptionError(f"stop={stop!r}: every stop string must be a text of at least one character.")
    return stops
