"""From a prompt and its images to what the decoder reads: token ids, content ids, positions, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Decoder
from vlm_edge_runtime.errors import BundleError, PromptError
from vlm_edge_runtime.text import (
    ChatTemplate,
    Message,
    expand_text,
    image_tokens,
    load_chat_template,
    load_tokenizer,
    position_ids,
)

from .images import Floats, ImageStore, Picture

Ids = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class PromptRow:
    """One prompt, ready to run.

    `input_ids` int64 [S], `content_ids` int64 [S] (see prefix_cache), `positions` int64 [S] or [3, S] (M-RoPE), and the
    position of the first token after them. `starts` and `counts`: where each picture's image tokens begin, and how many
    there are; a picture's own tokens may be interleaved with markers (tiles).
    """

    input_ids: Ids
    content_ids: Ids
    positions: Ids
    next_position: int
    image_token_id: int
    pictures: list[Picture]
    counts: list[int]
    image_at: Ids
    """Indices of all image tokens, in order."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def image_tokens(self) -> int:
        """Tokens that stand for image features."""
        return len(self.image_at)

    def pictures_from(self, start: int) -> list[Picture]:
        """The pictures that have an image token at `start` or later."""
        last = np.cumsum(self.counts) - 1
        return [picture for picture, index in zip(self.pictures, last, strict=True) if self.image_at[index] >= start]

    def features(self, start: int, end: int, by_key: Mapping[str, Floats]) -> list[Floats]:
        """Feature rows of the image tokens in [start, end), in order. `by_key` holds those of `pictures_from(start)`."""
        first, last = np.searchsorted(self.image_at, (start, end))
        parts, offset = [], 0
        for picture, count in zip(self.pictures, self.counts, strict=True):
            low, high = max(first - offset, 0), min(last - offset, count)
            if low < high:
                rows = by_key[picture.key]
                if len(rows) != count:
                    raise BundleError(
                        f"the vision graphs gave {len(rows)} features for an image of {count} tokens: export again."
                    )
                parts.append(rows[low:high])
            offset += count
        return parts


