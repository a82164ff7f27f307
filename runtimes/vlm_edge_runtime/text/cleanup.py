"""What a few tokenizers do to decoded text as a whole, in a form that also works on text that is still growing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import tokenizers

_SPACED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Cleanup(ABC):
    """A rewriting of decoded text."""

    def whole(self, text: str) -> str:
        """The rewritten text."""
        return self.piece(text, first=True, last=True)

    @abstractmethod
    def settled(self, text: str) -> int:
        """How many leading characters of `text` may be rewritten by themselves, whatever text follows."""

    @abstractmethod
    def piece(self, text: str, first: bool, last: bool) -> str:
        """A piece, cut where `settled` said so, rewritten. `first`: nothing was given out before it; `last`: nothing follows."""


class NoCleanup(Cleanup):
    """The decoded text is the text."""

    def settled(self, text: str) -> int:
        return len(text)

    def piece(self, text: str, first: bool, last: bool) -> str:
        return text


class SpaceCleanup(Cleanup):
    """`clean_up_tokenization_spaces`: no space before punctuation and English contractions (WordPiece tokenizers)."""

    _beginnings = tuple({pattern[:length] for pattern, _ in _SPACED for length in range(1, len(pattern))})

    def settled(self, text: str) -> int:
        # Every pattern begins with a space: a cut before one is safe unless a pattern may have begun before it.
        cut = text.rfind(" ")
        while cut > 0:
            if not text[:cut].endswith(self._beginnings):
                return cut
            cut = text.rfind(" ", 0, cut)
        return 0

    def piece(self, text: str, first: bool, last: bool) -> str:
        for pattern, replacement in _SPACED:
            text = text.replace(pattern, replacement)
        return text


class WordEndCleanup(Cleanup):
    """CLIP: the mark at the end of words becomes a space, and the text loses the spaces around it."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def settled(self, text: str) -> int:
        # Spaces at the end wait until something follows them; so does what may be the beginning of a mark.
        end = len(text)
        while True:
            shorter = len(text[:end].rstrip().removesuffix(self._mark))
            for length in range(len(self._mark) - 1, 0, -1):
                if text.endswith(self._mark[:length], 0, shorter):
                    shorter -= length
                    break
            if shorter == end:
                return end
            end = shorter

    def piece(self, text: str, first: bool, last: bool) -> str:
        text = text.replace(self._mark, " ")
        text = text.lstrip() if first else text
        return text.rstrip() if last else text


def cleanup_of(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> Cleanup:
    """The clean-up that transformers applies for this tokenizer."""
    is_bpe = type(backend.model).__name__ == "BPE"
    if config.get("tokenizer_class") in ("CLIPTokenizer", "CLIPTokenizerFast") and is_bpe:
        mark = getattr(backend.model, "end_of_word_suffix", None)
        return WordEndCleanup(mark) if mark else NoCleanup()
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if config.get("clean_up_tokenization_spaces") and (not is_bpe or forced):
        return SpaceCleanup()
    return NoCleanup()
