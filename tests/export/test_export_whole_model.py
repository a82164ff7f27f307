"""The graphs put together give the logits of transformers' own forward pass: image merge, prefill, and decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from portable import Portable
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.vision_utils import get_vision_position_ids

from vlm_edge.export.check import TOLERANCE, difference

STEPS = 12
"""Tokens decoded after the prompt: past the sliding window of the models that have one."""


def _image(seed: int, width: int = 48, height: int = 40) -> np.ndarray:
    smooth = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return np.kron(smooth, np.ones((height // 6 + 1, width // 6 + 1, 1), np.uint8))[:height, :width]


def _compare(portable: Portable, model, inputs: dict[str, torch.Tensor], images: list[dict[str, np.ndarray]], positions=None):
    """Prefill with images, then greedy decoding, each step beside transformers with its own cache and masks."""
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    features = np.concatenate([portable.features(**one) for one in images]) if images else None
    if positions is None:
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        # Given to the original too: left to itself it counts the padding, as generate() does not.
        inputs["position_ids"] = torch.from_numpy(positions)
    logits = portable.step(portable.embed(ids, features), mask, positions)
    with torch.no_grad():
        reference = model(**inputs, use_cache=True)
    assert difference(logits, reference.logits.numpy(), mask[..., None]).within
    cache, token = reference.past_key_values, reference.logits[:, -1:].argmax(-1)
    place = positions[..., -1:].max(axis=0) if positions.ndim == 3 else positions[:, -1:]
    for _ in range(STEPS):
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        place = place + 1
        now = np.stack([place] * 3) if positions.ndim == 3 else place
        logits = portable.step(portable.embed(token.numpy()), mask, now)
        with torch.no_grad():
            reference = model(
                input_ids=token,
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(now),
                past_key_values=cache,
                use_cache=True,
            )
        one = difference(logits, reference.logits.numpy())
        assert one.within, f"{one} > {TOLERANCE}"
        cache, token = reference.past_key_values, reference.logits[:, -1:].argmax(-1)


LLAVAS = [
    "llava-llama",
    pytest.param("llava-mistral", marks=pytest.mark.slow),
    "llava-gemma2",
    pytest.param("vipllava", marks=pytest.mark.slow),
    *(
        pytest.param(f"llava-{text}", marks=pytest.mark.slow)
        for text in ("opt", "gpt2", "qwen2", "qwen3", "phi3", "gemma", "gemma3")
    ),
]


@pytest.mark.parametrize("name", LLAVAS)
def test_llava(name, tiny_checkpoint, portable_bundle):
    folder = tiny_checkpoint(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompts = ["USER: <image>\nwhat is this? ASSISTANT:", "USER: <image>\n<image>\nhow many shapes are in the two? ASSISTANT:"]
    inputs = processor(images=[_image(0), _image(1), _image(2)], text=prompts, padding=True, return_tensors="pt")
    inputs.pop("mm_token_type_ids", None)
    assert (inputs["attention_mask"] == 0).any()  # the shorter prompt is padded on the left
    _compare(Portable(portable_bundle(name)), model, dict(inputs), [{"pixel_values": inputs["pixel_values"].numpy()}])


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("idefics3", marks=pytest.mark.slow)])
def test_tiles(name, tiny_checkpoint, portable_bundle):
    folder = tiny_checkpoint(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompts = ["USER: <image>what is this?\nASSISTANT:", "USER: <image>and<image>how many?\nASSISTANT:"]
    images = [[_image(0)], [_image(1, 64, 20), _image(2, 30, 30)]]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    inputs.pop("mm_token_type_ids", None)
    pixels = inputs["pixel_values"].numpy()
    pixels = pixels.reshape(-1, *pixels.shape[2:])
    real = np.abs(pixels).sum(axis=(1, 2, 3)) != 0  # rows that only fill the batch are all zero
    _compare(Portable(portable_bundle(name)), model, dict(inputs), [{"pixel_values": pixels[real]}])


def test_qwen2_vl(tiny_checkpoint, portable_bundle):
    folder = tiny_checkpoint("qwen2_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    # Qwen2VLProcessor also wants a video processor, and with it torchvision: its parts do the same.
    images = AutoImageProcessor.from_pretrained(folder)([_image(0), _image(1, 90, 30), _image(2, 20, 70)], return_tensors="pt")
    grids = images["image_grid_thw"]
    merge = model.config.vision_config.spatial_merge_size
    runs = ["<|vision_start|>" + "<|image_pad|>" * int(grid.prod() // merge**2) + "<|vision_end|>" for grid in grids]
    assert len({len(run) for run in runs}) > 1  # images of different sizes
    prompts = [f"USER: {runs[0]}what is this? ASSISTANT:", f"USER: {runs[1]}and {runs[2]}what are these? ASSISTANT:"]
    text = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    inputs = {
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "pixel_values": images["pixel_values"],
        "image_grid_thw": grids,
        "mm_token_type_ids": (text["input_ids"] == model.config.image_token_id).int(),
    }
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=grids, attention_mask=inputs["attention_mask"]
    )
    rows = torch.split(images["pixel_values"], [int(grid.prod()) for grid in grids])
    each = [
        {"pixel_values": row.numpy(), "position_ids": get_vision_position_ids(grid[None], merge).numpy()}
        for row, grid in zip(rows, grids, strict=True)
    ]
    _compare(Portable(portable_bundle("qwen2_vl")), model, inputs, each, positions.numpy())


@pytest.mark.parametrize("name", ["llava-llama", "qwen2_vl"])
def test_text_without_images(name, tiny_checkpoint, portable_bundle):
    folder = tiny_checkpoint(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    text = AutoTokenizer.from_pretrained(folder)(["describe the sea", "a house"], padding=True, return_tensors="pt")
    inputs = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    positions = np.maximum(inputs["attention_mask"].numpy().cumsum(-1) - 1, 0)
    if name == "qwen2_vl":
        positions = np.stack([positions] * 3)
    inputs["position_ids"] = torch.from_numpy(positions)
    _compare(Portable(portable_bundle(name)), model, inputs, [], positions)
