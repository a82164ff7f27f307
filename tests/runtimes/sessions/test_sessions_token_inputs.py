"""What a decoder reads for each token besides its embedding, against one that is fed by hand: blocks, features."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import IDS, SHORT, WORDS, ByHand, opened
from flow_bundles import HIDDEN, IMAGE, TOKENS, contract, image, vision
from session_pictures import noise
from toy_decoder import Toy

from vlm_edge_runtime import PromptError
from vlm_edge_runtime.bundle.manifest import PrefixPlaceholder, TokenInput

# --- blocks and features ---


@pytest.mark.parametrize("blocks", ["images", "prompt", "prefix"])
def test_blocks(tmp_path, blocks, monkeypatch) -> None:
    from vlm_edge_runtime.sessions import prefill

    toy = Toy(blocks=True)
    options = {"token_id": None, "placeholder": PrefixPlaceholder(tokens_per_image=TOKENS)} if blocks == "prefix" else {}
    made = contract(toy, image(**options), token_inputs=[TokenInput(name="block_ids", kind="blocks", blocks=blocks)])
    with opened(tmp_path, toy, {"vision_encoder": vision()}, made) as vlm:
        hand = ByHand(vlm)
        images = [noise(1), noise(2)]
        if blocks == "prefix":
            ids = [0] * 6 + IDS
            places, numbers = list(range(6)), np.array([1] * 6 + [0] * 12)
            prompt = WORDS
        else:
            ids = [*IDS, IMAGE, IMAGE, IMAGE, 9, IMAGE, IMAGE, IMAGE, 10]
            places = [12, 13, 14, 16, 17, 18]
            numbers = np.array([0] * 12 + [1] * 3 + [0] + [2] * 3 + [0]) if blocks == "images" else np.ones(20, np.int64)
            prompt = WORDS + " <image> b <image> c"
        rows = np.concatenate([hand.features(picture) for picture in images])
        embeds = hand.embeds(ids, all=(places, rows))
        expected = hand.tokens(embeds, ids, token_inputs={"block_ids": numbers})
        for chunk in (512, 4, 2, 1):
            monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
            vlm.clear_caches()
            assert vlm.generate(prompt, images=images, **SHORT).tokens == expected, chunk
            assert vlm.generate(prompt, images=images, **SHORT).tokens == expected, chunk
            assert vlm.stats.reused_tokens == (0 if blocks == "prompt" else len(ids) - 1)
        if blocks != "images":
            return
        # The last image is another one: what is taken over ends before it, or before the first one.
        vlm.generate(prompt, images=[noise(1), noise(3)], **SHORT)
        assert vlm.stats.reused_tokens == 16
        shorter = WORDS + " <image>"
        got = vlm.generate(shorter, images=noise(1), **SHORT)
        assert vlm.stats.reused_tokens == 12  # all of it is kept, but its last token is needed
        vlm.clear_caches()
        assert vlm.generate(shorter, images=noise(1), **SHORT).tokens == got.tokens


def test_features_beside_the_tokens(tmp_path) -> None:
    toy = Toy(feature=True)
    made = contract(toy, token_inputs=[TokenInput(name="deepstack.0", kind="features")])
    with opened(tmp_path, toy, {"vision_encoder": vision(deepstack=True)}, made) as vlm:
        hand = ByHand(vlm)
        ids = [*IDS, IMAGE, IMAGE, IMAGE, 9]
        deep = np.zeros((16, HIDDEN), np.float32)
        deep[12:15] = hand.features(noise(1), name="deepstack.0")
        embeds = hand.embeds(ids, one=([12, 13, 14], hand.features(noise(1))))
        expected = hand.tokens(embeds, ids, token_inputs={"deepstack.0": deep})
        prompt = WORDS + " <image> b"
        assert vlm.generate(prompt, images=noise(1), **SHORT).tokens == expected
        assert vlm.generate(prompt, images=noise(1), **SHORT).tokens == expected
        vlm.generate(WORDS + " a", **SHORT)
        assert vlm.generate(prompt, images=noise(1), **SHORT).tokens == expected  # from the middle of a kept prefix
        assert vlm.generate(WORDS, **SHORT).tokens == hand.tokens(hand.embeds(IDS), IDS)


def test_a_model_says_how_many_images_it_takes(tmp_path) -> None:
    toy = Toy()
    with opened(tmp_path, toy, {"vision_encoder": vision()}, contract(toy, image(least=1, most=2))) as vlm:
        with pytest.raises(PromptError, match="at least 1 images with each prompt; found 0"):
            vlm.generate("a")
        with pytest.raises(PromptError, match="at most 2 images"):
            vlm.generate("a", images=[noise(1)] * 3)
