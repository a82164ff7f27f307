"""From a prompt and its media to what the decoder (and the encoder, where there is one) reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from vlm_edge_runtime.bundle.manifest import GenerativeContract, Modality, PrefixPlaceholder
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.text import (
    ChatTemplate,
    Message,
    Tokenizer,
    expand,
    image_text,
    joined,
    load_chat_template,
    load_tokenizer,
    placeholder_token,
    position_ids,
)

from .inputs import ARGUMENTS, Given, said, with_inputs
from .media import Medium
from .memory import MemoryGraphs, salt
from .modalities import Modalities
from .token_inputs import Span, TokenInputs
from .token_rows import Ids, TokenRow, place

_MASK = (1 << 63) - 1
_ODD = 0x9E3779B97F4A7C15 & _MASK | 1


@dataclass(slots=True, eq=False)
class PromptRow:
    """One prompt, ready to run.

    `tokens`: the decoder's row. `content_ids` int64 [S] (see prefix_cache), `positions` int64 [S] or [3, S] (M-RoPE), and the
    position of the first token after them. `blocks`: stretches that must be run in one piece. `source`: the encoder's row, where
    the model has one. `memory_media`: what is read as memory; `memory_key`: what that memory is kept by.
    """

    tokens: TokenRow
    content_ids: Ids
    positions: Ids
    next_position: int
    blocks: list[Span]
    source: TokenRow | None = None
    memory_media: list[Medium] = field(default_factory=list)
    memory_key: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, the encoder's among them."""
        return len(self.tokens) + (len(self.source) if self.source is not None else 0)

    @property
    def media(self) -> list[Medium]:
        """All media, in the order of their places."""
        return self._read.media

    @property
    def media_tokens(self) -> int:
        """Tokens that stand for features."""
        return self._read.media_tokens

    @property
    def _read(self) -> TokenRow:
        """The row that holds the prompt's text."""
        return self.tokens if self.source is None else self.source

    @property
    def history(self) -> Ids:
        """The tokens that a repetition penalty looks at: those of the text."""
        return self.tokens.ids[self.tokens.prefix :]

    def continued(self, tokens: Sequence[int]) -> Ids:
        """Content ids of the prompt and an answer's tokens."""
        new = np.asarray(tokens, dtype=np.int64)
        return np.concatenate([self.content_ids, new if self.memory_key is None else salted(new, self.memory_key)])


