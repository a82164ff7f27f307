"""Greedy answers about videos are transformers' answers: pooled frames, labelled frames, patches by the clock, timestamps.

The pixels that transformers' models are given are those of our video processors, for theirs want torchvision; how frames are
chosen and cut up is compared in the preprocessing tests.
"""

from __future__ import annotations

import numpy as np
import pytest
from any_size_reference import AnySizeReference
from PIL import Image
from transformers.video_utils import VideoMetadata

from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.preprocess import load_video_processor

NEW = 8
TEXT = {
    "qwen": "USER: <|vision_start|><|video_pad|><|vision_end|>{}\nASSISTANT:",
    "llava": "USER: <video>\n{}\nASSISTANT:",
    "intern": "USER: <video>\n{}\nASSISTANT:",
}
NAMES = ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "llava_onevision", "internvl"))]


def clip(seed: int, frames: int, height: int, width: int) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (frames, 4, 6, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((width, height), Image.Resampling.BILINEAR) for each in blocks]


def text_of(name: str, question: str) -> str:
    return next(text for key, text in TEXT.items() if name.startswith(key)).format(question)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name, session, tiny_checkpoint) -> None:
    vlm, model = session(name, "portable"), AnySizeReference(tiny_checkpoint(name))
    processor = load_video_processor(open_bundle(vlm.path))
    for seed, (frames, height, width) in enumerate([(4, 40, 60), (7, 50, 30)]):
        video = clip(seed, frames, height, width)
        for question in ("what is in the picture?", "how many shapes are there?"):
            text = text_of(name, question)
            encoded = processor(video)
            indices = processor.chosen(frames, None) if processor.sampling.on else list(range(frames))
            # A list of frames has no clock: transformers then takes 24 frames a second.
            metadata = VideoMetadata(total_num_frames=frames, frames_indices=indices)
            inputs = model.video_inputs(text, encoded, metadata)
            got = vlm.generate(text, videos=[video], max_new_tokens=NEW, raw=True)
            assert got.prompt_tokens == inputs["input_ids"].shape[1]
            assert got.tokens == model.generate_from(inputs, NEW), (name, frames, question)


@pytest.mark.parametrize("name", NAMES)
def test_frames_out_of_order_are_another_video(name, session) -> None:
    """What stands when makes a difference; a wrong position or a frame left out would too."""
    vlm, video = session(name, "portable"), clip(5, 6, 40, 40)
    text = text_of(name, "what is in the picture?")
    answers = [
        vlm.generate(text, videos=[each], max_new_tokens=2, raw=True, logprobs=0, ignore_eos=True).logprobs
        for each in (video, video[::-1])
    ]
    assert not np.allclose(*answers, atol=1e-3)


def test_a_model_without_videos_says_so(session) -> None:
    with pytest.raises(PromptError, match="takes no videos"):
        session("llava_next", "portable").generate("<image>", videos=[clip(1, 2, 9, 9)], max_new_tokens=1)
