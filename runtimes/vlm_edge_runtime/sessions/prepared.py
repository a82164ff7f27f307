"""A prompt as the model reads it, for whoever compares it with another implementation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(slots=True, frozen=True)
class PreparedInput:
    """One image, video … of a prompt. `kind`: its modality's. `arrays`: what the processor made of it, by name."""

    kind: str
    arrays: dict[str, npt.NDArray[np.generic]]


@dataclass(slots=True, frozen=True)
class PreparedPrompt:
    """A prompt before any graph has run.

    `token_ids`: the prompt's tokens, image tokens written out, as the model's own processor gives them. `decoder_ids`: what the
    decoder begins with, where that is something else (`start_tokens`; an encoder reads `token_ids`). `inputs`: in the order of
    their places in the prompt.
    """

    token_ids: list[int]
    decoder_ids: list[int]
    inputs: list[PreparedInput] = field(default_factory=list)
