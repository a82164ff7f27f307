"""What a decoder reads besides tokens, against one that is fed by hand: memories, recurrent state, attention."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import IDS, SHORT, WORDS, ByHand, opened
from flow_bundles import (
    HIDDEN,
    IMAGE,
    START,
    TOKENS,
    contract,
    cross_kv,
    encoder,
    image,
    renamed,
    vision,
    with_cross_kv_inside,
    write,
)
from session_pictures import noise
from toy_decoder import Toy

from vlm_edge_runtime import CapabilityError, ContextLengthError, PromptError, load
from vlm_edge_runtime.bundle.manifest import FixedPlaceholder, Memory, PromptFormat, TokenInput
from vlm_edge_runtime.engines.base import SamplingParams

# --- memory ---


def cross(**options) -> Toy:
    return Toy(cross=True, **options)


def memory_of_features(toy: Toy, **options):
    return contract(toy, image("memory"), memory=Memory(source="features", mask="source", hidden_size=HIDDEN), **options)


def _bind(hand: ByHand, states: np.ndarray) -> dict[str, np.ndarray]:
    made = hand.graph("cross_kv", encoder_hidden_states=states[None])
    return {name: array[0] for name, array in made.items()} | {"encoder_attention_mask": np.ones(len(states), np.int64)}


def test_memory_from_features(tmp_path) -> None:
    toy = cross()
    graphs = {"vision_encoder": vision(), "cross_kv": cross_kv(toy)}
    with opened(tmp_path, toy, graphs, memory_of_features(toy, prompt=PromptFormat(start_tokens=[START]))) as vlm:
        hand = ByHand(vlm)
        ids = [START, *IDS]

        def expected(*seeds, words=ids):
            states = np.concatenate([hand.features(noise(seed)) for seed in seeds])
            return hand.tokens(hand.embeds(words), words, bind=_bind(hand, states))

        first = vlm.generate(WORDS, images=noise(1), **SHORT)
        assert first.tokens == expected(1)
        assert first.prompt_tokens == len(ids)
        calls = len(vlm.graph_times()["cross_kv"])
        assert vlm.generate(WORDS, images=noise(1), **SHORT).tokens == first.tokens
        assert (vlm.stats.reused_tokens, vlm.stats.image_cache_misses) == (len(ids) - 1, 0)
        assert len(vlm.graph_times()["cross_kv"]) == calls
        # Another image is another memory: no entry is taken over, though all tokens are the same.
        assert vlm.generate(WORDS, images=noise(2), **SHORT).tokens == expected(2) != first.tokens
        assert vlm.stats.reused_tokens == 0
        # Two images, the captions without a prompt, and rows of unlike memories.
        assert vlm.generate(WORDS, images=[noise(1), noise(2)], **SHORT).tokens == expected(1, 2)
        assert vlm.generate("", images=noise(3), **SHORT).tokens == expected(3, words=[START])
        rows = vlm.generate([WORDS, WORDS, "a"], images=[[noise(1), noise(2)], noise(1), noise(1)], **SHORT)
        assert [row.tokens for row in rows] == [expected(1, 2), first.tokens, expected(1, words=[START, 8])]
        assert vlm.memory()["image_cache"] > 0
        assert vlm.memory()["prefix_cache"] > 0
        with pytest.raises(PromptError, match="about images only"):
            vlm.generate(WORDS)
        vlm.clear_caches()
        rows = vlm.generate([WORDS] * 3, images=[noise(1), noise(1), noise(2)], **SHORT)
        assert vlm.stats.reused_tokens == len(ids) - 1  # the second row's
        assert [row.tokens for row in rows] == [first.tokens, first.tokens, expected(2)]
        np.testing.assert_array_equal(vlm.logits_along(WORDS, noise(2), rows[2].tokens).argmax(1), rows[2].tokens)
        stream = vlm.stream(WORDS, images=noise(1), **SHORT)
        assert "".join(stream) == first.text


def test_rows_of_unlike_memories_need_a_mask(tmp_path) -> None:
    toy = cross(source_mask=False)
    made = contract(toy, image("memory"), memory=Memory(source="features", mask="none", hidden_size=HIDDEN))
    with opened(tmp_path, toy, {"vision_encoder": vision(), "cross_kv": cross_kv(toy)}, made) as vlm:
        rows = vlm.generate(["a", "b"], images=[noise(1), noise(2)], **SHORT)
        assert [row.tokens for row in rows] == [vlm.generate(text, images=noise(seed), **SHORT).tokens
                                                for seed, text in ((1, "a"), (2, "b"))]  # fmt: skip
        with pytest.raises(PromptError, match="1 to 2 images"):
            vlm.generate(["a", "b"], images=[noise(1), [noise(1), noise(2)]])


def test_a_kept_memory_counts_and_is_forgotten(tmp_path) -> None:
    toy = cross()
    graphs = {"vision_encoder": vision(), "cross_kv": cross_kv(toy)}
    path = write(tmp_path / "toy.vlm", toy, graphs, memory_of_features(toy))
    with load(path, build="portable", image_cache_bytes=0) as vlm:
        vlm.generate(WORDS, images=noise(1), **SHORT)
        bound = 2 * 2 * TOKENS * toy.heads * toy.size * 4 + TOKENS * 8
        assert vlm.memory()["prefix_cache"] == (len(IDS) + 5) * vlm.memory()["kv_per_token"] + bound
        assert vlm.memory()["image_cache"] == 0
        vlm.generate(WORDS, images=noise(1), **SHORT)
        assert (vlm.stats.reused_tokens, vlm.stats.image_cache_misses) == (len(IDS) - 1, 1)
    with load(path, build="portable") as vlm:
        vlm.generate(WORDS, images=noise(1), **SHORT)
        first = len(vlm.graph_times()["cross_kv"])
        vlm.clear_caches()
        assert vlm.memory()["image_cache"] == vlm.memory()["prefix_cache"] == 0
        vlm.generate(WORDS, images=noise(1), **SHORT)
        assert len(vlm.graph_times()["cross_kv"]) == first + 1


def test_a_decoder_that_reads_the_features_themselves(tmp_path) -> None:
    toy = cross()
    graphs = {"vision_encoder": vision(), "decoder": with_cross_kv_inside(toy)}
    with opened(tmp_path, toy, graphs, memory_of_features(toy)) as vlm:
        hand = ByHand(vlm)
        bind = {"encoder_hidden_states": hand.features(noise(1)), "encoder_attention_mask": np.ones(TOKENS, np.int64)}
        expected = hand.tokens(hand.embeds(IDS), IDS, bind=bind)
        assert vlm.generate(WORDS, images=noise(1), **SHORT).tokens == expected
        assert vlm.generate(WORDS, images=noise(2), **SHORT).tokens != expected


def test_memory_from_an_encoder(tmp_path) -> None:
    toy = cross()
    made = contract(
        toy,
        image(),
        memory=Memory(source="encoder", mask="source", hidden_size=HIDDEN, source_length=20),
        prompt=PromptFormat(start_tokens=[START, 8]),
    )
    graphs = {"vision_encoder": vision(), "encoder": encoder(), "cross_kv": cross_kv(toy)}
    with opened(tmp_path, toy, graphs, made) as vlm:
        hand = ByHand(vlm)

        def expected(text_ids, picture):
            ids = [*([IMAGE] * 3 if picture else []), *text_ids]
            filled = {"one": ([0, 1, 2], hand.features(picture))} if picture else {}
            feeds = {"inputs_embeds": hand.embeds(ids, **filled)[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
            states = hand.graph("encoder", **feeds)["encoder_hidden_states"][0]
            return hand.tokens(hand.embeds([START, 8]), [START, 8], bind=_bind(hand, states))

        got = vlm.generate(WORDS, images=noise(1), **SHORT)
        assert got.tokens == expected(IDS, noise(1))
        assert got.prompt_tokens == 3 + len(IDS) + 2
        assert vlm.stats.prefill_tokens == got.prompt_tokens
        calls = len(vlm.graph_times()["encoder"])
        rows = vlm.generate([WORDS, "a", WORDS], images=[noise(1), noise(1), None], **SHORT)
        assert len(vlm.graph_times()["encoder"]) == calls + 2  # the first row's was kept
        assert [row.tokens for row in rows] == [got.tokens, expected([8], noise(1)), expected(IDS, None)]
        prepared = vlm.prepare("a", noise(1))
        assert (prepared.token_ids, prepared.decoder_ids) == ([IMAGE] * 3 + [8], [START, 8])
        # The decoder's length counts against the context, the encoder's against its own limit.
        with pytest.raises(ContextLengthError, match="21 tokens, 3 of them from images; the encoder takes up to 20"):
            vlm.generate("a " * 18, images=noise(1))
        assert vlm.generate("a " * 17, images=noise(1), max_new_tokens=126, ignore_eos=True).finish_reason == "length"
        with pytest.raises(ContextLengthError, match="has 2 tokens, and 127 new ones"):
            vlm.generate("a", images=noise(1), max_new_tokens=127)


def test_an_encoder_that_attends_to_the_image(tmp_path) -> None:
    toy = cross()
    made = contract(
        toy,
        image("memory"),
        memory=Memory(source="encoder", mask="source", hidden_size=HIDDEN),
        prompt=PromptFormat(start_tokens=[START]),
    )
    graphs = {"vision_encoder": vision(), "encoder": encoder(reads_image=True), "cross_kv": cross_kv(toy)}
    with opened(tmp_path, toy, graphs, made) as vlm:
        hand = ByHand(vlm)
        feeds = {"inputs_embeds": hand.embeds(IDS)[None], "attention_mask": np.ones((1, len(IDS)), np.int64)}
        states = hand.graph("encoder", image_features=hand.features(noise(1))[None], **feeds)["encoder_hidden_states"][0]
        expected = hand.tokens(hand.embeds([START]), [START], bind=_bind(hand, states))
        assert vlm.generate(WORDS, images=noise(1), **SHORT).tokens == expected
        logits = [vlm.logits_along(WORDS, noise(seed), expected) for seed in (1, 2)]
        assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_each_token_sees_images_of_its_own(tmp_path) -> None:
    toy = cross(source_mask=False, token_mask=True)
    spelt = {"token_id": IMAGE, "placeholder": FixedPlaceholder(image_token="<image>", tokens_per_image=1)}
    made = contract(
        toy,
        image("memory", graphs=("vision_encoder",), **spelt),
        memory=Memory(source="features", mask="tokens", hidden_size=HIDDEN, entries_per_image=1),
        token_inputs=[TokenInput(name="cross_attention_mask", kind="media", rule="last_medium", decode="last")],
    )
    graphs = {"vision_encoder": vision(tokens=1), "cross_kv": cross_kv(toy)}
    with opened(tmp_path, toy, graphs, made) as vlm:
        hand = ByHand(vlm)
        ids = [8, IMAGE, 9, 10, IMAGE, 11]
        mask = np.array([[0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
        states = np.concatenate([hand.features(noise(seed)) for seed in (1, 2)])
        bind = {name: array for name, array in _bind(hand, states).items() if name != "encoder_attention_mask"}
        given = {"cross_attention_mask": mask}
        following = {"cross_attention_mask": mask[-1]}
        expected = hand.tokens(hand.embeds(ids), ids, bind=bind, token_inputs=given, following=following)
        prompt = "a <image> b c <image> what"
        assert vlm.generate(prompt, images=[noise(1), noise(2)], **SHORT).tokens == expected
        # Without an image: one that no token sees. In one batch with another.
        zeros = np.zeros((1, HIDDEN), np.float32)
        bind = {name: array for name, array in _bind(hand, zeros).items() if name != "encoder_attention_mask"}
        given = {"cross_attention_mask": np.zeros((2, 1), np.int64)}
        alone = hand.tokens(hand.embeds([8, 9]), [8, 9], bind=bind, token_inputs=given)
        assert vlm.generate("a b", **SHORT).tokens == alone
        rows = vlm.generate([prompt, "a b"], images=[[noise(1), noise(2)], None], **SHORT)
        assert [row.tokens for row in rows] == [expected, alone]


def test_recurrent_state_and_attention(tmp_path) -> None:
    toy = cross(recurrent=True, cached=False, axes=0)
    made = memory_of_features(toy, prompt=PromptFormat(start_tokens=[START]))
    decoder = renamed(toy.portable_model(), "attentions", "attention")
    graphs = {"vision_encoder": vision(), "cross_kv": cross_kv(toy, states=True), "decoder": decoder}
    with opened(tmp_path, toy, graphs, made) as vlm:
        hand = ByHand(vlm)
        bind = _bind(hand, hand.features(noise(1)))
        ids = [START, *IDS]
        expected = hand.tokens(hand.embeds(ids), ids, bind=bind)
        for _ in range(2):
            got = vlm.generate(WORDS, images=noise(1), return_attention=True, **SHORT)
            assert got.tokens == expected
            assert (vlm.stats.reused_tokens, vlm.memory()["prefix_cache"]) == (0, 0)
        assert got.attention.shape == (6, TOKENS)
        assert got.attention.dtype == np.float32
        np.testing.assert_allclose(got.attention.sum(1), 1, atol=1e-6)
        state = hand.decoder.allocate(1, 32)
        state.bind(0, bind)
        state.prefill(0, hand.embeds(ids), np.arange(len(ids)))
        np.testing.assert_allclose(got.attention[0], state.outputs(0)["attention"], atol=1e-6)
        state.start(0, SamplingParams(), np.array(ids), len(ids))
        state.push(0, expected[0])
        state.logits(0)
        np.testing.assert_allclose(got.attention[1], state.outputs(0)["attention"], atol=1e-6)
        assert vlm.generate(WORDS, images=noise(1), **SHORT).attention is None
        rows = vlm.generate([WORDS, "a", WORDS], images=[noise(1)] * 3, max_new_tokens=6, ignore_eos=True, stop="w1")
        assert rows[0].tokens == rows[2].tokens == expected[: len(rows[0].tokens)]
    with (
        opened(tmp_path / "plain", Toy(), {"vision_encoder": vision()}, contract(Toy())) as plain,
        pytest.raises(CapabilityError, match="no output 'attention'"),
    ):
        plain.generate("a", return_attention=True)
