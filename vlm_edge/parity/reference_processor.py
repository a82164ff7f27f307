"""transformers' processor of a checkpoint, also where its joint class wants packages for video that a comparison of pictures

does not need (torchvision for Qwen2-VL's, num2words for SmolVLM's).
"""

from __future__ import annotations

from typing import Any

import transformers

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.errors import ParityError


def load_processor(source: str, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The checkpoint's processor, whole where it can be had, else its image processor and tokenizer side by side.

    Raises ParityError when there is not even an image processor.
    """
    why: Exception | None = None
    try:
        found = _auto("AutoProcessor").from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(found, "image_processor", None) is not None:
            return found
    except (ImportError, OSError, ValueError) as error:
        why = error
    if checkpoint.video_processor and not checkpoint.image_processor:
        return Apart(_Stills(checkpoint.video_processor), checkpoint)
    try:
        images = _auto("AutoImageProcessor").from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise ParityError(f"The processor of {source} cannot be loaded: {why or error}") from error
    return _WITHOUT_VIDEO.get(str(checkpoint.config.model_type), Apart)(images, checkpoint)


class Apart:
    """An image processor and a tokenizer without the class that joins them: it cannot be called."""

    def __init__(self, images: Any, checkpoint: Checkpoint) -> None:
        self.image_processor, self.tokenizer = images, checkpoint.tokenizer

    def __call__(self, **given: Any) -> dict[str, Any]:
        raise ParityError("The checkpoint has no joint processor that can be loaded here.")


class _Stills:
    """InstructBlipVideoVideoProcessor for pictures: each is a video of as many equal frames as the model's processor counts on.

    It is BLIP's image processor on every frame, in a class that wants torchvision.
    """

    frames = 4

    def __init__(self, options: dict[str, Any]) -> None:
        images = _auto("BlipImageProcessorPil")
        known = {name: value for name, value in options.items() if hasattr(images, name) and value is not None}
        self._images = images(**known)

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
        pixels = self._images(images=images, return_tensors=return_tensors)["pixel_values"]
        return {"pixel_values": pixels[:, None].repeat(1, self.frames, 1, 1, 1)}


def _auto(name: str) -> Any:
    """A class of transformers, which leaves its constructors untyped."""
    return getattr(transformers, name)


class _Grid:
    """Qwen2VLProcessor for pictures alone: each image token becomes t · h · w / merge² of them (its `__call__`, 5.23)."""

    def __init__(self, images: Any, checkpoint: Checkpoint) -> None:
        self.image_processor, self._checkpoint = images, checkpoint
        self.tokenizer = checkpoint.tokenizer
        self._image_id = int(checkpoint.config.image_token_id)

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self._checkpoint.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return text

    def __call__(self, images: Any, text: list[str], return_tensors: str) -> dict[str, Any]:
        found = dict(self.image_processor(images=images, return_tensors=return_tensors)) if images else {}
        token = self.tokenizer.convert_ids_to_tokens(self._image_id)
        merge = int(self.image_processor.merge_size) ** 2
        parts = text[0].split(token)
        counts = [int(grid.prod()) // merge for grid in found.get("image_grid_thw", [])]
        if len(parts) != len(counts) + 1:
            raise ParityError(f"The chat template wrote {len(parts) - 1} image tokens for {len(counts)} pictures.")
        filled = parts[0] + "".join(token * n + part for n, part in zip(counts, parts[1:], strict=True))
        found.update(self.tokenizer([filled], return_tensors=return_tensors))
        found.pop("token_type_ids", None)
        found["mm_token_type_ids"] = (found["input_ids"] == self._image_id).int()
        return found


def _tiles(images: Any, checkpoint: Checkpoint) -> Any:
    """SmolVLM's processor treats pictures as Idefics3's does."""
    known = checkpoint.processor or {}
    return transformers.Idefics3Processor(
        image_processor=images,
        tokenizer=checkpoint.tokenizer,
        image_seq_len=int(known.get("image_seq_len", 169)),
        chat_template=checkpoint.chat_template,
    )


_WITHOUT_VIDEO: dict[str, Any] = {"qwen2_vl": _Grid, "smolvlm": _tiles}
