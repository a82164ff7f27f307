"""Encoding, decoding, batches and streaming, on several kinds of tokenizers, against transformers."""

from __future__ import annotations

import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vlm_edge_runtime.errors import BundleError, PromptError
from vlm_edge_runtime.text import StreamDecoder, Tokenizer, load_tokenizer

KINDS = ["byte-level", "llama", "metaspace", "word-piece", "clip", "tiny-llava", "tiny-smolvlm", "tiny-clip"]
TEXTS = [
    "",
    "A red circle.",
    " leading and trailing ",
    "  two  spaces\n\nand lines\t",
    "Don't you say it isn't ' there ' , they 've said !",
    "grüner Kreis 二つの青い四角 🙂🚀👩‍👩‍👧 Привет",
    "<s>spelt out</s><image>\n<image> x",
    "\N{REPLACEMENT CHARACTER} literally",
    "e\u0301 combining",
]


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tokenizer_folders: dict[str, Path]) -> Path:
    return tokenizer_folders[request.param]


@cache
def loaded(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@cache
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_encode_and_decode(folder: Path) -> None:
    ours, theirs = loaded(folder), reference(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens(folder: Path) -> None:
    ours, theirs = loaded(folder), reference(folder)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert len(ours) == len(theirs)
    assert ours.token_id("no such token") is None


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("length", [5, 16])
def test_batches(folder: Path, padding: Any, length: int) -> None:
    texts = ["A red circle", "The quick brown fox jumps over 13 lazy dogs, doesn't it?", "x"]
    batch = loaded(folder).encode_batch(texts, padding, length)
    expected = reference(folder)(texts, padding=padding, max_length=length, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(batch.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(batch.attention_mask, expected["attention_mask"])
    assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_are_the_decoded_whole(kind: str, data: st.DataObject, tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = loaded(tokenizer_folders[kind])
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=30)
    if tokenizer.byte_fallback_ids:
        of_bytes = st.sampled_from(sorted(tokenizer.byte_fallback_ids))
        ids = ids | st.lists(of_bytes | st.integers(0, len(tokenizer) - 1), max_size=30)
    text = st.text(max_size=12) | st.sampled_from(TEXTS)
    pieces = st.lists(ids | text.map(lambda value: tokenizer.encode(value, add_special_tokens=False)), max_size=4)
    check_stream(tokenizer, [token for piece in data.draw(pieces) for token in piece], data.draw(st.booleans()))


def check_stream(tokenizer: Tokenizer, tokens: list[int], skip: bool) -> None:
    whole = tokenizer.decode(tokens, skip_special_tokens=skip)
    stream = tokenizer.stream(skip_special_tokens=skip)
    shown = ""
    for token in tokens:
        shown += stream.push(token)
        assert whole.startswith(shown)
    assert shown + stream.flush() == whole
    again = tokenizer.stream(skip_special_tokens=skip)
    assert again.extend(tokens) + again.flush() == whole


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_streamed_texts(folder: Path, text: str, skip: bool) -> None:
    tokenizer = loaded(folder)
    check_stream(tokenizer, tokenizer.encode(text) + tokenizer.encode(text), skip)


@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace"])
def test_plain_text_is_shown_at_once(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = loaded(tokenizer_folders[kind])
    stream = tokenizer.stream()
    tokens = tokenizer.encode("The quick brown fox jumps over the square", add_special_tokens=False)
    pieces = [stream.push(token) for token in tokens]
    assert all(pieces)
    assert stream.flush() == ""


def test_emoji_come_whole(tokenizer_folders: dict[str, Path]) -> None:
    for kind in ("byte-level", "llama", "metaspace", "tiny-llava"):
        if kind in tokenizer_folders:
            tokenizer = loaded(tokenizer_folders[kind])
            stream = tokenizer.stream()
            pieces = [stream.push(token) for token in tokenizer.encode("a 🚀🙂 b")] + [stream.flush()]
            assert "".join(pieces) == "a 🚀🙂 b"
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_unfinished_character_is_marked_at_the_end(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = loaded(tokenizer_folders["byte-level"])
    tokens = tokenizer.encode("ok 👩", add_special_tokens=False)[:-1]
    stream = tokenizer.stream()
    assert stream.extend(tokens).rstrip() == "ok"
    assert stream.flush().endswith("\N{REPLACEMENT CHARACTER}")


def test_long_answers_do_not_slow_down(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = loaded(tokenizer_folders["llama"])
    decoded = 0
    original = tokenizer.decode_raw

    class Counting:
        cleanup, special_ids, byte_fallback_ids = tokenizer.cleanup, tokenizer.special_ids, tokenizer.byte_fallback_ids

        def decode_raw(self, ids: Any, skip_special_tokens: bool = True) -> str:
            nonlocal decoded
            decoded += len(ids)
            return original(ids, skip_special_tokens)

    tokens = tokenizer.encode("The quick brown fox jumps over the lazy dogs. " * 200, add_special_tokens=False)
    stream = StreamDecoder(Counting())
    assert stream.extend(tokens) + stream.flush() == tokenizer.decode(tokens)
    assert decoded < 6 * len(tokens)


def test_stored_lengths_are_not_obeyed(tokenizer_folders: dict[str, Path]) -> None:
    folder = tokenizer_folders["byte-level"]
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}
    saved["padding"]["pad_to_multiple_of"] = None
    text = "The quick brown fox jumps"
    assert Tokenizer(json.dumps(saved)).encode(text) == loaded(folder).encode(text)


def test_tokens_named_only_in_the_configuration_are_special(tokenizer_folders: dict[str, Path]) -> None:
    content = (tokenizer_folders["byte-level"] / "tokenizer.json").read_text()
    plain = Tokenizer(content)
    assert plain.special_tokens == {}
    for config in (
        {"extra_special_tokens": ["circle"]},
        {"extra_special_tokens": {"shape_token": "circle"}},
        {"additional_special_tokens": [{"content": "circle"}]},
        {"shape_token": "circle"},
    ):
        tokenizer = Tokenizer(content, config)
        circle = tokenizer.token_id("circle")
        assert circle in tokenizer.special_ids
        assert circle in tokenizer.encode("acircles")
    older = Tokenizer(content, None, {"eos_token": {"content": "</s>"}})
    assert older.eos_id == older.token_id("</s>")


def test_siglip_texts_are_canonical(tokenizer_folders: dict[str, Path]) -> None:
    content = (tokenizer_folders["llama"] / "tokenizer.json").read_text()
    tokenizer = Tokenizer(content, {"tokenizer_class": "SiglipTokenizer"})
    assert tokenizer.encode("  A Photo, of\n2 cats! ") == Tokenizer(content).encode("a photo of 2 cats")


def test_threads_share_a_tokenizer(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["tiny-clip" if "tiny-clip" in tokenizer_folders else "clip"])
    expected = {length: tokenizer.encode_batch(TEXTS, "longest", length).input_ids.tolist() for length in range(4, 12)}
    wrong: list[int] = []

    def work(length: int) -> None:
        for _ in range(10):
            if tokenizer.encode_batch(TEXTS, "longest", length).input_ids.tolist() != expected[length]:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_refused(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read by tokenizers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BundleError, match="holds a list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot be read"):
        load_tokenizer(tmp_path)
    bare = Tokenizer((tokenizer_folders["byte-level"] / "tokenizer.json").read_text())
    with pytest.raises(PromptError, match="names no pad_token"):
        bare.encode_batch(["a", "a longer one"], "longest", 16)
    assert bare.encode_batch(["a", "a longer one"], "longest", 16, pad_id=3).input_ids[0, -1] == 3
    with pytest.raises(PromptError, match="no texts"):
        bare.encode_batch([], "longest", 16)
