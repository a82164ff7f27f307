"""A tokenizer from the saved files: `tokenizer.json` holds the whole pipeline, `tokenizer_config.json` names its special tokens.

Follows transformers' TokenizersBackend: `add_bos_token` and `add_eos_token` of the configuration are not looked at, because the
post-processor in `tokenizer.json` already says what is added around a text.
"""

from __future__ import annotations

import re
import string
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from vlm_edge_runtime.errors import BundleError, PromptError

from .cleanup import Cleanup, cleanup_of
from .files import Source, optional_json, side_files
from .stream import StreamDecoder

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(slots=True, frozen=True)
class TextBatch:
    """Texts of one batch, padded: both int64 `[texts, length]`; `attention_mask` is 1 on tokens and 0 on padding."""

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of a bundle, or of a checkpoint's folder. Raises BundleError when a file is missing or damaged."""
    files = side_files(source)
    configs = [optional_json(files, name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    return Tokenizer(files.read_bytes("tokenizer.json"), *configs)


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    `special_tokens`: those with a name (`bos_token`, `eos_token` … and the model's own, `image_token` …), as chat templates
    see them.
    `special_ids`: ids that `skip_special_tokens` leaves out.
    """

    def __init__(
        self,
        tokenizer_json: str | bytes,
        config: Mapping[str, Any] | None = None,
        special_tokens_map: Mapping[str, Any] | None = None,
    ) -> None:
        """From the content of `tokenizer.json`, `tokenizer_config.json` and, for older checkpoints, `special_tokens_map.json`.

        Raises BundleError when `tokenizer.json` is not one that the `tokenizers` library reads.
        """
        try:
            saved = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
            self._backend = tokenizers.Tokenizer.from_buffer(saved)
        except Exception as error:  # the library raises bare Exception, and nothing else
            raise BundleError(f"tokenizer.json cannot be read by tokenizers {tokenizers.__version__}: {error}") from error
        # Lengths are asked for by each call, never by what the file was last saved with.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config: Mapping[str, Any] = config or {}
        settings = {**(special_tokens_map or {}), **self.config}
        self.special_tokens = _named_tokens(settings)
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        listed = [content for one in extra if not isinstance(extra, Mapping) and (content := _content(one)) is not None]
        self._backend.add_special_tokens(
            [tokenizers.AddedToken(word, special=True, normalized=False) for word in (*self.special_tokens.values(), *listed)]
        )
        self.special_ids = frozenset(index for index, token in self._backend.get_added_tokens_decoder().items() if token.special)
        self.padding_side: Literal["left", "right"] = "left" if self.config.get("padding_side") == "left" else "right"
        self._canonical = str(self.config.get("tokenizer_class")).startswith("SiglipTokenizer")
        self.cleanup: Cleanup = cleanup_of(self._backend, self.config)
        # What pickling gives: the component as JSON. The whole tokenizer's would cost more than reading it.
        decoder = self._backend.decoder.__getstate__() if self._backend.decoder is not None else b""
        self.byte_fallback_ids = self._byte_fallback_ids() if b"ByteFallback" in decoder else frozenset[int]()
        self._truncating: dict[int, tokenizers.Tokenizer] = {}
        self._lock = threading.Lock()

    @property
    def bos_id(self) -> int | None:
        """Beginning of sequence, when the tokenizer has such a token."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """End of sequence, when the tokenizer has such a token."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Padding, when the tokenizer has such a token."""
        return self._named_id("pad_token")

    def token_id(self, token: str) -> int | None:
        """The id of one token spelt exactly so, or None."""
        return self._backend.token_to_id(token)

    def __len__(self) -> int:
        """Vocabulary size, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens spelt out in the text become their ids; `add_special_tokens` adds those around it (BOS …)."""
        return self._backend.encode(self._prepare(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete characters become U+FFFD."""
        return self.cleanup.whole(self.decode_raw(ids, skip_special_tokens))

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """`decode` before the clean-up of spaces that a few older tokenizers ask for."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for one answer, fed token by token."""
        return StreamDecoder(self, skip_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], padding: Literal["longest", "max_length"], max_length: int, pad_id: int | None = None
    ) -> TextBatch:
        """Texts cut to `max_length` tokens (the added ones counted and kept) and padded, as CLIP's and SigLIP's processors do.

        `padding`: to the longest text of the batch, or always to `max_length`. `pad_id`: where the tokenizer names no padding
        token, or another one is wanted. Raises PromptError when there is no text, or nothing to pad with.
        """
        if not texts:
            raise PromptError("no texts were given; expected at least one")
        encoder = self._truncated(max_length)
        rows = [encoder.encode(self._prepare(text), add_special_tokens=True).ids for text in texts]
        length = max_length if padding == "max_length" else max(len(row) for row in rows)
        filler = self.pad_id if pad_id is None else pad_id
        if filler is None:
            if any(len(row) < length for row in rows):
                raise PromptError("texts of different lengths need padding, and tokenizer_config.json names no pad_token")
            filler = 0
        input_ids = np.full((len(rows), length), filler, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if self.padding_side == "left" else slice(0, len(row))
            input_ids[index, place] = row
            mask[index, place] = 1
        return TextBatch(input_ids, mask)

    def _truncated(self, max_length: int) -> tokenizers.Tokenizer:
        with self._lock:
            if max_length not in self._truncating:
                # Truncation is a setting of the whole object, so the length gets an object of its own.
                clone = tokenizers.Tokenizer.from_str(self._backend.to_str())
                side = "left" if self.config.get("truncation_side") == "left" else "right"
                clone.enable_truncation(max_length, direction=side)
                self._truncating[max_length] = clone
            return self._truncating[max_length]

    def _prepare(self, text: str) -> str:
        if not self._canonical:
            return text
        # SigLIP was trained on texts in this form; transformers' SiglipTokenizer does it in Python, outside any saved file.
        if self.config.get("do_lower_case", True):
            text = text.lower()
        return re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).strip()

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _byte_fallback_ids(self) -> frozenset[int]:
        found = (self._backend.token_to_id(f"<0x{value:02X}>") for value in range(256))
        return frozenset(index for index in found if index is not None)


def _content(token: object) -> str | None:
    """A special token is a string, or an object with `content` in older files."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    extra = settings.get("extra_special_tokens")
    entries = {
        **(extra if isinstance(extra, Mapping) else {}),
        **settings,
        **(settings.get("model_specific_special_tokens") or {}),
    }
    for name, value in entries.items():
        if name.endswith("_token") and (content := _content(value)) is not None:
            named[name] = content
    return named