class PromptBuilder:
    """Renders, expands, tokenises and places prompts, from the bundle's files alone."""

    def __init__(self, bundle: Bundle, contract: GenerativeContract, images: ImageStore) -> None:
        self._bundle = bundle
        self._contract = contract
        self._images = images
        self.tokenizer = load_tokenizer(bundle)
        self._template = load_chat_template(bundle, self.tokenizer.special_tokens)
        image = contract.modality("image")
        if image is None or image.placeholder is None or image.token_id is None:
            raise BundleError(f"{bundle.path} has no placeholder for images: export it again.")
        self._placeholder, self._token_id = image.placeholder, image.token_id
        self._token = image.placeholder.image_token

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises PromptError when the bundle has none."""
        if self._template is None:
            raise PromptError(
                f"{self._bundle.path} has no chat template (chat_template.jinja): it cannot be asked in messages. Use generate() "
                f"with a plain prompt that holds one {self._token!r} for each image."
            )
        return self._template

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def row(self, prompt: str | Sequence[Message], images: Sequence[Any], *, raw: bool = False) -> PromptRow:
        """One prompt with its images in order. Raises PromptError, ImageError."""
        text, pictures = self._render(prompt, images, raw)
        expanded = expand_text(text, self._placeholder, [picture.layout for picture in pictures])
        ids = np.asarray(self.tokenizer.encode(expanded, self._adds_special_tokens(text)), dtype=np.int64)
        return self._place(ids, pictures)

    def embed(self, decoder: Decoder, prompt: PromptRow, start: int, end: int, by_key: Mapping[str, Floats]) -> Floats:
        """Embeddings float32 [end − start, hidden] with image features in the places of image tokens."""
        ids = np.ascontiguousarray(prompt.input_ids[start:end])
        embeds = decoder.embed(ids)
        parts = prompt.features(start, end, by_key)
        if parts:
            embeds = np.require(embeds, np.float32, ["C", "W"])
            _native.merge_features(embeds, ids, prompt.image_token_id, np.concatenate(parts))
        return embeds

    def _render(self, prompt: str | Sequence[Message], images: Sequence[Any], raw: bool) -> tuple[str, list[Picture]]:
        if not isinstance(prompt, str):
            messages, images = _with_images(prompt, images)
            text = self.require_template().render(messages, add_generation_prompt=True)
        elif raw or self._token in prompt or self._template is None:
            text = prompt
        else:
            content = [{"type": "image"} for _ in images]
            content.append({"type": "text", "text": prompt})
            text = self._template.render([{"role": "user", "content": content}], add_generation_prompt=True)
        if not text:
            raise PromptError("the prompt is empty: there is nothing to answer.")
        return text, [self._images.picture(image) for image in images]

    def _adds_special_tokens(self, text: str) -> bool:
        """As transformers' processors: a template that writes the beginning of sequence itself gets no second one."""
        beginning = self.tokenizer.special_tokens.get("bos_token")
        return not (beginning and text.startswith(beginning))

    def _place(self, ids: Ids, pictures: list[Picture]) -> PromptRow:
        contract = self._contract
        image_at = np.flatnonzero(ids == self._token_id).astype(np.int64)
        layouts = [picture.layout for picture in pictures]
        counts = [image_tokens(self._placeholder, layout) for layout in layouts]
        if sum(counts) != len(image_at):
            raise PromptError(
                f"the prompt has {len(image_at)} image tokens (id {self._token_id}), its {len(pictures)} images make "
                f"{sum(counts)}: does the text itself spell {self._token!r}?"
            )
        content = ids.copy()
        content[image_at] = np.repeat(np.asarray([picture.content_id for picture in pictures], dtype=np.int64), counts)
        positions, next_position = position_ids(contract.positions, ids, layouts)
        return PromptRow(
            input_ids=ids,
            content_ids=content,
            positions=positions,
            next_position=next_position,
            image_token_id=self._token_id,
            pictures=pictures,
            counts=counts,
            image_at=image_at,
        )


def as_images(images: Any) -> list[Any]:
    """One image, a list of images or None, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def as_rows(prompt: Any, images: Any) -> tuple[list[tuple[str | Sequence[Message], list[Any]]], bool]:
    """(prompt, its images) for each row, and whether a single prompt was given. Raises PromptError for what fits neither."""
    if _is_prompt(prompt):
        return [(prompt, as_images(images))], True
    if not isinstance(prompt, Sequence) or not prompt or not all(_is_prompt(each) for each in prompt):
        raise PromptError(
            "expected a text, a list of chat messages, or a list of at least one of these; "
            f"found {type(prompt).__name__} {prompt!r:.60}."
        )
    if images is None:
        images = [None] * len(prompt)
    if not isinstance(images, (list, tuple)) or len(images) != len(prompt):
        found = f"{len(images)} entries" if isinstance(images, (list, tuple)) else f"one {type(images).__name__}"
        raise PromptError(
            f"{len(prompt)} prompts were given and images={found}: give one entry for each prompt "
            "(an image, a list of images, or None)."
        )
    return [(text, as_images(own)) for text, own in zip(prompt, images, strict=True)], False


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _with_images(messages: Sequence[Message], images: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages without image objects, and all images in the order of their parts: those in a part, else the next of `images`."""
    left = list(images)
    found: list[Any] = []
    plain: list[dict[str, Any]] = []
    for message in messages:
        if "role" not in message or "content" not in message:
            raise PromptError(f"a chat message needs a role and a content; found {sorted(message)}.")
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if not isinstance(part, Mapping) or "type" not in part:
                    raise PromptError(f"a part of a message needs a type (text or image); found {part!r:.60}.")
                if part["type"] == "image":
                    own = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
                    if own is None and not left:
                        raise PromptError("the messages have more image parts than images were given: give an image for each.")
                    found.append(left.pop(0) if own is None else own)
                    part = {"type": "image"}
                parts.append(dict(part))
            content = parts
        plain.append({**message, "content": content})
    return plain, [*found, *left]
