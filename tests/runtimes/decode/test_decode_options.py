"""Generation options: the caller's, the file's, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlm_edge_runtime.decode.beam import BeamOptions
from vlm_edge_runtime.decode.options import DEFAULT_MAX_NEW_TOKENS, GenerationDefaults
from vlm_edge_runtime.decode.processors import apply
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
    assert drawn.for_row(0, 3, 9).seed != drawn.for_row(1, 3, 9).seed
    same = resolve(rows=2, seed=3)
    assert [same.for_row(row, 3, 9).seed for row in (0, 1)] == [3, 3]
    own = resolve(rows=2, seed=[3, 4])
    assert [own.for_row(row, 3, 9).seed for row in (0, 1)] == [3, 4]


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
        ("num_beams", 0, "1 or more"),
        ("num_beams", 2.5, "1 or more"),
        ("min_new_tokens", -1, "0 or more"),
        ("no_repeat_ngram_size", -2, "0 or more"),
        ("suppress_tokens", ["a"], "0 … 99"),
        ("forced_bos_token_id", 100, "0 … 99"),
        ("bad_words", [[]], "at least one token"),
        ("bad_words", [[100]], "0 … 99"),
        ("sequence_bias", {(3,): "much"}, "finite"),
        ("sequence_bias", [3], "sequences of token ids"),
        ("exponential_decay_length_penalty", 3, "pair"),
        ("guidance_scale", -1.0, "[0, ∞)"),
        ("typical_p", 0.0, "(0, 1]"),
        ("epsilon_cutoff", 1.5, "[0, 1]"),
        ("top_h", 2, "(0, 1]"),
    ],
)
def test_out_of_range(name, value, valid) -> None:
    with pytest.raises(OptionError) as refused:
        resolve(**({"temperature": 1.0} | {name: value}))
    assert name in str(refused.value)
    assert valid in str(refused.value)
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, PromptError)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"num_beams": 3, "num_return_sequences": 4}, "1 … 3"),
        ({"num_beams": 3, "early_stopping": "soon"}, '"never"'),
        ({"num_beams": 3, "length_penalty": math.inf}, "finite"),
        ({"length_penalty": 2.0}, "num_beams of 2 or more"),
        ({"num_return_sequences": 2}, "several times"),
        ({"num_beams": 3, "logprobs": 0}, "score"),
        ({"num_beams": 3, "guidance_scale": 2.0}, "do not go together"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "max_new_tokens=8"),
        ({"suppress_tokens": [3, 4], "forced_bos_token_id": 3}, "suppress_tokens"),
        ({"typical_p": 0.5}, "temperature above 0"),
    ],
)
def test_combinations_that_cannot_be(keywords, says) -> None:
    with pytest.raises(OptionError) as refused:
        resolve(**keywords)
    assert says in str(refused.value)


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'tmperature'.*temperature"):
        resolve(tmperature=1.0)


def test_a_filter_without_sampling_is_refused() -> None:
    with pytest.raises(OptionError, match="temperature above 0"):
        resolve(top_p=0.9)
    assert resolve(top_p=0.9, temperature=0.0).sampling.temperature == 0.0
    assert resolve({"do_sample": True}, top_p=0.9).sampling.top_p == 0.9


@pytest.mark.parametrize(
    "config",
    [
        {"num_beam_groups": 2},
        {"diversity_penalty": 0.5},
        {"penalty_alpha": 0.6},
        {"dola_layers": "high"},
        {"constraints": [1]},
        {"force_words_ids": [[1]]},
        {"watermarking_config": {"greenlist_ratio": 0.25}},
        {"new_thing": 1},
    ],
)
def test_a_file_that_asks_for_more_is_refused(config) -> None:
    (key,) = config
    with pytest.raises(OptionError, match=key):
        resolve(config)
    assert resolve(config, ignore_config=[key]).sampling.temperature == 0


def test_the_file_asks_for_beams() -> None:
    config = {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True, "num_return_sequences": 2}
    assert resolve(config).beams == BeamOptions(4, 0.6, True, 2)
    assert resolve(config, num_beams=3, early_stopping="never").beams == BeamOptions(3, 0.6, "never", 2)
    assert resolve(config | {"do_sample": True}).beams == BeamOptions(4, 0.6, True, 2, sampled=True)
    assert resolve(config, temperature=0.0).beams is None
    assert resolve(config, num_beams=1).beams is None
    assert resolve(config, temperature=0.0, num_beams=2).beams == BeamOptions(2, 0.6, True, 2)
    assert resolve({"length_penalty": 2.0, "early_stopping": True}).beams is None


def test_rules_become_the_samplers() -> None:
    config = {
        "min_length": 8, "no_repeat_ngram_size": 3, "suppress_tokens": [4, 900], "begin_suppress_tokens": [6],
        "forced_bos_token_id": 7, "forced_eos_token_id": [2], "bad_words_ids": [[9], [2], [3, 4]],
    }  # fmt: skip
    options = resolve(config)
    assert not options.in_python and options.beams is None
    params = options.for_row(0, prompt_tokens=5, limit=10)
    assert (params.min_length, params.no_repeat_ngram_size, params.suppress_tokens) == (8, 3, (4,))
    assert params.begin_suppress_tokens == ((5, (6,)),)
    assert params.forced_tokens == ((1, (7,)), (14, (2,)))
    assert params.sequence_bias == (((9,), -math.inf), ((3, 4), -math.inf))
    # A prompt of one token: the first new one is forced, so what must not begin begins behind it.
    assert options.for_row(0, prompt_tokens=1, limit=10).begin_suppress_tokens == ((2, (6,)),)
    assert resolve(config, min_new_tokens=4).for_row(0, 5, 10).min_length == 9
    assert resolve(config, ignore_eos=True).for_row(0, 5, 10).min_length == 0
    assert resolve({"max_length": 30}).new_tokens(10, 1000, prefix=16) == 20
    assert resolve().new_tokens(10, 50, prefix=16) == 24


def test_what_needs_python() -> None:
    for rare in ({"guidance_scale": 1.5}, {"encoder_repetition_penalty": 1.2}, {"exponential_decay_length_penalty": [3, 1.1]}):
        assert resolve(rare).in_python
    assert resolve({"do_sample": True, "typical_p": 0.9, "eta_cutoff": 1e-3, "epsilon_cutoff": 1e-3, "top_h": 0.5}).in_python
    assert not resolve({"typical_p": 1.0, "guidance_scale": 1, "encoder_no_repeat_ngram_size": 0, "eta_cutoff": 0.0}).in_python


def test_processors_come_in_transformers_order() -> None:
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    config = {
        "do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.2, "top_h": 0.5, "repetition_penalty": 1.2, "encoder_repetition_penalty": 1.3,
        "sequence_bias": [[[3], 1.5]],
        "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3, "min_length": 9, "forced_bos_token_id": 4,
        "forced_eos_token_id": 2, "remove_invalid_values": True, "exponential_decay_length_penalty": [5, 1.5],
        "suppress_tokens": [8], "begin_suppress_tokens": [9], "renormalize_logits": True,
    }  # fmt: skip
    options = resolve(config)
    found = options.controls.processors(options.for_row(0, 4, 6), 4, [5, 6, 7, 8], beams=False)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1))
    ids = torch.tensor([[5, 6, 7, 8]])
    generation = GenerationConfig(**config, max_length=10, eos_token_id=2)
    model._prepare_special_tokens(generation)
    theirs = model._get_logits_processor(generation, input_ids_seq_length=4, encoder_input_ids=ids, model_kwargs={})
    assert len(found) == len(theirs)
    for length in range(4, 10):
        tokens = np.random.default_rng(length).integers(3, 100, length)
        tokens[:4] = ids[0]
        scores = np.random.default_rng(length + 50).standard_normal(100).astype(np.float32) * 3
        expected = theirs(torch.from_numpy(tokens)[None], torch.from_numpy(scores.copy())[None])[0].numpy()
        np.testing.assert_allclose(apply(found, tokens, scores), expected, rtol=2e-6, atol=2e-6)


def test_bad_words_as_texts() -> None:
    codes = {"cat": [10], " cat": [11, 12], "dog": [13], " dog": [13]}
    options = GenerationDefaults({}, [2], 100, codes.__getitem__).resolve(1, {"bad_words": ["cat", [4, 5], "dog"]})
    assert [sequence for sequence, _ in options.controls.sequence_bias] == [(10,), (11, 12), (4, 5), (13,)]


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
            "num_beam_groups": 1,
            "diversity_penalty": 0.0,
            "prompt_lookup_num_tokens": 5,
        }
    )
