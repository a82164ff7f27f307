"""What `generate` and `stream` promise: batches, seeds, stop strings, streaming, kept prefixes and images."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from session_pictures import noise

ASK = "what is in the picture? describe this image, please."
NAMES = ["llava-llama", "smolvlm", "qwen2_vl"]


def test_one_by_one_or_as_a_batch(session) -> None:
    for name in NAMES:
        for build in ("cpu-fp32", "portable"):
            vlm = session(name, build)
            prompts = [ASK, "how many shapes are there?", "a photo of a cat", ASK]
            images = [noise(1), [noise(2), noise(3, 60, 60)], None, noise(4)]
            options = {"max_new_tokens": 8, "ignore_eos": True}
            batch = vlm.generate(prompts, images=images, **options)
            for prompt, own, row in zip(prompts, images, batch, strict=True):
                vlm.clear_caches()
                single = vlm.generate(prompt, images=own, **options)
                assert row.tokens == single.tokens, (name, build, prompt)
                assert (row.text, row.prompt_tokens) == (single.text, single.prompt_tokens)


def test_rows_end_by_themselves(session) -> None:
    """One row meets a stop string at once, the others go on as if it were not there."""
    vlm = session("llava-llama")
    alone = [vlm.generate(ASK, images=noise(seed), max_new_tokens=12, ignore_eos=True) for seed in (1, 2)]
    stop = alone[0].text[:2]
    assert stop
    assert stop not in alone[1].text
    rows = vlm.generate([ASK, ASK], images=[noise(1), noise(2)], max_new_tokens=12, ignore_eos=True, stop=stop)
    assert (rows[0].text, rows[0].finish_reason) == ("", "stop_string")
    assert (rows[1].tokens, rows[1].finish_reason) == (alone[1].tokens, "length")


def test_pieces_join_to_the_answer(session) -> None:
    for name in NAMES:
        vlm = session(name)
        whole = vlm.generate(ASK, images=noise(5), max_new_tokens=20, ignore_eos=True)
        stream = vlm.stream(ASK, images=noise(5), max_new_tokens=20, ignore_eos=True)
        assert stream.finish_reason is None
        pieces = list(stream)
        assert "".join(pieces) == whole.text == stream.result.text
        assert stream.result.tokens == whole.tokens
        assert stream.finish_reason == "length"
        assert stream.stats.new_tokens == 20
        assert all(pieces)


def test_seeds(session) -> None:
    vlm = session("llava-llama")
    options = {"images": noise(6), "max_new_tokens": 12, "temperature": 2.0, "ignore_eos": True}
    first = vlm.generate(ASK, seed=1, **options)
    assert vlm.generate(ASK, seed=1, **options).tokens == first.tokens
    assert vlm.generate(ASK, seed=2, **options).tokens != first.tokens
    drawn = vlm.generate(ASK, **options)
    assert vlm.generate(ASK, seed=drawn.seed, **options).tokens == drawn.tokens
    rows = vlm.generate(["a cat", ASK], **{**options, "images": [None, noise(6)]}, seed=[5, 1])
    assert rows[1].tokens == first.tokens  # its neighbours do not matter
    assert [row.seed for row in rows] == [5, 1]


def test_stop_strings_cut_the_text_and_the_cache(session) -> None:
    vlm = session("llava-llama")
    image = noise(7)
    free = vlm.generate(ASK, images=image, max_new_tokens=16, ignore_eos=True)
    stop = free.text[4:7]
    cut = free.text[: free.text.index(stop)]
    vlm.clear_caches()
    stopped = vlm.generate(ASK, images=image, max_new_tokens=16, ignore_eos=True, stop=["nowhere", stop])
    assert (stopped.text, stopped.finish_reason) == (cut, "stop_string")
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    (kept,) = vlm._parts.kept._kept
    held = kept.contents[0][stopped.prompt_tokens :].tolist()
    assert held == stopped.tokens[: len(held)]
    assert cut.startswith(vlm._parts.prompts.tokenizer.decode(held))
    shown = ""
    for piece in vlm.stream(ASK, images=image, max_new_tokens=16, ignore_eos=True, stop=stop):
        shown += piece
        assert cut.startswith(shown)
    assert shown == cut


def _distribution(generation) -> np.ndarray:
    """Log probabilities float64 [tokens, vocab] in the order of token ids."""
    return np.asarray([[logprob for _, logprob in sorted(row)] for row in generation.top_logprobs])


@pytest.mark.parametrize("build", ["cpu-fp32", "portable"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kept_prefix_changes_nothing(name, build, session) -> None:
    vlm = session(name, build)
    vocabulary = vlm.manifest.contract.vocab_size
    options = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": vocabulary}
    asked = [([noise(1), noise(2)], "how many shapes are there?"), ([noise(1), noise(3)], "how many shapes are there?")]
    asked += [([noise(1), noise(2)], "how many shapes are there in the picture?"), ([noise(1)], "a cat")]
    fresh = []
    for images, text in asked:
        vlm.clear_caches()
        fresh.append(vlm.generate(text, images=images, **options))
        assert vlm.stats.reused_tokens == 0
    vlm.clear_caches()
    for (images, text), expected in zip(asked + asked[::-1], fresh + fresh[::-1], strict=True):
        got = vlm.generate(text, images=images, **options)
        assert got.tokens == expected.tokens
        np.testing.assert_allclose(_distribution(got), _distribution(expected), rtol=0, atol=1e-4)
    assert vlm.stats.reused_tokens > 0
    rows = vlm.generate([text for _, text in asked], images=[images for images, _ in asked], **options)
    assert vlm.stats.prefix_cache_hits == 4
    for got, expected in zip(rows, fresh, strict=True):
        assert got.tokens == expected.tokens
        np.testing.assert_allclose(_distribution(got), _distribution(expected), rtol=0, atol=1e-4)


def test_another_image_is_not_the_same_prefix(session) -> None:
    vlm = session("llava-llama")
    vlm.generate(ASK, images=noise(1), max_new_tokens=2)
    vlm.generate(ASK, images=noise(2), max_new_tokens=2)
    before = len(vlm._parts.prompts.tokenizer.encode("USER: "))
    assert vlm.stats.reused_tokens <= before  # nothing beyond the image's first token
    vlm.generate(ASK, images=noise(1).copy(), max_new_tokens=2)
    assert vlm.stats.reused_tokens == vlm.stats.prompt_tokens - 1


def test_prefix_cache_can_be_off(built_bundle) -> None:
    from vlm_edge_runtime import load

    path = built_bundle("llava-llama", "cpu-fp32")
    with load(path, prefix_cache=False, image_cache_bytes=0) as vlm:
        first = vlm.generate(ASK, images=noise(1), max_new_tokens=4)
        again = vlm.generate(ASK, images=noise(1), max_new_tokens=4)
        assert (vlm.stats.reused_tokens, vlm.stats.image_cache_misses, vlm.memory()["prefix_cache"]) == (0, 1, 0)
        assert first.tokens == again.tokens


def test_images_are_encoded_once(session) -> None:
    vlm = session("llava-llama")
    vlm.embed_image(noise(0))  # loads the graphs
    before = len(vlm.graph_times()["vision_encoder"])
    image = noise(1)
    vlm.generate("what?", images=[image, image, noise(2)], max_new_tokens=1)
    assert (vlm.stats.image_cache_hits, vlm.stats.image_cache_misses) == (1, 2)
    vlm._parts.kept.clear()
    vlm.generate("the sea", images=[image.copy()], max_new_tokens=1)
    assert (vlm.stats.image_cache_hits, vlm.stats.image_cache_misses) == (1, 0)
    assert vlm.stats.reused_tokens == 0
    assert len(vlm.graph_times()["vision_encoder"]) == before + 1  # both in one call
    assert vlm.memory()["image_cache"] > 0


def test_embed_image_gives_what_the_decoder_sees(session) -> None:
    for name in NAMES:
        vlm = session(name)
        tokens = vlm.generate("a", images=noise(3), max_new_tokens=1) and vlm.stats.image_tokens
        features = vlm.embed_image(noise(3))
        assert features.shape == (tokens, vlm.manifest.contract.hidden_size)
        assert features.dtype == np.float32
        several = vlm.embed_image([noise(3), noise(4)])
        np.testing.assert_array_equal(several[0], features)
        vlm.clear_caches()
        np.testing.assert_allclose(vlm.embed_image([noise(4), noise(3)])[1], features, rtol=0, atol=1e-5)
        features[:] = 0  # a copy: the cache is not touched
        assert np.abs(vlm.embed_image(noise(3))).max() > 0


def test_stats_and_counters(session) -> None:
    vlm = session("llava-llama")
    calls = vlm.counters.calls
    answer = vlm.generate(ASK, images=noise(8), max_new_tokens=9, ignore_eos=True)
    stats = vlm.stats
    assert (stats.new_tokens, stats.steps, stats.rows, stats.prompt_tokens) == (9, 9, 1, answer.prompt_tokens)
    assert stats.prefill_tokens + stats.reused_tokens == stats.prompt_tokens
    assert stats.image_tokens == 16
    assert stats.ttft_s > 0
    assert stats.tpot_s > 0
    assert stats.decode_tps == pytest.approx(1 / stats.tpot_s)
    assert set(stats.to_dict()) >= {"ttft_s", "tpot_s", "vision_s", "prefill_tps", "decode_tps", "reused_tokens"}
    assert vlm.counters.calls == calls + 1


def test_a_dropped_stream_gives_back_what_it_held(session) -> None:
    vlm = session("llava-llama")
    for drop in ("close", "delete", "with"):
        vlm.clear_caches()
        stream = vlm.stream(ASK, images=noise(1), max_new_tokens=200, ignore_eos=True)
        next(stream)
        assert len(vlm._active) == 1
        assert not vlm._parts.kept._kept
        if drop == "close":
            stream.close()
            assert stream.finish_reason == "cancelled"
        elif drop == "with":
            with stream:
                pass
        else:
            del stream
            gc.collect()
        assert not vlm._active
        assert vlm.memory()["prefix_cache"] > 0  # its KV cache is there for the next prompt
        vlm.generate(ASK, images=noise(1), max_new_tokens=2)
        assert vlm.stats.reused_tokens == vlm.stats.prompt_tokens - 1


def test_streams_may_be_open_side_by_side(session) -> None:
    vlm = session("llava-llama")
    options = {"max_new_tokens": 12, "ignore_eos": True}
    expected = [vlm.generate(ASK, images=noise(seed), **options).text for seed in (1, 2)]
    streams = [vlm.stream(ASK, images=noise(seed), **options) for seed in (1, 2)]
    texts = ["", ""]
    for _ in range(3):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    between = vlm.generate(ASK, images=noise(1), **options)
    for number, stream in enumerate(streams):
        texts[number] += "".join(stream)
    assert texts == expected
    assert between.text == expected[0]


def test_a_cache_that_must_grow(built_bundle, monkeypatch) -> None:
    """Where the whole context would take too much memory, a longer turn moves into a larger cache."""
    from dataclasses import replace

    from vlm_edge_runtime import load
    from vlm_edge_runtime.sessions import kv_plan

    monkeypatch.setattr(kv_plan, "BUCKET", 32)
    with load(built_bundle("llava-llama", "cpu-fp32")) as vlm:
        expected = [vlm.generate(ASK * times, images=noise(1), max_new_tokens=4).tokens for times in (1, 3)]
        vlm.clear_caches()
        vlm._parts = replace(vlm._parts, plan=replace(vlm._parts.plan, budget=0))
        capacities = []
        for times, tokens in zip((1, 3), expected, strict=True):
            assert vlm.generate(ASK * times, images=noise(1), max_new_tokens=4).tokens == tokens
            capacities.append(vlm._parts.kept._kept[-1].state.capacity)
        assert capacities[0] < capacities[1] < vlm.context_length
        assert vlm.stats.reused_tokens > 16