class PromptBuilder:
    """Renders, expands, tokenises and places prompts, from the bundle's files alone."""

    def __init__(
        self,
        bundle: Bundle,
        contract: GenerativeContract,
        modalities: Modalities,
        memory: MemoryGraphs,
        token_inputs: TokenInputs,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`tokenizer`: the bundle's, where it has been read already."""
        self._bundle = bundle
        self._contract = contract
        self._modalities = modalities
        self._memory = memory
        self._token_inputs = token_inputs
        self.tokenizer = load_tokenizer(bundle) if tokenizer is None else tokenizer
        self._tokens: dict[str, str | None] = {
            modality.kind: placeholder_token(modality.placeholder) for modality in contract.modalities
        }

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return load_chat_template(self._bundle, self.tokenizer.special_tokens)

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises PromptError when the bundle has none."""
        if self._template is None:
            tokens = [token for token in self._tokens.values() if token is not None]
            holding = f" that holds one {tokens[0]!r} for each image" if tokens else ""
            raise PromptError(
                f"{self._bundle.path} has no chat template (chat_template.jinja): it cannot be asked in messages. Use generate() "
                f"with a plain prompt{holding}."
            )
        return self._template

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def row(self, prompt: str | Sequence[Message], given: Given, *, raw: bool = False) -> PromptRow:
        """One prompt with its inputs in order. Raises PromptError, ImageError."""
        text, media, instruction = self._render(prompt, given, raw)
        media = {kind: [self._modalities.instructed(one, instruction) for one in each] for kind, each in media.items()}
        self._check_counts(media)
        inputs: dict[str, tuple[str | None, list[str]]] = {}
        for modality in self._contract.modalities:
            token, own = self._tokens[modality.kind], media.get(modality.kind, [])
            written = [image_text(modality.placeholder, one.layout) for one in own] if modality.placeholder and token else []
            inputs[modality.kind] = (token, written)
        expansion = expand(text, inputs)
        told_text = expansion.text
        for modality in self._contract.modalities:
            told_text = joined(modality.placeholder, told_text)
        ids = self._encode(told_text)
        silent = [
            (one, self._modalities.modality(kind)) for kind, own in media.items() if self._tokens[kind] is None for one in own
        ]
        told = [(media[kind][index], self._modalities.modality(kind)) for kind, index in expansion.order]
        return self._place(text, ids, [*silent, *told])

    def unconditional(self, prompt: PromptRow) -> PromptRow:
        """What guidance leads away from: the prompt's last token alone, at the first position, as in transformers."""
        tokens = TokenRow(prompt.tokens.ids[-1:], [])
        positions, next_position = position_ids(self._contract.positions, tokens.ids, [])
        return PromptRow(tokens, tokens.content_ids(), positions, next_position, self._token_inputs.blocks(tokens))

    def open(self, kind: str, sources: Sequence[Any]) -> list[Medium]:
        """Opens and measures inputs of one kind. Raises PromptError, ImageError."""
        return [self._modalities.open(kind, source) for source in sources]

    # --- text ---

    def _render(self, prompt: str | Sequence[Message], given: Given, raw: bool) -> tuple[str, dict[str, list[Medium]], str]:
        """The prompt's text with a placeholder for each input, the inputs, and the text of an instruction."""
        instruction = prompt if isinstance(prompt, str) else ""
        if not isinstance(prompt, str):
            messages, given = with_inputs(prompt, given)
            text = self.require_template().render(messages, add_generation_prompt=True)
            instruction = said(messages)
        elif raw or any(token in prompt for token in self._tokens.values() if token):
            text = prompt
            for token in filter(None, self._tokens.values()):
                instruction = instruction.replace(token, "")
        elif self._template is not None:
            content = [{"type": kind} for kind in self._told(given) for _ in given[kind]]
            content.append({"type": "text", "text": prompt})
            text = self._template.render([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            placeholders = "".join(str(self._tokens[kind]) * len(given[kind]) for kind in self._told(given))
            text = self._fill(self._replaced(prompt), placeholders)
        return text, {kind: self.open(kind, sources) for kind, sources in given.items()}, instruction

    def _told(self, given: Given) -> list[str]:
        """The kinds of inputs that the text has placeholders for. Raises PromptError for inputs the model does not take."""
        for kind in given:
            self._modalities.modality(kind)
        return [kind for kind in self._modalities.kinds if kind in given and self._tokens[kind] is not None]

    def _fill(self, text: str, placeholders: str) -> str:
        # Piece by piece: a user's text may itself hold braces.
        before, images, after = self._contract.prompt.template.partition("{images}")
        filled = [part.replace("{text}", text) for part in (before, after)]
        return f"{filled[0]}{placeholders if images else ''}{filled[1]}"

    def _replaced(self, text: str) -> str:
        """Florence-2's task words: the text that stands for one, around what else was said."""
        for word, stands_for in self._contract.prompt.replacements.items():
            if word not in text:
                continue
            rest = text.replace(word, "", 1).strip()
            if "{input}" in stands_for:
                return stands_for.replace("{input}", rest, 1)
            if rest:
                raise PromptError(f"{word} takes no further text; found {rest!r:.60}: leave it out.")
            return stands_for
        return text

    def _encode(self, text: str) -> list[int]:
        """Token ids; where the contract says so, those of the placeholders before the text and those of the text by itself."""
        if not self._contract.prompt.apart:
            return self.tokenizer.encode(text, self._adds_special_tokens(text))
        tokens = "|".join(re.escape(token) for token in self._tokens.values() if token)
        found = re.match(f"(?:{tokens})*", text)
        at = found.end() if found is not None else 0
        before = self.tokenizer.encode(text[:at], add_special_tokens=False) if at else []
        return [*before, *self.tokenizer.encode(text[at:], self._contract.prompt.add_special_tokens)]

    def _adds_special_tokens(self, text: str) -> bool:
        """As transformers' processors: a template that writes the beginning of sequence itself gets no second one."""
        beginning = self.tokenizer.special_tokens.get("bos_token")
        return self._contract.prompt.add_special_tokens and not (beginning and text.startswith(beginning))

    def _check_counts(self, media: dict[str, list[Medium]]) -> None:
        for modality in self._contract.modalities:
            count, name = len(media.get(modality.kind, ())), ARGUMENTS[modality.kind]
            if count < modality.least:
                raise PromptError(f"{self._bundle.path} needs at least {modality.least} {name} with each prompt; found {count}.")
            if modality.most is not None and count > modality.most:
                raise PromptError(f"{self._bundle.path} takes at most {modality.most} {name} with a prompt; found {count}.")

    # --- tokens ---

    def _place(self, text: str, ids: list[int], media: list[tuple[Medium, Modality]]) -> PromptRow:
        contract, memory = self._contract, self._memory.memory
        start = contract.prompt.start_tokens
        source: TokenRow | None = None
        if memory is not None and memory.source == "encoder":
            source = place(contract, ids, media)
            tokens = place(contract, start, [])
        else:
            in_front = any(isinstance(modality.placeholder, PrefixPlaceholder) for _, modality in media)
            if not text and not start and not in_front:
                raise PromptError("the prompt is empty: there is nothing to answer.")
            before = [] if contract.prompt.start == "instead" and text else start
            tokens = place(contract, [*before, *(ids if text or not before else [])], media)
        memory_media = (tokens if source is None else source).memory_media()
        self._memory.check(memory_media, source)
        key = self._memory.key(memory_media, source) if memory is not None else None
        filled = [one for one in tokens.placed if one.fills]
        positions, next_position = position_ids(
            contract.positions, tokens.ids, [one.medium.layout for one in filled], [one.at for one in filled]
        )
        content = tokens.content_ids()
        return PromptRow(
            tokens=tokens,
            content_ids=content if key is None else salted(content, key),
            positions=positions,
            next_position=next_position,
            blocks=self._token_inputs.blocks(tokens),
            source=source,
            memory_media=memory_media,
            memory_key=key,
        )


def salted(content: Ids, key: str) -> Ids:
    """Content ids of entries that also depend on a memory: negative numbers, different for different ids and memories."""
    mixed = (content.astype(np.uint64) * np.uint64(_ODD) + np.uint64(salt(key))) & np.uint64(_MASK)
    return -1 - mixed.astype(np.int64)
