"""What callers pass in beside the prompt: one input, a list, or a list for each row; and the parts of chat messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.text import Message

from .media import Medium
from .prefetched import Prefetched, unwrapped
from .readers import is_one_vector, is_one_video

Given: TypeAlias = "dict[str, list[Any]]"
"""Inputs of one row by kind ("image", "video", "audio", "state"), in order."""

ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "state": "states"}
"""Which argument each kind is passed as."""

_IS_ONE: dict[str, Callable[[Any], bool]] = {
    "image": lambda value: not isinstance(value, (list, tuple)),
    "video": is_one_video,
    "audio": is_one_vector(2),
    "state": is_one_vector(1),
}
# Where a part of a message may hold its input.
_PART_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url"), "audio": ("audio",), "state": ("state",)}


def as_list(kind: str, value: Any) -> list[Any]:
    """One input, a list of them or None, as a list."""
    if value is None:
        return []
    if isinstance(value, (Medium, Prefetched)):
        return unwrapped([value])
    if isinstance(value, (list, tuple)) and (not value or any(isinstance(each, (Medium, Prefetched)) for each in value)):
        return unwrapped(value)
    if _IS_ONE[kind](value):
        return [value]
    return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]


def as_images(images: Any) -> list[Any]:
    """One image, a list of images or None, as a list."""
    return as_list("image", images)


def as_given(arguments: Mapping[str, Any]) -> Given:
    """One row's inputs, from arguments by kind; kinds without any are left out."""
    lists = {kind: as_list(kind, value) for kind, value in arguments.items()}
    return {kind: values for kind, values in lists.items() if values}


def as_rows(prompt: Any, arguments: Mapping[str, Any]) -> tuple[list[tuple[str | Sequence[Message], Given]], bool]:
    """(prompt, its inputs) for each row, and whether a single prompt was given. Raises PromptError for what fits neither.

    `arguments`: by kind, what was passed.
    """
    if _is_prompt(prompt):
        return [(prompt, as_given(arguments))], True
    if not isinstance(prompt, Sequence) or not prompt or not all(_is_prompt(each) for each in prompt):
        raise PromptError(
            "expected a text, a list of chat messages, or a list of at least one of these; "
            f"found {type(prompt).__name__} {prompt!r:.60}."
        )
    count = len(prompt)
    for kind, value in arguments.items():
        if value is not None and (not isinstance(value, (list, tuple)) or len(value) != count):
            found = f"{len(value)} entries" if isinstance(value, (list, tuple)) else f"one {type(value).__name__}"
            raise PromptError(
                f"{count} prompts were given and {ARGUMENTS[kind]}={found}: give one entry for each prompt "
                f"({_entry(kind)}, a list of them, or None)."
            )
    given = {kind: value for kind, value in arguments.items() if value is not None}
    rows = [(each, as_given({kind: value[row] for kind, value in given.items()})) for row, each in enumerate(prompt)]
    return rows, False


def with_inputs(messages: Sequence[Message], given: Given) -> tuple[list[dict[str, Any]], Given]:
    """Messages without input objects, and each kind's inputs in the order of their parts: the part's own, else the next given.

    Raises PromptError for malformed messages, or more parts of a kind than inputs.
    """
    left = {kind: list(values) for kind, values in given.items()}
    found: Given = {}
    plain: list[dict[str, Any]] = []
    for message in messages:
        if "role" not in message or "content" not in message:
            raise PromptError(f"a chat message needs a role and a content; found {sorted(message)}.")
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if not isinstance(part, Mapping) or "type" not in part:
                    raise PromptError(f"a part of a message needs a type (text, image …); found {part!r:.60}.")
                kind = part["type"]
                if kind in ARGUMENTS:
                    own = next((part[key] for key in _PART_KEYS[kind] if part.get(key) is not None), None)
                    if own is None and not left.get(kind):
                        raise PromptError(
                            f"the messages have more {kind} parts than {ARGUMENTS[kind]} were given: give one for each."
                        )
                    found.setdefault(kind, []).append(left[kind].pop(0) if own is None else own)
                    part = {"type": kind}
                parts.append(dict(part))
            content = parts
        plain.append({**message, "content": content})
    for kind, values in left.items():
        if values:
            found.setdefault(kind, []).extend(values)
    return plain, found


def said(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user's message: what an instruction is taken from."""
    for message in reversed(messages):
        if message["role"] == "user":
            content = message["content"]
            return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
    return ""


def _entry(kind: str) -> str:
    return {"image": "an image", "video": "a video", "audio": "an array of features", "state": "a vector"}[kind]


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Mapping) for each in value)
