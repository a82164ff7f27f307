"""Generation options: the caller's, the file's, and what is refused."""

from __future__ import annotations

import math

import pytest

from vlm_edge_runtime.decode.options import DEFAULT_MAX_NEW_TOKENS, GenerationDefaults
from vlm_edge_runtime.errors import OptionError, PromptError


def resolve(config=None, rows=1, **keywords):
    return GenerationDefaults(config or {}, [2], vocab_size=100).resolve(rows, keywords)


def test_defaults_are_greedy_and_fill_what_fits() -> None:
    options = resolve()
    assert options.sampling.temperature == 0
    assert options.sampling.eos_token_ids == (2,)
    assert options.sampling.logprobs == -1
    assert options.new_tokens(10, 10_000) == DEFAULT_MAX_NEW_TOKENS
    assert options.new_tokens(10, 50) == 40
    assert options.new_tokens(60, 50) < 1


def test_the_file_counts() -> None:
    config = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "eos_token_id": [5, 6], "max_new_tokens": 7}
    options = resolve(config)
    assert (options.sampling.temperature, options.sampling.top_p, options.sampling.top_k) == (0.5, 0.9, 50)
    assert options.sampling.eos_token_ids == (5, 6)
    assert options.max_new_tokens == 7
    assert resolve({"do_sample": True}).sampling.temperature == 1.0
    assert resolve({"do_sample": False, "temperature": 0.5}).sampling.temperature == 0.0
    assert resolve({"max_length": 30}).new_tokens(10, 1000) == 20
    assert resolve({"repetition_penalty": 1.2}).sampling.repetition_penalty == 1.2
    assert resolve({"eos_token_id": 9}).sampling.eos_token_ids == (9,)


def test_the_caller_wins() -> None:
    config = {"do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 7}
    options = resolve(config, temperature=0.0, top_k=0, max_new_tokens=2, stop="x", ignore_eos=True, logprobs=0)
    assert (options.sampling.temperature, options.sampling.top_k, options.max_new_tokens) == (0.0, 0, 2)
    assert (options.stop, options.sampling.eos_token_ids, options.sampling.logprobs) == (("x",), (), 0)
    assert resolve(config, temperature=None).sampling.temperature == 0.5


def test_seeds() -> None:
    drawn = resolve(temperature=1.0)
    assert drawn.for_row(0).seed != drawn.for_row(1).seed
    same = resolve(rows=2, seed=3)
    assert [same.for_row(row).seed for row in (0, 1)] == [3, 3]
    own = resolve(rows=2, seed=[3, 4])
    assert [own.for_row(row).seed for row in (0, 1)] == [3, 4]


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("temperature", -0.1, "[0, ∞)"),
        ("temperature", math.nan, "finite"),
        ("temperature", "hot", "finite"),
        ("top_k", -1, "0 or more"),
        ("top_k", 1.5, "0 or more"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.1, "(0, 1]"),
        ("min_p", -0.5, "[0, 1]"),
        ("repetition_penalty", 0.0, "(0, ∞)"),
        ("repetition_penalty", math.inf, "finite"),
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", True, "1 or more"),
        ("logprobs", 101, "0 … 100"),
        ("seed", -1, "0 …"),
        ("seed", [1, 2], "one for each prompt"),
        ("stop", "", "at least one character"),
        ("stop", ["a", ""], "at least one character"),
    ],
)
def test_out_of_range(name, value, valid) -> None:
    with pytest.raises(OptionError) as refused:
        resolve(**({"temperature": 1.0} | {name: value}))
    assert name in str(refused.value)
    assert valid in str(refused.value)
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, PromptError)


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'tmperature'.*temperature"):
        resolve(tmperature=1.0)


def test_a_filter_without_sampling_is_refused() -> None:
    with pytest.raises(OptionError, match="temperature above 0"):
        resolve(top_p=0.9)
    assert resolve(top_p=0.9, temperature=0.0).sampling.temperature == 0.0
    assert resolve({"do_sample": True}, top_p=0.9).sampling.top_p == 0.9


@pytest.mark.parametrize("config", [{"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"suppress_tokens": [1]}, {"new_thing": 1}])
def test_a_file_that_asks_for_more_is_refused(config) -> None:
    (key,) = config
    with pytest.raises(OptionError, match=key):
        resolve(config)
    assert resolve(config, ignore_config=[key]).sampling.temperature == 0


def test_harmless_keys_pass() -> None:
    resolve(
        {
            "num_beams": 1,
            "transformers_version": "5",
            "use_cache": True,
            "length_penalty": 2.0,
            "suppress_tokens": [],
            "num_return_sequences": 1,
            "bad_words_ids": None,
            "new_thing": False,
        }
    )
