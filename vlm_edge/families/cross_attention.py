"""Family `cross_attention`: the decoder reads its source through cross-attention layers.

The source is the image (BLIP captioning, arXiv 2201.12086; TrOCR, 2109.10282; Donut, 2111.15664; any vision encoder with any
text decoder that has cross-attention), or a text encoder that has itself read image and prompt (BLIP's question encoder by
its own cross-attention; Florence-2, 2311.06242, with image tokens in its text). Graphs: `vision_encoder`, `projector` where the
model maps its features, `encoder` where there is one, `cross_kv`, `embed_tokens`, `decoder`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch
import transformers
from transformers import PreTrainedConfig

from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.patches.positions import position_offset
from vlm_edge_runtime.bundle.manifest import (
    FixedPlaceholder,
    GenerativeContract,
    Memory,
    Modality,
    PromptFormat,
    SequentialPositions,
    TensorSpec,
)
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Split, float32, options, submodule
from .cross_contrast import contrast_plans
from .cross_decoder import CrossDecoder, cross_decoder_plan, cross_kv_plan, encoder_plan, longest_text
from .cross_recurrent import NO_CACHE, Recurrent, recurrent_plans
from .cross_vision import VISIONS, vision_plans
from .decoder import ExtraInput, as_argument, embed_plan
from .registry import Entry


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    vision: str
    decoder: str
    projector: str = ""
    head: str = ""
    encoder: str = ""
    joins: Literal["memory", "tokens"] = "memory"
    image: Literal["whole", "patches"] = "whole"
    recurrent: bool = False
    contrast: bool = False
    prompt: str = "{text}"
    special_tokens: bool = False
    start: str = ""
    end: str = ""
    processor: str = ""


class CrossAttention:
    """See the module's docstring."""

    name = "cross_attention"
    auto_class = "AutoModelForImageTextToText"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        text = config.get_text_config(decoder=True)
        if getattr(config, "is_vqa", False):
            raise UnsupportedModelError(
                f"This '{entry.model_type}' reads its question as a header drawn onto the image (is_vqa), and drawing text is "
                "not carried: use a checkpoint that captions."
            )
        flags = [getattr(text, name, False) for name in ("is_decoder", "is_encoder_decoder")]
        flags.append(getattr(text, "add_cross_attention", True))  # who has no such switch has the layers anyway
        if not any(flags):
            raise UnsupportedModelError(
                f"The decoder '{text.model_type}' of this '{entry.model_type}' has no cross-attention (is_decoder and "
                "add_cross_attention are false), so it cannot read an image: give it a decoder that has."
            )

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        part = submodule(model, wanted.decoder, entry)
        if wanted.recurrent:
            return self._recurrent(checkpoint, wanted, recurrent_plans(checkpoint, submodule(model, wanted.vision, entry), part))
        if wanted.head:
            part = _WithHead(part, submodule(model, wanted.head, entry))
        vision = vision_plans(
            checkpoint, VISIONS[wanted.image], submodule(model, wanted.vision, entry), _optional(model, wanted.projector)
        )
        encoders, width = [], vision.width
        if wanted.encoder:
            encoder = submodule(model, wanted.encoder, entry)
            plan = _encoder(model, encoder, part, vision.features if wanted.joins == "memory" else None)
            encoders, width = [plan], int(plan.outputs[0].shape[-1])
        decoder = CrossDecoder(part, width)
        sizes = decoder.sizes
        masked = bool(wanted.encoder) or vision.tokens == 0
        context = longest_text(part.config, checkpoint) - position_offset(part)
        further, contrast = (
            contrast_plans(checkpoint, submodule(model, wanted.vision, entry), part, vision.features, context)
            if wanted.contrast
            else ((), None)
        )
        graphs = (
            *vision.plans,
            *encoders,
            cross_kv_plan(decoder),
            embed_plan(decoder, sizes.hidden, sizes.vocabulary),
            cross_decoder_plan(decoder, context, masked=masked),
            *further,
        )
        contract = GenerativeContract(
            family=self.name,
            modalities=[_image(checkpoint, wanted, [plan.role for plan in vision.plans], vision.tokens)],
            positions=SequentialPositions(),
            kv=sizes.kv,
            hidden_size=sizes.hidden,
            vocab_size=sizes.vocabulary,
            context_length=context,
            eos_token_ids=[_at(model.config, wanted.end)] if wanted.end else checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            prompt=_prompt(checkpoint, wanted),
            memory=Memory(
                source="encoder" if encoders else "features",
                mask="source" if masked else "none",
                hidden_size=width,
                source_length=longest_text(encoder.config, checkpoint) if encoders else None,
            ),
            contrast=contrast,
        )
        return Split(graphs, contract)

    def _recurrent(self, checkpoint: Checkpoint, wanted: Options, found: Recurrent) -> Split:
        vision = found.vision
        contract = GenerativeContract(
            family=self.name,
            modalities=[_image(checkpoint, wanted, [plan.role for plan in vision.plans], vision.tokens)],
            positions=SequentialPositions(),
            kv=NO_CACHE,
            hidden_size=found.hidden,
            vocab_size=found.vocabulary,
            context_length=longest_text(checkpoint.config, checkpoint),
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            prompt=_prompt(checkpoint, wanted),
            memory=Memory(source="features", mask="none", hidden_size=vision.width),
        )
        return Split(found.plans, contract)


