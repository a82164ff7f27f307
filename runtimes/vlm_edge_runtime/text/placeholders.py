"""Image placeholders: one token in the prompt per image becomes as many as the language model will be given features for.

The same text that transformers' LlavaProcessor, Idefics3Processor, SmolVLMProcessor and Qwen2VLProcessor write before they
tokenise. What stands for an image depends on how it was cut up, so the encoded images are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vlm_edge_runtime.bundle.manifest import CropsPlaceholder, FixedPlaceholder, GridPlaceholder, Placeholder, TilePlaceholder
from vlm_edge_runtime.errors import BundleError, PromptError


class ImageLayout(Protocol):
    """What is read of an `EncodedImage`."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int] | None: ...


class Encodes(Protocol):
    """What is read of a `Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def token_id(self, token: str) -> int | None: ...


def image_tokens(placeholder: Placeholder, image: ImageLayout) -> int:
    """How many image tokens (rows of features) one image takes. Raises PromptError when its layout is of another kind."""
    if isinstance(placeholder, FixedPlaceholder):
        return placeholder.tokens_per_image
    if isinstance(placeholder, TilePlaceholder):
        return placeholder.tokens_per_tile * (image.rows * image.columns + 1)
    if isinstance(placeholder, CropsPlaceholder):
        return placeholder.tokens_per_image * (image.rows * image.columns + 1)
    if image.grid is None:
        raise PromptError("the image has no grid of patches; the bundle's image processor does not fit its placeholder rule")
    time, height, width = image.grid
    return time * height * width // placeholder.merge_size**2


def image_text(placeholder: Placeholder, image: ImageLayout) -> str:
    """What replaces the one placeholder of an image in the prompt's text."""
    if isinstance(placeholder, (FixedPlaceholder, GridPlaceholder)):
        return placeholder.image_token * image_tokens(placeholder, image)
    if isinstance(placeholder, CropsPlaceholder):
        frame = f"{placeholder.before}{placeholder.soft_token * placeholder.tokens_per_image}{placeholder.after}"
        crops = " ".join([frame] * (image.rows * image.columns))
        return placeholder.crops.format(image=frame, crops=crops) if crops else frame
    tile = placeholder.image_token * placeholder.tokens_per_tile
    # The whole image comes last, and alone when it was not split: then without the newline before it.
    whole = f"{placeholder.fake_token}{placeholder.global_token}{tile}{placeholder.fake_token}"
    if not image.rows or not image.columns:
        return whole
    rows = [
        "".join(
            f"{placeholder.fake_token}{placeholder.row_column_format.format(row=row, column=column)}{tile}"
            for column in range(1, image.columns + 1)
        )
        for row in range(1, image.rows + 1)
    ]
    return "\n".join(rows) + f"\n\n{whole}"


def expand_text(text: str, placeholder: Placeholder, images: Sequence[ImageLayout]) -> str:
    """The prompt with each image token written out for its image, in order.

    Raises PromptError when the prompt has more or fewer image tokens than there are images.
    """
    parts = text.split(placeholder.image_token)
    _check_count(len(parts) - 1, len(images), placeholder.image_token)
    expanded = [parts[0]]
    for image, part in zip(images, parts[1:], strict=True):
        expanded += (image_text(placeholder, image), part)
    return "".join(expanded)


def expand_ids(ids: Sequence[int], placeholder: Placeholder, images: Sequence[ImageLayout], tokenizer: Encodes) -> list[int]:
    """As `expand_text`, on token ids with one image token per image.

    Raises PromptError for a wrong number of image tokens, BundleError when the tokenizer does not know the image token.
    """
    image_id = tokenizer.token_id(placeholder.image_token)
    if image_id is None:
        raise BundleError(f"the tokenizer has no token {placeholder.image_token!r}, which the manifest names as the image token")
    _check_count(sum(token == image_id for token in ids), len(images), placeholder.image_token)
    remaining = iter(images)
    expanded: list[int] = []
    for token in ids:
        if token != image_id:
            expanded.append(token)
        elif isinstance(placeholder, (TilePlaceholder, CropsPlaceholder)):
            # Two newlines may be one token, so the frame is tokenised as a whole.
            expanded += tokenizer.encode(image_text(placeholder, next(remaining)), add_special_tokens=False)
        else:
            expanded += [image_id] * image_tokens(placeholder, next(remaining))
    return expanded


def _check_count(placeholders: int, images: int, token: str) -> None:
    if placeholders != images:
        hint = "add an image part per image" if placeholders < images else "pass an image for each"
        raise PromptError(
            f"the prompt has {placeholders} image placeholder{'s' * (placeholders != 1)} ({token}) and "
            f"{images} image{'s were' if images != 1 else ' was'} given; {hint}"
        )
