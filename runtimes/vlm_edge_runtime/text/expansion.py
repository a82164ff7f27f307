"""Writing out the placeholders of a prompt: images, videos and other inputs, each kind by its own token, in one pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_edge_runtime.errors import PromptError


@dataclass(slots=True, frozen=True)
class Expansion:
    """`text`: the prompt written out. `order`: (kind, index among that kind's inputs) of each placeholder, in turn."""

    text: str
    order: list[tuple[str, int]]


def expand(text: str, inputs: Mapping[str, tuple[str | None, Sequence[str]]]) -> Expansion:
    """The prompt with every placeholder replaced by what stands for its input.

    `inputs`: for each kind ("image", "video" …) the token of its placeholders, and the text for each of its inputs, in order.
    Inputs of a kind without a token (None) are not in the text. Raises PromptError when a kind's placeholders and inputs are not
    equally many.
    """
    kinds = {token: kind for kind, (token, _) in inputs.items() if token}
    # The longest first: one token may begin like another.
    pieces = re.split("|".join(f"({re.escape(token)})" for token in sorted(kinds, key=len, reverse=True)) or "(?!)", text)
    found = [piece for piece in pieces if piece in kinds]
    for token, kind in kinds.items():
        _check_count(kind, found.count(token), len(inputs[kind][1]), token)
    written: list[str] = []
    order: list[tuple[str, int]] = []
    used = dict.fromkeys(inputs, 0)
    for piece in pieces:
        if piece not in kinds:
            written.append(piece or "")
            continue
        kind = kinds[piece]
        written.append(inputs[kind][1][used[kind]])
        order.append((kind, used[kind]))
        used[kind] += 1
    return Expansion("".join(written), order)


def _check_count(kind: str, placeholders: int, given: int, token: str) -> None:
    if placeholders != given:
        article = "an" if kind[0] in "aeiou" else "a"
        hint = f"add {article} {kind} part per {kind}" if placeholders < given else f"pass {article} {kind} for each"
        plural = {"audio": "audio inputs"}.get(kind, f"{kind}s")
        given_ones = f"{given} {plural} were" if given != 1 else f"1 {kind} was"
        raise PromptError(
            f"the prompt has {placeholders} {kind} placeholder{'s' * (placeholders != 1)} ({token}) and {given_ones} given; "
            f"{hint}"
        )
