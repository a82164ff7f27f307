"""Conversations, and one clear error for each bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from session_pictures import noise

from vlm_edge_runtime import (
    CapabilityError,
    ContextLengthError,
    DeviceError,
    GenerationCancelled,
    ImageError,
    OptionError,
    PromptError,
    TargetError,
    load,
)

ASK = "what is in the picture?"
SHORT = {"max_new_tokens": 5, "ignore_eos": True}


# --- conversations ---


@pytest.mark.parametrize("name", ["llava-llama", "smolvlm", "qwen2_vl"])
def test_turns_reuse_what_earlier_turns_left(name, session) -> None:
    vlm = session(name)
    talk = vlm.chat(**SHORT)
    first = talk.send(ASK, images=noise(1))
    stats = vlm.stats
    assert stats.reused_tokens == 0
    before = stats.prompt_tokens
    second = talk.send("how many shapes are there?")
    assert vlm.stats.reused_tokens >= before - 1
    assert vlm.stats.image_cache_misses == 0
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user", "assistant"]
    assert talk.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": ASK}]
    assert talk.messages[1]["content"] == [{"type": "text", "text": first.text}]
    third = "".join(talk.stream("and this one?", images=[noise(2)]))
    assert talk.messages[-1]["content"][0]["text"] == third
    # The same messages without any cache give the same answers.
    messages = talk.messages
    vlm.clear_caches()
    assert vlm.generate(messages[:3], images=[noise(1)], **SHORT).text == second.text
    assert vlm.generate(messages[:5], images=[noise(1), noise(2)], **SHORT).text == third


def test_a_conversation_has_a_system_prompt_and_options_for_each_turn(session) -> None:
    vlm = session("llava-llama")
    talk = vlm.chat("describe this image, please.", **SHORT)
    assert len(talk.send("a cat", max_new_tokens=2).tokens) == 2
    assert talk.messages[0]["role"] == "system"
    talk.reset()
    assert [message["role"] for message in talk.messages] == ["system"]


def test_a_turn_that_fails_leaves_no_trace_and_one_that_is_ended_keeps_its_text(session) -> None:
    vlm = session("llava-llama")
    talk = vlm.chat(**SHORT)
    with pytest.raises(ImageError):
        talk.send(ASK, images="no-such-file.png")
    with pytest.raises(ContextLengthError):
        talk.send("a cat " * 300)
    assert talk.messages == []
    stream = talk.stream(ASK, images=noise(1))
    first = next(stream)
    stream.close()
    assert talk.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": first}]}
    unused = talk.stream("a dog")
    del unused
    assert len(talk.messages) == 2


def test_messages_may_carry_their_images(session, tmp_path) -> None:
    vlm = session("llava-llama")
    path = tmp_path / "picture.png"
    noise(1).save(path)
    text = {"type": "text", "text": ASK}
    with_image = [{"role": "user", "content": [{"type": "image", "image": noise(1)}, text]}]
    with_path = [{"role": "user", "content": [{"type": "image", "path": str(path)}, text]}]
    expected = vlm.generate(ASK, images=noise(1), **SHORT).tokens
    assert vlm.generate(with_image, **SHORT).tokens == expected
    assert vlm.generate(with_path, **SHORT).tokens == expected
    assert [row.tokens for row in vlm.generate([with_image, with_path], **SHORT)] == [expected, expected]


# --- bad input ---


def test_too_long(session) -> None:
    vlm = session("llava-llama")
    with pytest.raises(ContextLengthError) as long:
        vlm.generate("a cat " * 200, images=noise(1), max_new_tokens=7)
    message = str(long.value)
    assert "16 of them from 1 image" in message
    assert "7 new ones" in message
    assert "256" in message
    with pytest.raises(ContextLengthError, match="max_new_tokens"):
        vlm.generate(ASK, images=noise(1), max_new_tokens=250)
    with pytest.raises(ContextLengthError, match="prompt 2 of 2"):
        vlm.generate(["a", "a cat " * 200])
    with pytest.raises(ContextLengthError):
        vlm.stream("a cat " * 200)  # at once, not with the first piece
    assert vlm.generate(ASK, images=noise(1), **SHORT).tokens


def test_a_smaller_context_says_so(portable_bundle) -> None:
    with load(portable_bundle("llava-llama"), build="portable", context_length=40) as vlm:
        assert vlm.context_length == 40
        with pytest.raises(ContextLengthError, match="context_length of up to 256"):
            vlm.generate(ASK, images=noise(1), max_new_tokens=30)
        full = vlm.generate(ASK, images=noise(1), ignore_eos=True, ignore_config=["max_new_tokens"])
        assert full.prompt_tokens + len(full.tokens) == 40
        assert full.finish_reason == "length"
        # Rows of a batch reach the end of the context at different times.
        rows = vlm.generate([ASK, "a"], images=[noise(1), None], ignore_eos=True, ignore_config=["max_new_tokens"])
        assert rows[0].tokens == full.tokens
        assert [row.prompt_tokens + len(row.tokens) for row in rows] == [40, 40]
        assert rows[1].tokens == vlm.generate("a", ignore_eos=True, ignore_config=["max_new_tokens"]).tokens
    for wrong in (0, 257):
        with pytest.raises(OptionError, match="2 … 256"):
            load(portable_bundle("llava-llama"), build="portable", context_length=wrong)


def test_images_and_placeholders(session) -> None:
    vlm = session("llava-llama")
    for prompt, images in (
        ("<image> and <image>", [noise(1)]),
        ("<image>", [noise(1), noise(2)]),
        ("<image>", None),
    ):
        with pytest.raises(PromptError, match="placeholder"):
            vlm.generate(prompt, images=images)
    with pytest.raises(PromptError, match="placeholder"):
        vlm.generate(ASK, images=noise(1), raw=True)
    with pytest.raises(PromptError, match="more image parts"):
        vlm.generate([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(PromptError, match="one entry for each prompt"):
        vlm.generate([ASK, ASK], images=[noise(1)])
    with pytest.raises(PromptError, match="one entry for each prompt"):
        vlm.generate([ASK, ASK], images=noise(1))
    for nothing in ([], "", 7, [ASK, 7]):
        with pytest.raises(PromptError):
            vlm.generate(nothing, raw=True)
    with pytest.raises(PromptError, match="role"):
        vlm.generate([{"content": "x"}])
    with pytest.raises(ImageError):
        vlm.generate(ASK, images=b"not an image")


def test_options_are_checked_before_anything_runs(session) -> None:
    vlm = session("llava-llama")
    calls = vlm.counters.calls
    with pytest.raises(OptionError, match=r"top_p.*\(0, 1\]"):
        vlm.generate(ASK, temperature=1.0, top_p=2.0)
    with pytest.raises(OptionError, match="unknown generation option"):
        vlm.stream(ASK, beams=3)
    assert vlm.counters.calls == calls


def test_methods_of_another_family(session, portable_bundle) -> None:
    vlm = session("llava-llama")
    with pytest.raises(CapabilityError, match=r"no similarity\(\); it has: generate\(\), stream\(\), chat\(\)"):
        vlm.similarity(noise(1), "a cat")
    with pytest.raises(AttributeError) as plain:
        vlm.no_such_thing  # noqa: B018
    assert not isinstance(plain.value, CapabilityError)
    assert not hasattr(vlm, "classify")
    with load(portable_bundle("clip"), build="portable") as clip, pytest.raises(CapabilityError, match=r"classify\(\)"):
        clip.generate(ASK)


def test_no_template_no_conversation(portable_bundle, tmp_path) -> None:
    folder = tmp_path / "bare.vlm"
    shutil.copytree(portable_bundle("llava-llama"), folder)
    (folder / "chat_template.jinja").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = [ref for ref in manifest["files"] if ref["file"] != "chat_template.jinja"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with load(folder, build="portable") as vlm:
        with pytest.raises(PromptError, match="no chat template"):
            vlm.chat()
        with pytest.raises(PromptError, match="placeholder"):
            vlm.generate(ASK, images=noise(1), raw=True)
        spelled = vlm.generate(f"<image>{ASK}", images=noise(1), **SHORT)
        assert vlm.generate(ASK, images=noise(1), **SHORT).tokens == spelled.tokens  # by the contract's prompt format


def test_closed(portable_bundle) -> None:
    vlm = load(portable_bundle("llava-llama"), build="portable")
    stream = vlm.stream(ASK, images=noise(1))
    running = vlm.stream(ASK, images=noise(1), max_new_tokens=100, ignore_eos=True)
    next(running)
    vlm.close()
    vlm.close()
    assert list(running) == []
    assert running.finish_reason == "cancelled"
    for call in (lambda: vlm.generate(ASK), lambda: next(stream), lambda: vlm.embed_image(noise(1)), vlm.chat):
        with pytest.raises(DeviceError, match="closed"):
            call()


# --- load ---


def test_which_build_is_taken(built_bundle, portable_bundle) -> None:
    path = portable_bundle("llava-llama")
    with pytest.raises(TargetError, match=r"only portable graphs.*vlm-edge build .*build='portable'"):
        load(path)
    with pytest.raises(TargetError, match="no build 'cpu-int2'"):
        load(path, build="cpu-int2")
    with pytest.raises(TargetError, match=r"only portable graphs.*vlm-edge build .* --target cuda-desktop"):
        load(path, device="cuda")
    with pytest.raises(DeviceError, match="toaster"):
        load(path, device="toaster")
    for device in ("cuda", "toaster"):
        with pytest.raises(DeviceError, match=device):
            load(path, device=device, build="portable")
    with load(built_bundle("llava-llama", "cpu-fp32"), device="cpu") as vlm:
        assert vlm.build_name == "cpu-fp32"
        assert vlm.build is not None
        memory = vlm.memory()
        assert memory["weights"] > 0
        assert memory["kv_capacity"] == 256 * memory["kv_per_token"] == 256 * 2 * 2 * 2 * 16 * 4
    with pytest.raises(OptionError, match="threads"):
        load(path, build="portable", threads=-1)
    with pytest.raises(OptionError, match="context_length"):
        load(portable_bundle("clip"), build="portable", context_length=16)


def test_a_configuration_that_asks_for_more_is_refused_when_generating(portable_bundle, tmp_path) -> None:
    folder = tmp_path / "contrastive.vlm"
    shutil.copytree(portable_bundle("llava-llama"), folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "penalty_alpha": 0.6}))
    manifest = json.loads((folder / "manifest.json").read_text())
    for ref in manifest["files"]:
        if ref["file"] == file.name:
            ref["bytes"] = file.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with load(folder, build="portable", verify=False) as vlm:
        with pytest.raises(OptionError, match=r"penalty_alpha = 0\.6"):
            vlm.generate(ASK)
        assert vlm.generate(ASK, ignore_config=["penalty_alpha"], **SHORT).tokens


def test_cancelled_error_is_a_plain_error() -> None:
    error = GenerationCancelled("cancelled", "so far")
    assert (str(error), error.partial_text) == ("cancelled", "so far")


def test_arrays_and_bytes_are_images(session, tmp_path) -> None:
    vlm = session("llava-llama")
    path = tmp_path / "picture.png"
    noise(1).save(path)
    expected = vlm.generate(ASK, images=noise(1), **SHORT).tokens
    for image in (np.asarray(noise(1)), path, str(path), path.read_bytes()):
        assert vlm.generate(ASK, images=image, **SHORT).tokens == expected
        assert vlm.generate(ASK, images=[image], **SHORT).tokens == expected
