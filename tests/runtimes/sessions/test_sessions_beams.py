"""Beam search, guidance and the length and repetition controls through a session: transformers' answers, token for token."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers
from session_pictures import noise
from transformers_reference import Reference

from vlm_edge_runtime import load
from vlm_edge_runtime.errors import GenerationCancelled, OptionError

NEW = 10
BUILDS = ["portable", "cpu-fp32"]
QUESTIONS = ["what is in the picture?", "how many circles are there?", "a", "describe the image. what colour is it?"]


class Beams(Reference):
    """The reference with everything that `generate` gives back."""

    @torch.inference_mode()
    def search(self, text, images, new=NEW, **options):
        """[(tokens, score)] of the returned sequences."""
        inputs = self.inputs(text, images)
        out = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=new, return_dict_in_generate=True, output_scores=True, **options
        )
        lengths = (out.beam_indices >= 0).sum(1).tolist()
        rows = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [(row[:n], score) for row, n, score in zip(rows, lengths, out.sequences_scores.tolist(), strict=True)]

    def ask(self, question, images=1):
        content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        return self.render([{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, Beams] = {}

    def make(name: str) -> Beams:
        if name not in made:
            made[name] = Beams(tiny_checkpoint(name))
        return made[name]

    return make


def same(found, expected) -> None:
    everything = [found, *found.alternatives]
    assert [one.tokens for one in everything] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([one.score for one in everything], [score for _, score in expected], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ["llava-llama", "qwen2_vl"])
def test_sequences_and_scores(name, build, session, reference) -> None:
    vlm, model = session(name, build), reference(name)
    kinds = [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": -1.0, "num_return_sequences": 3},
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
        {"num_beams": 5, "early_stopping": True, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "num_return_sequences": 2},
    ]
    for number, options in enumerate(kinds):
        image = noise(number, 50, 40 + 9 * number)
        for question in QUESTIONS[: 2 + number % 2]:
            found = vlm.generate(question, images=image, max_new_tokens=NEW, temperature=0.0, **options)
            same(found, model.search(model.ask(question), [image], **options))
            ended = found.tokens[-1] == model.model.generation_config.eos_token_id
            assert found.finish_reason == ("stop" if ended else "length")
            assert found.text == model.tokenizer.decode(found.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("build", BUILDS)
def test_a_batch_of_prompts(build, session, reference) -> None:
    """Several prompts at once, with and without images: each as if it were alone."""
    vlm, model = session("llava-llama", build), reference("llava-llama")
    images = [noise(1), None, noise(2), noise(1)]
    options = {"num_beams": 3, "num_return_sequences": 2, "temperature": 0.0}
    answers = vlm.generate(QUESTIONS, images=images, max_new_tokens=NEW, **options)
    assert vlm.stats.rows == 4 and vlm.stats.new_tokens == sum(len(one.tokens) for one in answers)
    for question, image, found in zip(QUESTIONS, images, answers, strict=True):
        given = [] if image is None else [image]
        same(found, model.search(model.ask(question, len(given)), given, num_beams=3, num_return_sequences=2))


def test_kept_prompts_are_reused_by_and_after_a_search(session, reference) -> None:
    vlm, model = session("llava-llama"), reference("llava-llama")
    image, question = noise(4), QUESTIONS[0]
    expected = model.search(model.ask(question), [image], num_beams=3)
    greedy = model.generate(model.ask(question), [image], NEW, num_beams=1)
    for _ in range(2):
        same(vlm.generate(question, images=image, num_beams=3, max_new_tokens=NEW), expected)
        first = vlm.stats
        assert vlm.generate(question, images=image, max_new_tokens=NEW).tokens == greedy
        assert vlm.stats.prefix_cache_hits == 1
    assert first.prefix_cache_hits == 1 and first.prefill_tokens <= 2


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"min_new_tokens": NEW, "suppress_tokens": [304, 62, 229]},
        {"forced_eos_token_id": 3, "begin_suppress_tokens": [*range(0, 200, 2)]},
        {"sequence_bias": {(62,): 40.0, (304, 172): -90.0}},
        {"encoder_repetition_penalty": 1.6},
        {"encoder_no_repeat_ngram_size": 1, "exponential_decay_length_penalty": (2, 1.5)},
        {"guidance_scale": 1.8},
        {"guidance_scale": 2.5, "no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_controls_of_greedy_answers(options, build, session, reference) -> None:
    vlm, model = session("llava-llama", build), reference("llava-llama")
    images = [noise(seed) for seed in range(3)]
    plain = vlm.generate(QUESTIONS[:3], images=images, max_new_tokens=NEW)
    found = vlm.generate(QUESTIONS[:3], images=images, max_new_tokens=NEW, **options)
    for question, image, one in zip(QUESTIONS, images, found, strict=False):
        assert one.tokens == model.generate(model.ask(question), [image], NEW, **options), question
    assert [one.tokens for one in found] != [one.tokens for one in plain]


def test_bad_words_never_come(session) -> None:
    vlm, image = session("llava-llama"), noise(3)
    plain = vlm.generate("what is it?", images=image, max_new_tokens=NEW, ignore_eos=True)
    found = vlm.generate(
        "what is it?", images=image, max_new_tokens=NEW, ignore_eos=True, bad_words=[[plain.tokens[0]], plain.tokens[1:3]]
    )
    assert plain.tokens[0] not in found.tokens and found.tokens != plain.tokens
    word = vlm.generate("what is it?", images=image, max_new_tokens=NEW, bad_words=["circle"], num_beams=2)
    assert "circle" not in word.text.split()


def test_a_streamed_search_comes_in_one_piece(session) -> None:
    vlm, image = session("llava-llama"), noise(5)
    whole = vlm.generate("what is it?", images=image, num_beams=3, max_new_tokens=NEW)
    stream = vlm.stream("what is it?", images=image, num_beams=3, max_new_tokens=NEW)
    pieces = list(stream)
    assert pieces == ([whole.text] if whole.text else [])
    assert stream.result.tokens == whole.tokens
    # The second search finds the prompt in the prefix cache and runs its last token alone: other sums, rounded elsewhere.
    assert stream.result.score == pytest.approx(whole.score, rel=1e-5)
    assert stream.finish_reason == whole.finish_reason


def test_stop_strings_end_beams(session, reference) -> None:
    vlm, model = session("llava-llama"), reference("llava-llama")
    met = 0
    for seed, question in enumerate(QUESTIONS):
        image = noise(seed)
        plain = vlm.generate(question, images=image, num_beams=3, max_new_tokens=NEW, ignore_eos=True)
        stop = plain.text[len(plain.text) // 2 :][:3]
        if not stop.strip():
            continue
        found = vlm.generate(question, images=image, num_beams=3, max_new_tokens=NEW, stop=stop)
        expected = model.search(model.ask(question), [image], num_beams=3, stop_strings=[stop], tokenizer=model.tokenizer)
        same(found, expected)
        assert stop not in found.text
        met += found.finish_reason == "stop_string"
    assert met


class _Later:
    """A cancel that comes after it was asked for so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_cancelling_a_search(session) -> None:
    vlm = session("llava-llama")
    later = _Later(40)
    with pytest.raises(GenerationCancelled):
        vlm.generate("what is it?", images=noise(0), num_beams=4, max_new_tokens=200, min_new_tokens=200, cancel=later)
    assert 0 < vlm.stats.steps < 200 and vlm.stats.new_tokens == 0
    event = threading.Event()
    event.set()
    with pytest.raises(GenerationCancelled):
        vlm.generate("what is it?", images=noise(0), guidance_scale=2.0, cancel=event)
    assert vlm.generate("what is it?", images=noise(0), num_beams=4, max_new_tokens=3).tokens


