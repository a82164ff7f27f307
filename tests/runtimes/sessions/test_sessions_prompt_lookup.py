"""Prompt lookup in whole answers: the same text, tokens and log probabilities as without it, on the trained models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from session_pictures import noise

from vlm_edge_runtime import CapabilityError, GenerationCancelled, OptionError, VisionLanguageModel, load

ASK = "what do you see?"
AGAIN = "red circle, blue square. red circle, blue square. red circle, blue square. red circle,"
LOOKUP = {"prompt_lookup_num_tokens": 8}
FREE = {"temperature": 0.0, "ignore_eos": True}
MODELS = [
    "tiny-smolvlm",
    "tiny-llava",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny-paligemma", "tiny-minigpt_v2", "tiny-visual_gpt")),
]


@pytest.fixture(scope="module")
def native(portable_bundle, tmp_path_factory) -> Iterator[Callable[[str], VisionLanguageModel]]:
    """`native(name)` → a session over the model's 4-bit build, native kernels where its decoder has them, with empty caches."""
    from vlm_edge.targets import load_target
    from vlm_edge.targets.build import build

    root, opened = tmp_path_factory.mktemp("lookup"), {}

    def make(name: str) -> VisionLanguageModel:
        if name not in opened:
            path: Path = root / f"{name}.vlm"
            shutil.copytree(portable_bundle(name), path)
            target = load_target("cpu-int4")
            build(path, msgspec.structs.replace(target, options=msgspec.structs.replace(target.options, kernels="native")))
            opened[name] = load(path, build="cpu-int4")
        opened[name].clear_caches()
        return opened[name]

    yield make
    for session in opened.values():
        session.close()


def same(found, expected) -> None:
    assert found.tokens == expected.tokens
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    assert found.logprobs == expected.logprobs, "the same bits"
    assert found.top_logprobs == expected.top_logprobs


def both(vlm, *args, **options):
    """The answers without and with drafts, from empty caches; and the statistics of the latter."""
    vlm.clear_caches()
    plain = vlm.generate(*args, **options)
    assert (vlm.stats.drafted_tokens, vlm.stats.accepted_tokens) == (0, 0)
    steps = vlm.stats.steps
    vlm.clear_caches()
    found = vlm.generate(*args, **options, **LOOKUP)
    stats = vlm.stats
    assert stats.accepted_tokens <= stats.drafted_tokens
    if not isinstance(plain, list):
        assert stats.steps == steps - stats.accepted_tokens
    return plain, found, stats


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_without_it(name, native) -> None:
    vlm = native(name)
    new = 30 if name == "tiny-visual_gpt" else 70  # its positions end at 64
    accepted = 0
    for images in (noise(1), noise(2)):
        for prompt in (ASK, AGAIN, "how many circles are there?"):
            for options in ({"temperature": 0.0}, {**FREE, "max_new_tokens": new, "logprobs": 2}):
                plain, found, stats = both(vlm, prompt, images, **options)
                same(found, plain)
                accepted += stats.accepted_tokens
    assert accepted > 50, "nothing was drafted: this shows nothing"
    assert vlm.counters.accepted_tokens >= accepted


def test_an_answer_may_end_anywhere_in_a_draft(native) -> None:
    """Every length, a stop string at every place, and every token as the end of the sequence."""
    vlm = native("tiny-smolvlm")
    whole, _, stats = both(vlm, AGAIN, noise(3), **FREE, max_new_tokens=60)
    assert stats.accepted_tokens > 10
    for limit in (1, 2, *range(20, 34)):
        plain, found, stats = both(vlm, AGAIN, noise(3), **FREE, max_new_tokens=limit)
        same(found, plain)
        assert stats.new_tokens == limit
        assert (found.tokens, found.finish_reason) == (whole.tokens[:limit], "length")
    for start in range(3, len(whole.text) - 4, 17):
        plain, found, _ = both(vlm, AGAIN, noise(3), **FREE, max_new_tokens=60, stop=whole.text[start : start + 4])
        same(found, plain)
        assert found.finish_reason == "stop_string"
    defaults = vlm._parts.defaults
    kept = defaults.eos_token_ids
    try:
        for token in sorted(set(whole.tokens)):
            defaults.eos_token_ids = (token,)
            plain, found, _ = both(vlm, AGAIN, noise(3), temperature=0.0, max_new_tokens=60)
            same(found, plain)
            assert found.finish_reason == "stop"
    finally:
        defaults.eos_token_ids = kept


def test_pieces_come_in_order(native) -> None:
    vlm = native("tiny-smolvlm")
    options = {**FREE, "max_new_tokens": 60}
    whole = vlm.generate(AGAIN, noise(3), **options)
    vlm.clear_caches()
    with vlm.stream(AGAIN, noise(3), **options, **LOOKUP) as stream:
        shown = ""
        for piece in stream:
            shown += piece
            assert whole.text.startswith(shown)
        assert shown == whole.text
        assert stream.result.tokens == whole.tokens
        assert stream.stats.steps + stream.stats.accepted_tokens == 60


