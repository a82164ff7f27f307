"""Inputs that are encoded in the background, and answers about the frames of a camera."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from session_pictures import noise

from vlm_edge_runtime import DeviceError, GenerationCancelled, ImageError, PromptError, load

ASK = "what is in the picture?"
SHORT = {"max_new_tokens": 4, "ignore_eos": True}


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("instructblip-llama", marks=pytest.mark.slow)])
def test_answers_are_those_of_inputs_given_at_once(name, session) -> None:
    vlm = session(name)
    expected = [vlm.generate(ASK, images=noise(seed), **SHORT) for seed in (1, 2)]
    vlm.clear_caches()
    ahead = [vlm.prefetch(noise(seed), instruction=ASK) for seed in (1, 2)]
    for one, right in zip(ahead, expected, strict=True):
        assert vlm.generate(ASK, images=one, **SHORT).tokens == right.tokens
        assert (vlm.stats.image_cache_misses, vlm.stats.image_cache_hits) == (0, 1)
        assert one.done
    assert vlm.generate(ASK, images=ahead[0], **SHORT).tokens == expected[0].tokens, "more than once"
    assert vlm.generate([ASK, ASK], images=[ahead[1], noise(1)], **SHORT)[0].tokens == expected[1].tokens


def test_features_are_kept_where_the_cache_keeps_none(built_bundle) -> None:
    with load(built_bundle("smolvlm", "cpu-fp32"), image_cache_bytes=0, prefix_cache=False) as vlm:
        ahead = vlm.prefetch([noise(1), noise(2)])
        expected = vlm.generate(ASK, images=[noise(1), noise(2)], **SHORT)
        before = len(vlm.graph_times()["vision_encoder"])
        assert vlm.generate(ASK, images=ahead, **SHORT).tokens == expected.tokens
        assert vlm.generate(ASK, images=[ahead], **SHORT).tokens == expected.tokens
        assert len(vlm.graph_times()["vision_encoder"]) == before
        for image, features in zip((noise(1), noise(2)), vlm.embed_image([ahead]), strict=True):
            np.testing.assert_array_equal(features, vlm.embed_image(image))


def test_conversations_and_messages_take_them(session) -> None:
    vlm = session("smolvlm")
    chat, plain = vlm.chat(**SHORT), vlm.chat(**SHORT)
    plain.send(ASK, noise(1))
    vlm.clear_caches()
    chat.send(ASK, vlm.prefetch(noise(1)))
    assert chat.messages == plain.messages
    part = {"type": "image", "image": vlm.prefetch(noise(2))}
    found = vlm.generate([{"role": "user", "content": [part, {"type": "text", "text": ASK}]}], **SHORT)
    assert found.tokens == vlm.generate(ASK, images=noise(2), **SHORT).tokens
    with pytest.raises(PromptError, match="holds one input"):
        part["image"] = vlm.prefetch([noise(2), noise(3)])
        vlm.generate([{"role": "user", "content": [part]}], **SHORT)


@pytest.mark.slow
def test_another_instruction_is_another_encoding(session) -> None:
    vlm = session("instructblip-llama")
    expected = vlm.generate("a cat?", images=noise(1), **SHORT)
    vlm.clear_caches()
    ahead = vlm.prefetch(noise(1), instruction=ASK)
    assert vlm.generate("a cat?", images=ahead, **SHORT).tokens == expected.tokens
    assert vlm.stats.image_cache_misses == 1


def test_errors_surface_where_it_is_used(session, built_bundle) -> None:
    vlm = session("smolvlm")
    ahead = vlm.prefetch("/nowhere/at/all.png")
    with pytest.raises(ImageError, match="nowhere"):
        vlm.generate(ASK, images=ahead, **SHORT)
    with pytest.raises(ImageError, match="nowhere"):
        vlm.stream(ASK, images=[noise(1), ahead])
    with pytest.raises(PromptError, match="takes no audio"):
        vlm.prefetch(np.zeros((3, 4), np.float32), kind="audio")
    with load(built_bundle("smolvlm", "cpu-fp32")) as other, pytest.raises(PromptError, match="another session"):
        vlm.generate(ASK, images=other.prefetch(noise(1)), **SHORT)
    assert vlm.generate(ASK, images=vlm.prefetch(noise(1)), **SHORT).tokens


def test_it_can_be_cancelled_and_closed(built_bundle) -> None:
    vlm = load(built_bundle("smolvlm", "cpu-fp32"))
    before = set(threading.enumerate())
    begun, go = threading.Event(), threading.Event()

    def slow():
        begun.set()
        go.wait()
        return noise(1)

    first = vlm._prefetcher.start("image", slow, wake=go.set)
    waiting = vlm.prefetch(noise(2))
    begun.wait()
    waiting.cancel()
    assert waiting.done
    with pytest.raises(GenerationCancelled, match="before they were encoded"):
        vlm.generate(ASK, images=waiting, **SHORT)
    assert not first.done
    first.cancel()
    with pytest.raises(GenerationCancelled):
        vlm.generate(ASK, images=first, **SHORT)
    ready = vlm.prefetch(noise(3))
    ready.media()
    ready.cancel()
    assert vlm.generate(ASK, images=ready, **SHORT).tokens, "what was ready stays so"
    begun.clear()
    go.clear()
    last, behind = vlm._prefetcher.start("image", slow, wake=go.set), vlm.prefetch(noise(4))
    begun.wait()
    vlm.close()
    vlm.close()
    assert last.done
    assert behind.done
    with pytest.raises(DeviceError, match="closed"):
        vlm.prefetch(noise(1))
    assert not set(threading.enumerate()) - before, "no thread is left"


def test_encoding_and_decoding_at_once_change_nothing(built_bundle) -> None:
    """With threads of their own and shared ones; answers and features are those of one after the other."""
    for threads, encoder_threads in ((1, 1), (2, 0)):
        with load(
            built_bundle("smolvlm", "cpu-fp32"), threads=threads, encoder_threads=encoder_threads, spin=False, prefix_cache=False
        ) as vlm:
            expected = [vlm.generate(ASK, images=noise(seed), max_new_tokens=20, ignore_eos=True).tokens for seed in range(6)]
            vlm.clear_caches()
            ahead = vlm.prefetch(noise(0))
            for seed in range(6):
                now, ahead = ahead, vlm.prefetch(noise(seed + 1))
                assert vlm.generate(ASK, images=now, max_new_tokens=20, ignore_eos=True).tokens == expected[seed]


def test_a_camera_is_answered_frame_by_frame(session) -> None:
    vlm = session("smolvlm")
    frames = [noise(seed) for seed in range(5)]
    expected = [vlm.generate(ASK, images=frame, **SHORT).tokens for frame in frames]
    vlm.clear_caches()
    with vlm.watch(iter(frames), ASK, drop=False, **SHORT) as seen:
        found = list(seen)
    assert [one.number for one in found] == list(range(5))
    assert [one.answer.tokens for one in found] == expected
    assert [one.frame for one in found] == frames
    assert all(one.stats.image_cache_misses == 0 for one in found)
    assert seen.dropped == 0
    assert list(vlm.watch([], ASK, **SHORT)) == []


def test_the_newest_frame_wins_and_others_are_counted(session) -> None:
    """Ten frames come while the first is being looked at: the next answer is about the last of them."""
    vlm = session("smolvlm")
    come, last = threading.Event(), threading.Event()

    def camera():
        yield noise(0)
        come.wait()
        for seed in range(1, 11):
            yield noise(seed)
        last.set()

    def answer():
        come.set()
        last.wait()
        return False

    class _Asked:
        is_set = staticmethod(answer)

    with vlm.watch(camera(), ASK, cancel=_Asked(), **SHORT) as seen:
        numbers = [one.number for one in seen]
    # Frame 1 may have been taken when it came, to be encoded in the background.
    assert numbers[0] == 0
    assert numbers[-1] == 10
    assert len(numbers) + seen.dropped == 11
    assert len(numbers) <= 3


def test_a_camera_that_fails_or_stops_ends_cleanly(session, built_bundle) -> None:
    def broken():
        yield noise(0)
        raise OSError("no signal")

    vlm = session("smolvlm")
    seen = vlm.watch(broken(), ASK, drop=False, **SHORT)
    assert next(seen).number == 0
    with pytest.raises(OSError, match="no signal"):
        next(seen)
    with pytest.raises(ImageError):
        list(vlm.watch(["/nowhere.png"], ASK, **SHORT))

    def silent():
        yield noise(0)
        threading.Event().wait()

    with vlm.watch(silent(), ASK, **SHORT) as seen:
        assert next(seen).number == 0
    with load(built_bundle("smolvlm", "cpu-fp32")) as other:
        seen = other.watch(silent(), ASK, **SHORT)
        assert next(seen).number == 0
    began = time.monotonic()
    with pytest.raises((GenerationCancelled, DeviceError, StopIteration)):
        next(seen)
    assert time.monotonic() - began < 60, "it does not hang"