def test_sampled_searches_and_guided_samples_follow_their_seed(session) -> None:
    vlm, image = session("llava-llama"), noise(6)
    for options in ({"num_beams": 3}, {"guidance_scale": 1.5}, {"typical_p": 0.8}):
        answers = [
            vlm.generate("what is it?", images=image, max_new_tokens=NEW, temperature=2.0, seed=seed, **options).tokens
            for seed in (1, 1, 2)
        ]
        assert answers[0] == answers[1] != answers[2]


def _rewrite(folder, name, more) -> None:
    """Adds to a JSON file of a bundle, and to the manifest what it says of the file."""
    data = json.dumps(json.loads((folder / name).read_text()) | more).encode()
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["file"] == name:
            file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_file_asks_for_beams(portable_bundle, tmp_path, reference) -> None:
    """As BLIP and ViT-GPT2 ship: a generation_config.json with beams counts unless the caller says otherwise."""
    folder = tmp_path / "beams.vlm"
    shutil.copytree(portable_bundle("llava-llama"), folder)
    asked = {"num_beams": 3, "length_penalty": 0.0, "no_repeat_ngram_size": 2}
    _rewrite(folder, "generation_config.json", asked | {"max_new_tokens": NEW})
    model, image = reference("llava-llama"), noise(7)
    text = model.ask("what is it?")
    with load(folder, build="portable") as vlm:
        same(vlm.generate("what is it?", images=image), model.search(text, [image], **asked))
        greedy = model.generate(text, [image], NEW, no_repeat_ngram_size=2)
        assert vlm.generate("what is it?", images=image, temperature=0.0).tokens == greedy
        assert vlm.generate("what is it?", images=image, num_beams=1).tokens == greedy
        with pytest.raises(OptionError, match="1 … 3"):
            vlm.generate("what is it?", images=image, num_return_sequences=4)


