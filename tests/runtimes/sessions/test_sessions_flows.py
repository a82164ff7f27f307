"""Media in the places of tokens, against a decoder that is fed by hand: prompts, prefixes, codes, several modalities."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import IDS, SHORT, WORDS, ByHand, opened
from flow_bundles import (
    AUDIO,
    IMAGE,
    START,
    STATE,
    TOKENS,
    VIDEO,
    codes,
    contract,
    image,
    qformer,
    tokenizer_json,
    vector,
    vision,
)
from session_pictures import noise
from toy_decoder import Toy

from vlm_edge_runtime import CapabilityError, PromptError
from vlm_edge_runtime.bundle.manifest import (
    FixedPlaceholder,
    Instruction,
    Modality,
    PrefixPlaceholder,
    PromptFormat,
    SequentialPositions,
)

# --- prompts ---


def test_a_template_and_start_tokens_where_there_is_no_chat_template(tmp_path) -> None:
    toy = Toy()
    prompt = PromptFormat(template="{images} what {text} is", start_tokens=[START])
    with opened(tmp_path, toy, {"vision_encoder": vision()}, contract(toy, prompt=prompt)) as vlm:
        hand = ByHand(vlm)
        ids = [START, IMAGE, IMAGE, IMAGE, 11, 8, 9, 12]
        assert vlm.prepare("a b", noise(1)).token_ids == ids
        embeds = hand.embeds(ids, one=([1, 2, 3], hand.features(noise(1))))
        assert vlm.generate("a b", images=noise(1), **SHORT).tokens == hand.tokens(embeds, ids)
        assert vlm.generate("a b", **SHORT).tokens == hand.tokens(hand.embeds([START, 11, 8, 9, 12]), [])
        # Spelt out, or raw, a prompt is used as it is.
        assert vlm.prepare("a <image> b", noise(1)).token_ids == [START, 8, IMAGE, IMAGE, IMAGE, 9]
        assert vlm.prepare("{text} {images}", noise(1)).token_ids[5:] == [0, 0, 12]  # words it does not know
        assert vlm.prepare("a b", raw=True).token_ids == [START, 8, 9]
        assert vlm.generate("", raw=True, **SHORT).tokens == hand.tokens(hand.embeds([START]), [])


def test_start_tokens_only_for_an_empty_prompt_and_task_words(tmp_path) -> None:
    toy = Toy()
    prompt = PromptFormat(
        template="{images}{text}", start_tokens=[START], start="instead", replacements={"<T>": "what is it", "<U>": "b {input} c"}
    )
    with opened(tmp_path, toy, {"vision_encoder": vision()}, contract(toy, prompt=prompt)) as vlm:
        assert vlm.prepare("a b").token_ids == [8, 9]
        assert vlm.prepare("<T>").token_ids == [11, 12, 13]
        assert vlm.prepare("<U> a ").token_ids == [9, 8, 10]
        assert vlm.prepare("").token_ids == [START]
        with pytest.raises(PromptError, match="no further text"):
            vlm.generate("<T> a")


def test_images_anywhere_and_the_same_one_twice(tmp_path) -> None:
    toy = Toy()
    with opened(tmp_path, toy, {"vision_encoder": vision()}, contract(toy)) as vlm:
        hand = ByHand(vlm)
        ids = [8, IMAGE, IMAGE, IMAGE, 9, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 10]
        one, other = hand.features(noise(1)), hand.features(noise(2))
        embeds = hand.embeds(ids, a=([1, 2, 3], one), b=([5, 6, 7], other), c=([8, 9, 10], one))
        got = vlm.generate("a <image> b <image> <image> c", images=[noise(1), noise(2), noise(1)], **SHORT)
        assert got.tokens == hand.tokens(embeds, ids)
        assert (vlm.stats.image_cache_misses, vlm.stats.image_tokens) == (2, 9)


def test_features_before_the_prompt(tmp_path) -> None:
    toy = Toy()
    made = contract(
        toy,
        image(token_id=None, placeholder=PrefixPlaceholder(tokens_per_image=TOKENS)),
        positions=SequentialPositions(offset=-TOKENS),
        prompt=PromptFormat(start_tokens=[START]),
    )
    with opened(tmp_path, toy, {"vision_encoder": vision()}, made) as vlm:
        hand = ByHand(vlm)
        ids = [0, 0, 0, START, *IDS]
        embeds = hand.embeds(ids, one=([0, 1, 2], hand.features(noise(1))))
        positions = np.maximum(np.arange(len(ids)) - TOKENS, 0)
        expected = hand.tokens(embeds, ids, positions=positions)
        for _ in range(2):
            assert vlm.generate(WORDS, images=noise(1), **SHORT).tokens == expected
        assert vlm.stats.reused_tokens == len(ids) - 1
        other = vlm.generate(WORDS, images=noise(2), **SHORT)
        assert vlm.stats.reused_tokens == 0
        assert other.prompt_tokens == len(ids)
        prepared = vlm.prepare(WORDS, noise(1))
        assert (prepared.token_ids, len(prepared.inputs)) == ([START, *IDS], 1)
        # Two images: six places in front; no image: none.
        embeds = hand.embeds(
            [0] * 6 + [START, 8], one=(list(range(6)), np.concatenate([hand.features(noise(n)) for n in (1, 2)]))
        )
        positions = np.maximum(np.arange(8) - TOKENS, 0)
        assert vlm.generate("a", images=[noise(1), noise(2)], **SHORT).tokens == hand.tokens(embeds, [], positions=positions)
        assert vlm.generate("a", **SHORT).tokens


def test_codes_are_token_ids(tmp_path) -> None:
    toy = Toy()
    made = contract(toy, image("codes", ("image_tokenizer",)))
    with opened(tmp_path, toy, {"image_tokenizer": codes()}, made) as vlm:
        hand = ByHand(vlm)
        found = hand.features(noise(1), "image_tokenizer", "image_codes")
        ids = [8, *found, 9]
        assert vlm.generate("a <image> b", images=noise(1), **SHORT).tokens == hand.tokens(hand.embeds(ids), ids)
        assert vlm.embed_image(noise(1)).tolist() == found.tolist()
        assert vlm.prepare("a <image> b", noise(1)).token_ids == [8, IMAGE, IMAGE, IMAGE, 9]


def test_an_instruction_enters_the_features(tmp_path) -> None:
    toy = Toy()
    modality = image(graphs=("vision_encoder", "qformer"), instruction=Instruction(tokenizer="words.json", max_length=4))
    graphs = {"vision_encoder": vision("image_hidden_states"), "qformer": qformer()}
    with opened(tmp_path, toy, graphs, contract(toy, modality), {"words.json": tokenizer_json()}) as vlm:
        hand = ByHand(vlm)
        hidden = hand.graph("vision_encoder", pixel_values=hand.pixels(noise(1)))["image_hidden_states"]

        def features(words):
            ids = np.array([words])
            return hand.graph(
                "qformer", image_hidden_states=hidden, qformer_input_ids=ids, qformer_attention_mask=np.ones_like(ids)
            )["image_features"][0]

        for text, words in (("a b", [8, 9]), ("what is it a b c", [11, 12, 13, 8])):  # cut to max_length
            ids = [IMAGE, IMAGE, IMAGE, *vlm.prepare(text).token_ids]
            embeds = hand.embeds(ids, one=([0, 1, 2], features(words)))
            assert vlm.generate(text, images=noise(1), **SHORT).tokens == hand.tokens(embeds, ids)
            assert vlm.stats.image_cache_misses == 1
            np.testing.assert_array_equal(vlm.embed_image(noise(1), instruction=text), features(words))
        arrays = vlm.prepare("a b", noise(1)).inputs[0].arrays
        assert arrays["qformer_input_ids"].tolist() == [[8, 9]]
        vlm.generate("a b", images=noise(1), **SHORT)
        assert vlm.stats.image_cache_misses == 0


# --- several modalities ---


def _modalities() -> list[Modality]:
    def fixed(kind, tokens):
        return FixedPlaceholder(image_token=f"<{kind}>", tokens_per_image=tokens)

    return [
        image(),
        Modality(kind="video", graphs=["vision_encoder"], batch="tile", token_id=VIDEO, placeholder=fixed("video", 2 * TOKENS)),
        Modality(kind="state", graphs=["state_encoder"], batch="image", token_id=STATE, placeholder=fixed("state", 1)),
        Modality(kind="audio", graphs=["audio_encoder"], batch="image", token_id=AUDIO, placeholder=fixed("audio", 2)),
    ]


_ENCODERS = {
    "vision_encoder": vision(),
    "state_encoder": vector("state_values", [5], 1, "state_features"),
    "audio_encoder": vector("input_features", ["time", 4], 2, "audio_features"),
}


class TwoFrames:
    """A video processor that takes the first and the last frame."""

    fingerprint = "two frames"

    def __init__(self, images) -> None:
        self._images = images

    def __call__(self, frames, fps=None):
        from vlm_edge_runtime.preprocess import EncodedImage

        pixels = [self._images(frame).arrays["pixel_values"] for frame in (frames[0], frames[-1])]
        return EncodedImage({"pixel_values": np.concatenate(pixels)}, (8, 8), rows=1, columns=1)


@pytest.fixture
def several(tmp_path, monkeypatch):
    from vlm_edge_runtime import preprocess

    def load_video_processor(bundle):
        return TwoFrames(preprocess.load_image_processor(bundle.read_json("preprocessor_config.json")))

    monkeypatch.setattr(preprocess, "load_video_processor", load_video_processor)
    toy = Toy()
    with opened(tmp_path, toy, _ENCODERS, contract(toy, *_modalities())) as vlm:
        yield vlm


def test_several_modalities_in_one_prompt(several, tmp_path) -> None:
    hand = ByHand(several)
    state, audio = np.arange(5) / 5, np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    video = [noise(seed, 20, 20) for seed in (3, 4, 5)]
    ids = [8, AUDIO, AUDIO, IMAGE, IMAGE, IMAGE, STATE, *[VIDEO] * 6, STATE, 9]
    state_features = hand.graph("state_encoder", state_values=state[None].astype(np.float32))["state_features"][0]
    other_state = hand.graph("state_encoder", state_values=-state[None].astype(np.float32))["state_features"][0]
    embeds = hand.embeds(
        ids,
        audio=([1, 2], hand.graph("audio_encoder", input_features=audio[None])["audio_features"][0]),
        image=([3, 4, 5], hand.features(noise(1))),
        state=([6], state_features),
        video=(list(range(7, 13)), np.concatenate([hand.features(video[0]), hand.features(video[2])])),
        other=([13], other_state),
    )
    expected = hand.tokens(embeds, ids)
    given = {"images": noise(1), "videos": video, "audio": audio, "states": [list(state), -state]}
    prompt = "a <audio> <image> <state> <video> <state> b"
    assert several.generate(prompt, **given, **SHORT).tokens == expected
    assert "".join(several.stream(prompt, **given, **SHORT)) == several.generate(prompt, **given, **SHORT).text
    assert several.stats.image_cache_misses == 0
    np.testing.assert_array_equal(several.logits_along(prompt, noise(1), expected, videos=[video], audio=audio[None],
                                                       states=np.stack([state, -state])).argmax(1), expected)  # fmt: skip
    rows = several.generate(
        [prompt, "a <state>", "a b"],
        images=[noise(1), None, None],
        videos=[[video], None, None],
        audio=[[audio], None, None],
        states=[[state, -state], state, None],
        **SHORT,
    )
    assert rows[0].tokens == expected
    assert rows[1].tokens == several.generate("a <state>", states=[state], **SHORT).tokens
    # In front of a plain text: images, videos, audio, states in the contract's order.
    assert several.prepare("a", states=state, audio=[audio, audio]).token_ids == [STATE, AUDIO, AUDIO, AUDIO, AUDIO, 8]
    gif = tmp_path / "video.gif"
    frames = [frame.quantize() for frame in video]
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=100)
    assert (
        several.generate("a <video>", videos=gif, **SHORT).tokens == several.generate("a <video>", videos=[gif], **SHORT).tokens
    )
    array = np.stack([np.asarray(frame) for frame in video])
    assert several.generate("<video>", videos=array, **SHORT).tokens == several.generate("<video>", videos=video, **SHORT).tokens


CHAT = (
    "{% for m in messages %}{{ m.role }} {% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }} {% else %}<{{ p.type }}> {% endif %}{% endfor %}{% endfor %}"
)


def test_a_conversation_about_several_kinds_of_inputs(tmp_path) -> None:
    toy = Toy()
    made = contract(toy, *(one for one in _modalities() if one.kind != "video"))
    states = [np.arange(5) / 5, np.ones(5)]
    with opened(tmp_path, toy, _ENCODERS, made, {"chat_template.jinja": CHAT}) as vlm:
        talk = vlm.chat(**SHORT)
        talk.send("what is it", noise(1), states=states[0])
        assert [part["type"] for part in talk.messages[0]["content"]] == ["image", "state", "text"]
        before = vlm.stats.prompt_tokens
        second = talk.send("and this a b c", images=[noise(2)], states=[states[1]], audio=np.zeros((3, 4)))
        assert vlm.stats.reused_tokens >= before
        streamed = "".join(talk.stream("a"))
        messages = talk.messages
        vlm.clear_caches()
        given = {"images": [noise(1), noise(2)], "states": states, "audio": np.zeros((3, 4))}
        assert vlm.generate(messages[:3], **given, **SHORT).tokens == second.tokens
        assert vlm.generate(messages[:5], **given, **SHORT).text == streamed
        # Parts may carry their inputs.
        messages[0]["content"][1]["state"] = states[0]
        messages[2]["content"][1]["audio"] = np.zeros((3, 4))
        rest = {"images": [noise(1), noise(2)], "states": states[1]}
        assert vlm.generate(messages[:3], **rest, **SHORT).tokens == second.tokens
        with pytest.raises(PromptError, match="more audio parts than audio were given"):
            vlm.generate([{"role": "user", "content": [{"type": "audio"}]}])
        with pytest.raises(PromptError, match="takes no videos"):
            talk.send("a", videos=[noise(1)])


def test_what_a_model_does_not_take(several, tmp_path) -> None:
    with pytest.raises(PromptError, match=r"state input must be numbers of shape \[5\]; found \[4\]"):
        several.generate("<state>", states=[1.0, 2, 3, 4])
    with pytest.raises(PromptError, match=r"audio input must be numbers of shape \[time, 4\]; found str"):
        several.generate("<audio>", audio="speech.wav")
    with pytest.raises(PromptError, match="not finite"):
        several.generate("<state>", states=[np.nan] * 5)
    with pytest.raises(PromptError, match=r"1 state placeholder \(<state>\) and 0 states were given"):
        several.generate("a <state>")
    with pytest.raises(PromptError, match="states=one ndarray: give one entry for each prompt"):
        several.generate(["a", "b"], states=np.zeros(5))
    toy = Toy()
    with (
        opened(tmp_path / "plain", toy, {"vision_encoder": vision()}, contract(toy)) as plain,
        pytest.raises(PromptError, match="takes no videos, only images"),
    ):
        plain.generate("a", videos=[noise(1)])


def test_videos_need_a_processor(tmp_path) -> None:
    toy = Toy()
    with (
        opened(tmp_path, toy, _ENCODERS, contract(toy, *_modalities())) as vlm,
        pytest.raises(CapabilityError, match="no video processor"),
    ):
        vlm.generate("<video>", videos=[noise(1)])