class _WithHead(torch.nn.Module):
    """A decoder and the language head that its model keeps elsewhere, as one part that gives logits."""

    def __init__(self, decoder: Part, head: torch.nn.Module) -> None:
        super().__init__()
        self.decoder: Part = decoder
        self.head = head
        self.config = decoder.config

    def get_input_embeddings(self) -> torch.nn.Module:
        embedding: torch.nn.Module = self.decoder.get_input_embeddings()
        return embedding

    def forward(self, encoder_hidden_states: torch.Tensor, **arguments: Any) -> Any:
        output = self.decoder(encoder_hidden_states=encoder_hidden_states, **arguments)
        output.logits = self.head(output.last_hidden_state)
        return output


def _optional(model: Part, path: str) -> torch.nn.Module | None:
    """The part of that name, where this checkpoint has one: equal widths need no map between them."""
    found = dict(model.named_modules())
    return found.get(path) if path else None


def _encoder(model: Part, encoder: Part, decoder: Part, features: TensorSpec | None) -> GraphPlan:
    """The graph `encoder`. `features`: what it reads by cross-attention of its own, None where they are in its text."""
    own, shared = encoder.get_input_embeddings(), decoder.get_input_embeddings()
    extras = []
    if features is not None:
        spec = float32(features.name, "batch", *features.shape[1:])

        def sample(case: Case) -> torch.Tensor:
            return torch.randn(case.shape(spec), generator=case.generator())

        extras = [ExtraInput(spec, sample, as_argument("encoder_hidden_states"), as_argument("encoder_hidden_states"))]
    with torch.no_grad(), attention_implementation(model, "eager"):
        embeddings = own(torch.zeros(1, 2, dtype=torch.long))
        arguments = (
            {} if features is None else {"encoder_hidden_states": torch.zeros(1, *(int(size) for size in features.shape[1:]))}
        )
        width = encoder(inputs_embeds=embeddings.clone(), **arguments).last_hidden_state.shape[-1]
    by_ids = own.weight is not shared.weight
    return encoder_plan(encoder, own, embeddings.shape[-1], width, extras=extras, by_ids=by_ids)


def _image(checkpoint: Checkpoint, wanted: Options, roles: list[str], tokens: int) -> Modality:
    batch: Literal["image", "patches"] = "image" if wanted.image == "whole" else "patches"
    if wanted.joins == "memory":
        return Modality(graphs=roles, batch=batch, joins="memory", least=1, most=1)
    token = int(checkpoint.config.image_token_id)
    word = checkpoint.tokenizer.convert_ids_to_tokens(token)
    if word is None:
        raise UnsupportedModelError(f"The tokenizer has no token {token}, which the configuration calls its image.")
    placeholder = FixedPlaceholder(image_token=word, tokens_per_image=tokens)
    return Modality(graphs=roles, batch=batch, token_id=token, placeholder=placeholder, least=1, most=1)


def _prompt(checkpoint: Checkpoint, wanted: Options) -> PromptFormat:
    """How the model's processor and `generate` write a prompt: who reads it, and what the decoder begins with."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    template = wanted.prompt.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")
    kind = str(getattr(getattr(config, "encoder", None), "model_type", ""))
    return PromptFormat(
        template=template,
        add_special_tokens=wanted.special_tokens,
        start_tokens=[_start(checkpoint, wanted)],
        # transformers' own rule: Donut's task words begin the decoder's text by themselves.
        start="instead" if "donut" in kind else "before",
        replacements=_task_words(checkpoint, wanted.processor) if wanted.processor else {},
    )


def _start(checkpoint: Checkpoint, wanted: Options) -> int:
    """The token that the decoder begins with, looked for where `generate` looks."""
    if wanted.start:
        return _at(checkpoint.config, wanted.start)
    holders = (checkpoint.generation, checkpoint.config, checkpoint.config.get_text_config(decoder=True))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for holder in holders:
            if (found := getattr(holder, name, None)) is not None:
                return int(found)
    raise UnsupportedModelError(
        f"{checkpoint.source.name} names no token for its decoder to begin with: set decoder_start_token_id in "
        "generation_config.json."
    )


def _at(config: Any, path: str) -> int:
    """`text_config.bos_token_id` of a configuration. Raises UnsupportedModelError where it is not a token."""
    found = config
    for name in path.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, int):
        raise UnsupportedModelError(f"The configuration's {path} must be a token; it is {found!r}.")
    return found


def _task_words(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Task words and the sentences that the processor of that name writes in their place; they stand in its code alone."""
    images = transformers.CLIPImageProcessorPil(image_seq_length=1)  # any will do: it is not used
    processor = getattr(transformers, name)(image_processor=images, tokenizer=checkpoint.tokenizer)
    return {**processor.task_prompts_without_inputs, **processor.task_prompts_with_input}


FAMILY = CrossAttention()
