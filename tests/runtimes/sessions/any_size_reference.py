"""transformers' own answers of models whose images become different numbers of tokens.

Most of their joint processors want torchvision and cannot be made here. Their image processors can (the PIL ones), and what the
joint ones do besides, writing out the placeholders, is their own methods where they can be imported, and spelt out where not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoImageProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers_reference import Reference


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
        before, *parts = text.split(token)
        assert len(parts) == len(written)
        text = before + "".join(one + part for one, part in zip(written, parts, strict=True))
        found |= dict(self.tokenizer(text, return_tensors="pt"))
        found.pop("token_type_ids", None)
        if self.kind.startswith("qwen"):
            found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).long()
        return found

    @property
    def own(self) -> dict[str, Any]:
        """processor_config.json, by which the joint processor is made."""
        import json

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


_WRITERS = {
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "llava_onevision": _onevision,
    "internvl": _internvl,
    "llava": _pixtral,
    "mistral3": _pixtral,
}
