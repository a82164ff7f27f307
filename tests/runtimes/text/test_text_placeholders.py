"""Prompts with their images written out: the same token ids as transformers' processors give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.processing_utils import ProcessorMixin

from vlm_edge_runtime.bundle.manifest import FixedPlaceholder, GridPlaceholder, Placeholder, PrefixPlaceholder, TilePlaceholder
from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.preprocess import EncodedImage, load_image_processor
from vlm_edge_runtime.text import expand, expand_text, image_text, image_tokens, load_tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
TILES = TilePlaceholder(
    image_token="<image>", fake_token="<fake_token_around_image>", global_token="<global-img>", tokens_per_tile=4
)
FIXED = FixedPlaceholder(image_token="<image>", tokens_per_image=16)
GRID = GridPlaceholder(image_token="<|image_pad|>", merge_size=2)
SIZES = [(200, 90), (64, 64), (61, 333), (90, 90)]
PROMPTS = [
    "{0} What is this?",
    "Look: {0} and\n{0}Which?",
    "{0}{0}\n\n{0}",
    "no image at all",
    "a {0}\n\n  b {0} c {0} d\n{0}",
    "grün {0}🙂",
]


def processors(name: str, folder: Path) -> tuple[ProcessorMixin, dict[str, Any], Placeholder]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if name == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
        kind: ProcessorMixin = LlavaProcessor(
            images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        return kind, images.to_dict(), FIXED
    options = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}
    if name == "idefics3":
        images = Idefics3ImageProcessorPil(**options)
        return Idefics3Processor(images, tokenizer, image_seq_len=4), images.to_dict(), TILES
    if name == "idefics3-unsplit":
        images = Idefics3ImageProcessorPil(**options, do_image_splitting=False)
        return Idefics3Processor(images, tokenizer, image_seq_len=4), images.to_dict(), TILES
    if name == "smolvlm":
        images = SmolVLMImageProcessorPil(**options)
        return SmolVLMProcessor(images, tokenizer, None, image_seq_len=4), images.to_dict(), TILES
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 12})
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return Qwen2VLProcessor(images, tokenizer), images.to_dict(), GRID


@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace"])
@pytest.mark.parametrize("name", ["llava", "idefics3", "idefics3-unsplit", "smolvlm", "qwen2-vl"])
def test_token_ids_are_those_of_the_processor(
    name: str, kind: str, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their video processors need torchvision; without videos they are not used.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, argument: type(argument))
    reference, saved, placeholder = processors(name, tokenizer_folders[kind])
    tokenizer, images = load_tokenizer(tokenizer_folders[kind]), load_image_processor(saved)
    for prompt in PROMPTS:
        mark = "<|vision_start|><|image_pad|><|vision_end|>" if name == "qwen2-vl" else "<image>"
        text = prompt.format(mark)
        pictures = [Image.new("RGB", SIZES[index % len(SIZES)]) for index in range(prompt.count("{0}"))]
        encoded = [images(picture) for picture in pictures]
        expected = reference(text=[text], images=pictures or None)["input_ids"][0]
        assert tokenizer.encode(expand_text(text, placeholder, encoded)) == expected
        image_id = tokenizer.token_id(placeholder.image_token)
        assert expected.count(image_id) == sum(image_tokens(placeholder, image) for image in encoded)


@pytest.mark.parametrize("folder", [name for name in ("tiny-llava", "tiny-smolvlm") if (CHECKPOINTS / name).exists()])
def test_checkpoints(folder: str) -> None:
    reference = AutoProcessor.from_pretrained(CHECKPOINTS / folder)
    files = [
        json.loads((CHECKPOINTS / folder / f"{name}.json").read_text()) for name in ("preprocessor_config", "processor_config")
    ]
    images, tokenizer = load_image_processor(*files), load_tokenizer(CHECKPOINTS / folder)
    for prompt in PROMPTS:
        pictures = [Image.new("RGB", SIZES[index % len(SIZES)]) for index in range(prompt.count("{0}"))]
        encoded = [images(picture) for picture in pictures]
        placeholder = FIXED if folder == "tiny-llava" else TILES
        text = prompt.format("<image>")
        expected = reference(text=text, images=pictures or None)["input_ids"][0]
        assert tokenizer.encode(expand_text(text, placeholder, encoded)) == expected
        # The processor's own files say how many tokens an image becomes.
        assert [image.tokens for image in encoded] == [image_tokens(placeholder, image) for image in encoded]


def layout(**values: Any) -> EncodedImage:
    return EncodedImage({}, (10, 10), **values)


def test_what_stands_for_an_image() -> None:
    one = TilePlaceholder(
        image_token="i", fake_token="F", global_token="G", row_column_format="r{row}c{column}", tokens_per_tile=2
    )
    assert image_text(one, layout()) == "FGiiF"
    assert image_text(one, layout(rows=2, columns=2)) == "Fr1c1iiFr1c2ii\nFr2c1iiFr2c2ii\n\nFGiiF"
    assert image_text(GridPlaceholder(image_token="p", merge_size=2), layout(grid=(1, 4, 6))) == "p" * 6


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("no image", 1, r"0 image placeholders \(<image>\) and 1 image was given; add"),
        ("<image> <image>", 1, "2 image placeholders .* and 1 image was given; pass"),
        ("<image>", 0, "1 image placeholder .* and 0 images were given"),
        ("<image>", 3, "1 image placeholder .* and 3 images were given"),
    ],
)
def test_counts_must_match(text: str, count: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        expand_text(text, FIXED, [layout()] * count)


def test_several_kinds_of_inputs_in_one_prompt() -> None:
    inputs = {"image": ("<i>", ["AA", "B"]), "video": ("<i>d", ["vvv"]), "state": (None, ["never"])}
    found = expand("x<i>y<i>d<i>", inputs)
    assert found.text == "xAAyvvvB"
    assert found.order == [("image", 0), ("video", 0), ("image", 1)]
    assert expand("<i>", {}).text == "<i>"
    with pytest.raises(PromptError, match=r"0 audio placeholders \(<a>\) and 2 audio inputs were given; add an audio part"):
        expand("text", {"audio": ("<a>", ["1", "2"])})


def test_mismatched_files() -> None:
    assert image_text(PrefixPlaceholder(tokens_per_image=4), layout()) == ""
    assert image_tokens(PrefixPlaceholder(tokens_per_image=4), layout()) == 4
    with pytest.raises(PromptError, match="no grid of patches"):
        image_tokens(GRID, layout())