CAPTIONERS = {
    "florence2": {
        "num_beams": 3, "no_repeat_ngram_size": 3, "forced_bos_token_id": 7, "forced_eos_token_id": 3, "early_stopping": True,
        "min_length": 6, "max_length": 12, "encoder_no_repeat_ngram_size": 1,
    },
    "vit-gpt2": {"num_beams": 4, "max_length": 16, "length_penalty": 0.3, "num_return_sequences": 2},
    "blip-caption": {"num_beams": 5, "max_length": 14, "min_length": 8, "repetition_penalty": 1.2, "begin_suppress_tokens": [9]},
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioners_as_they_ship(name, portable_bundle, tiny_checkpoint, tmp_path) -> None:
    """Lengths count the decoder's tokens; beams share one memory; the first and the last token are forced."""
    source, folder, asked = tiny_checkpoint(name), tmp_path / "captions.vlm", CAPTIONERS[name]
    shutil.copytree(portable_bundle(name), folder)
    _rewrite(folder, "generation_config.json", {"max_new_tokens": None} | asked)
    image, question = noise(8), "" if name == "vit-gpt2" else "a photo of"
    if name == "florence2":
        kind, inputs = transformers.AutoModelForImageTextToText, transformers.AutoProcessor.from_pretrained(source)
        given = dict(inputs(images=image, text=question, return_tensors="pt"))
    elif name == "blip-caption":
        kind, inputs = transformers.BlipForConditionalGeneration, transformers.AutoProcessor.from_pretrained(source)
        given = dict(inputs(images=image, text=question, return_tensors="pt"))
    else:
        kind, inputs = transformers.AutoModelForImageTextToText, transformers.AutoImageProcessor.from_pretrained(source)
        given = dict(inputs(image, return_tensors="pt"))
    model = kind.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.max_new_tokens = None
    with torch.inference_mode():
        out = model.generate(**given, do_sample=False, return_dict_in_generate=True, output_scores=True, **asked)
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    start = out.sequences.shape[1] - max(lengths)
    rows = [row[start : start + length] for row, length in zip(out.sequences.tolist(), lengths, strict=True)]
    with load(folder, build="portable") as vlm:
        found = vlm.generate(question, images=image)
        same(found, list(zip(rows, out.sequences_scores.tolist(), strict=True)))
        assert len(found.tokens) > 1
