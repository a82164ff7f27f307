"""Family `gated_cross_attention`: a language model with gated layers in between that read images, each token those it may see.

Flamingo (arXiv 2204.14198) as IDEFICS, Llama 3.2 Vision. An image leaves one token in the text; what it shows enters through
cross-attention, whose keys and values are computed once per image (graph `cross_kv`) and read by every token, row and turn.
`cross_attention_mask` says which images a token sees; a generated token sees what the prompt's last token saw.
Graphs: `vision_encoder`, `resampler` or `projector`, `cross_kv`, `embed_tokens`, `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from transformers import PreTrainedConfig

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import (
    FencedPlaceholder,
    FixedPlaceholder,
    GenerativeContract,
    Memory,
    Modality,
    Placeholder,
    PromptFormat,
    SequentialPositions,
    TokenInput,
)
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Part, Split, options
from .decoder import embed_plan
from .gated_idefics import idefics
from .gated_mllama import mllama
from .gated_parts import MASK, Gated
from .registry import Entry

_KINDS: dict[str, Callable[[Part, int], Gated]] = {"perceiver": idefics, "tiles": mllama}


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    kind: Literal["perceiver", "tiles"]
    image_token: str
    sees: Literal["last_medium", "last_run"]
    prompt: str
    fence: str = ""


class GatedCrossAttention:
    """See the module's docstring."""

    name = "gated_cross_attention"
    auto_class = "AutoModelForImageTextToText"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        if getattr(config, "vision_config", None) is None:
            raise UnsupportedModelError(f"The configuration of '{entry.model_type}' has no vision_config: it reads no images.")

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        token = checkpoint.tokenizer.convert_tokens_to_ids(wanted.image_token)
        if token in (None, checkpoint.tokenizer.unk_token_id):
            raise UnsupportedModelError(f"The tokenizer has no token '{wanted.image_token}', which stands for an image.")
        text = model.config.get_text_config()
        context_length = int(text.max_position_embeddings)
        parts = _KINDS[wanted.kind](model, context_length)
        image = Modality(
            graphs=[plan.role for plan in parts.features],
            batch="image",
            joins="memory",
            token_id=int(token),
            placeholder=_placeholder(wanted),
        )
        contract = GenerativeContract(
            family=self.name,
            modalities=[image],
            positions=SequentialPositions(),
            kv=parts.kv,
            hidden_size=parts.hidden,
            vocab_size=parts.vocabulary,
            context_length=context_length,
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            prompt=_prompt(wanted.prompt, checkpoint.tokenizer),
            memory=Memory(
                source="features",
                mask="tokens",
                hidden_size=parts.source_width,
                entries_per_image=parts.entries_per_image,
            ),
            token_inputs=[
                TokenInput(name=MASK, kind="media", decode="last", rule=wanted.sees, end=checkpoint.tokenizer.eos_token_id)
            ],
        )
        embed = embed_plan(model, parts.hidden, parts.vocabulary)
        return Split((*parts.features, parts.cross_kv, embed, parts.decoder), contract)


def _prompt(template: str, tokenizer: Any) -> PromptFormat:
    """What the model's processor writes around a text, in code."""
    bos = str(tokenizer.bos_token)
    adds = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    template = template.replace("{begin}", bos if adds else "").replace("{bos}", bos)
    return PromptFormat(template=template, add_special_tokens=False)


def _placeholder(wanted: Options) -> Placeholder:
    if wanted.fence:
        return FencedPlaceholder(image_token=wanted.image_token, fence=wanted.fence)
    return FixedPlaceholder(image_token=wanted.image_token, tokens_per_image=1)


FAMILY = GatedCrossAttention()