def test_rows_of_a_batch_accept_as_many_as_each_can(native) -> None:
    vlm = native("tiny-smolvlm")
    prompts, images = [ASK, AGAIN, "the the the the", AGAIN], [noise(1), noise(3), None, noise(4)]
    plain, found, stats = both(vlm, prompts, images, **FREE, max_new_tokens=40, logprobs=1)
    for one, expected in zip(found, plain, strict=True):
        same(one, expected)
    assert stats.accepted_tokens > 10
    stop = plain[1].text[5:8]
    plain, found, _ = both(vlm, prompts, images, temperature=0.0)
    for one, expected in zip(found, plain, strict=True):
        same(one, expected)
    plain, found, _ = both(vlm, prompts, images, **FREE, max_new_tokens=40, stop=stop)
    for one, expected in zip(found, plain, strict=True):
        same(one, expected)


def test_what_is_kept_of_an_answer_is_what_was_said(native) -> None:
    """Later turns take over the entries of accepted tokens, and none of refused ones."""
    vlm = native("tiny-smolvlm")
    texts: dict[bool, list[str]] = {}
    reused: dict[bool, list[int]] = {}
    for lookup in (False, True):
        vlm.clear_caches()
        chat = vlm.chat(temperature=0.0, max_new_tokens=30, **(LOOKUP if lookup else {}))
        texts[lookup], reused[lookup] = [], []
        for number, ask in enumerate((ASK, "how many circles are there?", ASK)):
            texts[lookup].append(chat.send(ask, noise(5) if number == 0 else None).text)
            reused[lookup].append(vlm.stats.reused_tokens)
    assert texts[True] == texts[False]
    assert reused[True] == reused[False]
    assert reused[True][2] > reused[True][1] > 8
    (kept,) = vlm._parts.kept._kept
    assert len(kept.contents[0]) == kept.state.lengths[0]


def test_rules_and_penalties_are_kept(native) -> None:
    vlm = native("tiny-smolvlm")
    rules = [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 4}, {"min_new_tokens": 30}, {"bad_words": ["circle"]}]
    for rule in rules:
        plain, found, _ = both(vlm, AGAIN, noise(3), temperature=0.0, max_new_tokens=40, **rule)
        same(found, plain)


def test_the_end_of_the_context(native) -> None:
    vlm = native("tiny-smolvlm")
    prompt = vlm.prepare(AGAIN, noise(3))
    with load(vlm.path, build="cpu-int4", context_length=len(prompt.token_ids) + 23) as short:
        plain, found, stats = both(short, AGAIN, noise(3), **FREE, max_new_tokens=23)
        same(found, plain)
        assert (stats.new_tokens, found.finish_reason) == (23, "length")
        assert stats.accepted_tokens


def test_it_can_be_cancelled(native) -> None:
    vlm = native("tiny-smolvlm")
    whole = vlm.generate(AGAIN, noise(3), **FREE, max_new_tokens=60)
    asked = 0

    class _After:
        def is_set(self) -> bool:
            nonlocal asked
            asked += 1
            return asked > 9

    vlm.clear_caches()
    with pytest.raises(GenerationCancelled) as cancelled:
        vlm.generate(AGAIN, noise(3), **FREE, max_new_tokens=60, cancel=_After(), **LOOKUP)
    assert cancelled.value.partial_text
    assert whole.text.startswith(cancelled.value.partial_text)
    # Beside kept tokens the prompt's last one is a block by itself, whose attention rounds otherwise than in `whole`.
    kept = vlm.generate(AGAIN, noise(3), **FREE, max_new_tokens=60)
    assert vlm.stats.reused_tokens > 8
    same(vlm.generate(AGAIN, noise(3), **FREE, max_new_tokens=60, **LOOKUP), kept)
    assert vlm.stats.reused_tokens > 8


def test_where_it_cannot_be_had(native, portable_bundle) -> None:
    vlm = native("tiny-smolvlm")
    with pytest.raises(OptionError, match="sampling"):
        vlm.generate(ASK, noise(1), temperature=0.7, **LOOKUP)
    with load(portable_bundle("tiny-smolvlm"), build="portable") as portable:
        with pytest.raises(CapabilityError, match="--target cpu-int4"):
            portable.generate(ASK, noise(1), **LOOKUP)
        # In the bundle's file it is a wish for speed.
        portable._parts.defaults._config["prompt_lookup_num_tokens"] = 5
        assert portable.generate(ASK, noise(1), max_new_tokens=2).tokens
        assert portable.stats.drafted_tokens == 0
    vlm._parts.defaults._config["prompt_lookup_num_tokens"] = 5
    try:
        vlm.generate(AGAIN, noise(3), **FREE, max_new_tokens=40)
        assert vlm.stats.accepted_tokens > 0
        vlm.generate(AGAIN, noise(3), **FREE, max_new_tokens=40, prompt_lookup_num_tokens=0)
        assert vlm.stats.drafted_tokens == 0
    finally:
        del vlm._parts.defaults._config["prompt_lookup_num_tokens"]
