"""What stands for an image in a prompt: how much text one placeholder becomes, and how many tokens of features that holds.

The same text that the processors of transformers write before they tokenise (LlavaProcessor, Idefics3Processor, Gemma3Processor,
Qwen2VLProcessor …). It depends on how the image was cut up, so the encoded images are needed. Each kind of placeholder is a
struct of the manifest and one line of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vlm_edge_runtime.bundle.manifest import (
    CropsPlaceholder,
    FencedPlaceholder,
    FixedPlaceholder,
    GridPlaceholder,
    Placeholder,
    PrefixPlaceholder,
    TilePlaceholder,
)
from vlm_edge_runtime.errors import BundleError, PromptError

from .expansion import expand
from .vision_placeholders import VISION_RULES


class ImageLayout(Protocol):
    """What is read of an `EncodedImage`."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int] | None: ...


@dataclass(slots=True, frozen=True)
class Rule:
    """`tokens(placeholder, image)`: rows of features that one image takes. `text(placeholder, image)`: what replaces its token.

    Both raise PromptError when the image's layout is of another kind.
    """

    tokens: Callable[[Any, ImageLayout], int]
    text: Callable[[Any, ImageLayout], str]


def image_tokens(placeholder: Placeholder, image: ImageLayout) -> int:
    """How many image tokens (rows of features) one image takes. Raises PromptError when its layout is of another kind."""
    return _rule(placeholder).tokens(placeholder, image)


def image_text(placeholder: Placeholder, image: ImageLayout) -> str:
    """What replaces the one placeholder of an image in the prompt's text."""
    return _rule(placeholder).text(placeholder, image)


def placeholder_token(placeholder: Placeholder | None) -> str | None:
    """What stands for an image in the prompt before it is written out; None where nothing does."""
    return getattr(placeholder, "image_token", None)


def joined(placeholder: Placeholder | None, text: str) -> str:
    """The prompt written out, as it is when images follow each other: fenced ones share the fence between them."""
    if not isinstance(placeholder, FencedPlaceholder):
        return text
    token, fence = placeholder.image_token, placeholder.fence
    return text.replace(f"{token}{fence}{fence}{token}", f"{token}{fence}{token}")


def expand_text(text: str, placeholder: Placeholder, images: Sequence[ImageLayout]) -> str:
    """The prompt with each image token written out for its image, in order.

    Raises PromptError when the prompt has more or fewer image tokens than there are images.
    """
    token = placeholder_token(placeholder)
    return expand(text, {"image": (token, [image_text(placeholder, image) for image in images])}).text


def _rule(placeholder: Placeholder) -> Rule:
    rule = RULES.get(type(placeholder))
    if rule is None:
        raise BundleError(f"this version does not know placeholders of kind {type(placeholder).__name__}: update vlm-edge.")
    return rule


def _repeated(placeholder: Any, image: ImageLayout) -> str:
    token: str = placeholder.image_token
    return token * image_tokens(placeholder, image)


def _fixed_text(placeholder: FixedPlaceholder, image: ImageLayout) -> str:
    return placeholder.before + placeholder.image_token * placeholder.tokens_per_image + placeholder.after


def _crops_text(placeholder: CropsPlaceholder, image: ImageLayout) -> str:
    frame = f"{placeholder.before}{placeholder.soft_token * placeholder.tokens_per_image}{placeholder.after}"
    crops = " ".join([frame] * (image.rows * image.columns))
    return placeholder.crops.format(image=frame, crops=crops) if crops else frame


def _tiles_text(placeholder: TilePlaceholder, image: ImageLayout) -> str:
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


def _grid_tokens(placeholder: GridPlaceholder, image: ImageLayout) -> int:
    if image.grid is None:
        raise PromptError("the image has no grid of patches; the bundle's image processor does not fit its placeholder rule")
    time, height, width = image.grid
    return time * height * width // placeholder.merge_size**2


RULES: dict[type, Rule] = {
    FixedPlaceholder: Rule(lambda one, _: int(one.tokens_per_image), _fixed_text),
    FencedPlaceholder: Rule(lambda *_: 1, lambda one, _: f"{one.fence}{one.image_token}{one.fence}"),
    PrefixPlaceholder: Rule(lambda one, _: int(one.tokens_per_image), lambda *_: ""),
    TilePlaceholder: Rule(lambda one, image: one.tokens_per_tile * (image.rows * image.columns + 1), _tiles_text),
    CropsPlaceholder: Rule(lambda one, image: one.tokens_per_image * (image.rows * image.columns + 1), _crops_text),
    GridPlaceholder: Rule(_grid_tokens, _repeated),
    **{kind: Rule(*rule) for kind, rule in VISION_RULES.items()},
}
"""How each kind of placeholder is written out."""
