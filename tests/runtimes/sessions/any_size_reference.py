"""transformers' own answers of models whose images become different numbers of tokens.

Most of their joint processors want torchvision and cannot be made here. Their image processors can (the PIL ones), and what the
joint ones do besides, writing out the placeholders, is their own methods where they can be imported, and spelt out where not.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoImageProcessor, GotOcr2ImageProcessorPil
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata
from transformers_reference import Reference

from vlm_edge_runtime.preprocess import EncodedImage


class AnySizeReference(Reference):
    """A checkpoint of LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen, Pixtral or Mistral 3 in PyTorch."""

    def inputs(self, text: str, images) -> dict[str, torch.Tensor]:
        """What `generate` takes for one prompt with its image placeholders."""
        if self.kind == "llava_next":
            return super().inputs(text, images)
        token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        found: dict[str, Any] = {}
        written: list[str] = []
        if images:
            found, written = _WRITERS[self.kind](self, list(images), token)
        before, *parts = text.split(getattr(self.tokenizer, "image_token", token))
        assert len(parts) == len(written)
        text = before + "".join(one + part for one, part in zip(written, parts, strict=True))
        found |= dict(self.tokenizer(text, return_tensors="pt"))
        found.pop("token_type_ids", None)
        if self.kind.startswith("qwen"):
            found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).long()
        return found

    def video_inputs(self, text: str, video: EncodedImage, metadata: VideoMetadata) -> dict[str, torch.Tensor]:
        """What `generate` takes for a prompt with one video, given its preprocessed pixels and what is known of it."""
        config = self.model.config
        arrays, number = video.arrays["pixel_values"], getattr(config, "video_token_id", None)
        token = self.tokenizer.video_token
        pixels, stand_in = torch.from_numpy(arrays), SimpleNamespace(**{**self.own, "video_token": token})
        found: dict[str, Any] = {"pixel_values_videos": pixels[None] if self.kind == "llava_onevision" else pixels}
        given: dict[str, Any] = {"pixel_values_videos": pixels[None], "video_metadata": [metadata]}
        if self.kind.startswith("qwen"):
            found["video_grid_thw"] = given["video_grid_thw"] = torch.tensor([video.grid])
            stand_in.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
            stand_in.vision_start_token, stand_in.vision_end_token = "<|vision_start|>", "<|vision_end|>"
            stand_in._calculate_timestamps = Qwen3VLProcessor._calculate_timestamps.__get__(stand_in)
        if self.kind == "qwen2_5_vl":
            found["second_per_grid_ts"] = torch.tensor([2 / metadata.sampled_fps])
        if self.kind == "internvl":
            found = {"pixel_values": pixels}
            stand_in.start_image_token, stand_in.end_image_token = (
                self.tokenizer.start_image_token,
                self.tokenizer.end_image_token,
            )
            stand_in.image_token, number = self.tokenizer.context_image_token, config.image_token_id
        written = _VIDEO_WRITERS[self.kind].replace_video_token(stand_in, given, 0)
        found |= dict(self.tokenizer(text.replace(token, written), return_tensors="pt"))
        found.pop("token_type_ids", None)
        if self.kind.startswith("qwen"):
            found["mm_token_type_ids"] = 2 * (found["input_ids"] == number).long()
        return found

    @torch.inference_mode()
    def generate_from(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
        """Greedy new tokens."""
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    @property
    def own(self) -> dict[str, Any]:
        """processor_config.json, by which the joint processor is made."""
        file = self.folder / "processor_config.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def images(self, images: list[Any], **options: Any) -> dict[str, Any]:
        """What the image processor makes of them."""
        return dict(AutoImageProcessor.from_pretrained(self.folder, backend="pil")(images, return_tensors="pt", **options))


def _qwen(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    found = reference.images(images)
    return found, [token * (int(grid.prod()) // 4) for grid in found["image_grid_thw"]]


def _onevision(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    found, own = reference.images(images), reference.own
    joint = SimpleNamespace(**own, image_processor=AutoImageProcessor.from_pretrained(reference.folder, backend="pil"))
    for name in ("_get_number_of_features", "_get_unpadded_features"):
        setattr(joint, name, getattr(LlavaOnevisionProcessor, name).__get__(joint))
    return found, [LlavaOnevisionProcessor.replace_image_token(joint, found, index) for index in range(len(images))]


def _internvl(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    found, words = reference.images(images, **InternVLProcessor.images_kwargs), reference.tokenizer
    joint = SimpleNamespace(
        start_image_token=words.start_image_token,
        end_image_token=words.end_image_token,
        image_token=token,
        image_seq_length=reference.own["image_seq_length"],
    )
    written = [InternVLProcessor.replace_image_token(joint, found, index) for index in range(len(images))]
    del found["num_patches"]
    return found, written


def _aya_vision(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    found, own = reference.images(images, **AyaVisionProcessor.images_kwargs), reference.own
    joint = SimpleNamespace(
        start_of_img_token="<|START_OF_IMG|>",
        end_of_img_token="<|END_OF_IMG|>",
        img_patch_token=token,
        tile_token="TILE",
        tile_global_token="TILE_GLOBAL",
        patch_size=own["patch_size"] * own["downsample_factor"],
        img_size=own["img_size"],
    )
    written = [AyaVisionProcessor.replace_image_token(joint, found, index) for index in range(len(images))]
    del found["num_patches"]
    return found, written


def _least_scaled(size: tuple[int, int], tile: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """`get_optimal_tiled_canvas` of transformers' image_processing_cohere2_vision.py: (columns, rows)."""
    grids = sorted(
        ((w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most), key=lambda one: one[0] * one[1]
    )
    scales = (np.array(grids) * tile[0] / np.stack([size[1], size[0]])).min(-1, keepdims=True)
    if (scales < 1).all():
        return grids[int(scales.argmax())]
    return grids[int(np.where(scales < 1.0, 10e9, scales).argmin())]


def _cohere2_vision(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    """Its image processor needs torchvision: GotOcr2's with its rule for the tiles, which is spelt out."""
    options = {key: reference.own["image_processor"][key] for key in ("size", "resample", "crop_to_patches", "max_patches")}
    with patch.object(image_processing_pil_got_ocr2, "get_optimal_tiled_canvas", _least_scaled):
        found = dict(GotOcr2ImageProcessorPil(**options)(images, return_tensors="pt"))
    words = reference.tokenizer
    joint = SimpleNamespace(
        boi_token=words.boi_token,
        eoi_token=words.eoi_token,
        image_token=token,
        img_line_break_token=words.img_line_break_token,
        patch_size=2,
    )
    written = [Cohere2VisionProcessor.replace_image_token(joint, found, index) for index in range(len(images))]
    del found["num_patches"]
    return found, written


def _pixtral(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    """PixtralProcessor's module imports torchvision: its two methods, spelt out."""
    own = reference.own
    side = own["patch_size"] * own["spatial_merge_size"]
    found = reference.images(images, patch_size={"height": side, "width": side})
    written = []
    for height, width in found["image_sizes"].tolist():
        rows = [[token] * (width // side) + [own["image_break_token"]]] * (height // side)
        flat = [each for row in rows for each in row]
        written.append("".join([*flat[:-1], own["image_end_token"]]))
    return found, written


def _lighton_ocr(reference: AnySizeReference, images: list[Any], token: str) -> tuple[dict[str, Any], list[str]]:
    found, _ = _pixtral(reference, images, token)
    side = reference.own["patch_size"] * reference.own["spatial_merge_size"]
    return found, [token * int(height // side * (width // side)) for height, width in found["image_sizes"].tolist()]


_VIDEO_WRITERS = {
    "qwen2_vl": Qwen2_5_VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    "internvl": InternVLProcessor,
}
_WRITERS = {
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "llava_onevision": _onevision,
    "internvl": _internvl,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "llava": _pixtral,
    "mistral3": _pixtral,
    "lighton_ocr": _lighton_ocr,
}
