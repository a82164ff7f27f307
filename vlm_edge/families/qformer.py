"""Family `qformer`: learned queries read a frozen encoder, and what they become takes the places of the input's tokens.

BLIP-2 (arXiv 2301.12597), InstructBLIP (2305.06500) and InstructBLIP-Video, MiniGPT-4 (2304.10592: BLIP-2's Q-Former into a
Llama), X-InstructBLIP (2311.18799: one Q-Former per kind of input). Graphs: `vision_encoder`, `qformer`, `projector` (with
`audio_` before their names for audio), then `embed_tokens` and `decoder`. An encoder-decoder language model (T5) reads the
features in its encoder: `encoder`, `cross_kv`, `embed_tokens`, `decoder`.
"""

from __future__ import annotations

from typing import Any

import msgspec
from transformers import PreTrainedConfig

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import (
    FixedPlaceholder,
    GenerativeContract,
    Instruction,
    KVLayout,
    Memory,
    Modality,
    PromptFormat,
    SequentialPositions,
)
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import GraphPlan, Part, Split, options, submodule
from .cross_decoder import CrossDecoder, cross_decoder_plan, cross_kv_plan, encoder_plan, longest_text, positions_table
from .decoder import decoder_plan, embed_plan, probe
from .qformer_branch import Branch, Input, branch, branch_plans
from .registry import Entry

TOKENIZER = "qformer_tokenizer"
"""The name under which InstructBlipProcessor saves the tokenizer of instructions."""


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    inputs: list[Input]
    text: str = "language_model"
    apart: bool = True


class QFormer:
    """See the module's docstring."""

    name = "qformer"
    auto_class = "AutoModelForImageTextToText"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise UnsupportedModelError(
                f"The text model '{text.model_type}' has layers of the kind {', '.join(sorted(kinds))}; only full and sliding "
                "attention can be carried."
            )
        classes = getattr(config, "architectures", None) or []
        if classes and not any(name.endswith("ForConditionalGeneration") for name in classes):
            raise UnsupportedModelError(
                f"This '{entry.model_type}' is a {', '.join(classes)}, which has no language model that writes: "
                "…ForConditionalGeneration is expected."
            )
        for wanted in options(entry, Options).inputs:
            _token_id(config, wanted.kind)

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        text: Part = submodule(model, wanted.text, entry)
        checkpoint.generator = text
        branches = [branch(model, one, entry) for one in wanted.inputs]
        plans = [branch_plans(one) for one in branches]
        reads = _encoder_decoder if getattr(text.config, "is_encoder_decoder", False) else _decoder_only
        graphs, sizes, memory, start = reads(text, checkpoint)
        for one, graph in zip(branches, plans, strict=True):
            if (width := graph[-1].outputs[0].shape[-1]) != sizes["hidden_size"]:
                raise UnsupportedModelError(
                    f"The {one.options.kind} features are {width} wide and the token embeddings of '{text.config.model_type}' "
                    f"{sizes['hidden_size']}: features cannot take the places of tokens."
                )
        contract = GenerativeContract(
            family=self.name,
            modalities=[
                _modality(checkpoint, one, [graph.role for graph in graphs]) for one, graphs in zip(branches, plans, strict=True)
            ],
            positions=SequentialPositions(),
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            prompt=PromptFormat(apart=wanted.apart, start_tokens=start),
            memory=memory,
            **sizes,
        )
        return Split((*(graph for one in plans for graph in one), *graphs), contract)


Text = tuple[tuple[GraphPlan, ...], dict[str, Any], Memory | None, list[int]]
"""The language model's graphs, its sizes by their names in the contract, its memory, and what its decoder begins with."""


def _decoder_only(text: Part, checkpoint: Checkpoint) -> Text:
    kv, hidden, vocabulary = probe(text)
    context = int(text.config.max_position_embeddings)
    graphs = (embed_plan(text, hidden, vocabulary), decoder_plan(text, kv, hidden, vocabulary, context))
    return graphs, _named(kv, hidden, vocabulary, context), None, []


def _encoder_decoder(text: Part, checkpoint: Checkpoint) -> Text:
    """The encoder reads the prompt with the features in it; the decoder begins with a token of its own."""
    encoder, embedding = text.get_encoder(), text.get_input_embeddings()
    width = int(text.config.d_model)
    decoder = CrossDecoder(text, width)
    sizes, context = decoder.sizes, longest_text(text.config, checkpoint)
    graphs = (
        encoder_plan(encoder, embedding, sizes.hidden, width),
        cross_kv_plan(decoder),
        embed_plan(decoder, sizes.hidden, sizes.vocabulary),
        cross_decoder_plan(decoder, context, masked=True),
    )
    memory = Memory(source="encoder", mask="source", hidden_size=width, source_length=positions_table(text.config))
    return graphs, _named(sizes.kv, sizes.hidden, sizes.vocabulary, context), memory, [_start(text)]


def _named(kv: KVLayout, hidden: int, vocabulary: int, context: int) -> dict[str, Any]:
    return {"kv": kv, "hidden_size": hidden, "vocab_size": vocabulary, "context_length": context}


def _start(text: Part) -> int:
    for holder in (text.generation_config, text.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    raise UnsupportedModelError(
        f"'{text.config.model_type}' names no token for its decoder to begin with: set decoder_start_token_id in text_config."
    )


def _token_id(config: PreTrainedConfig, kind: str) -> int:
    found = getattr(config, f"{kind}_token_id", None)
    if not isinstance(found, int):
        raise UnsupportedModelError(
            f"The configuration of this '{config.model_type}' names no token for inputs of kind {kind} ({kind}_token_index), "
            "which transformers has needed since 4.46: add the token to the tokenizer and its number to config.json."
        )
    return found


def _modality(checkpoint: Checkpoint, found: Branch, roles: list[str]) -> Modality:
    config, wanted = checkpoint.config, found.options
    token_id = _token_id(config, wanted.kind)
    token = checkpoint.tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        raise UnsupportedModelError(
            f"The tokenizer has no token {token_id}, which the configuration gives to inputs of kind {wanted.kind}."
        )
    prefix = str(getattr(config, wanted.prefix)) if wanted.prefix else ""
    return Modality(
        kind=wanted.kind,
        graphs=roles,
        batch="tile" if wanted.frames else "image",
        token_id=token_id,
        placeholder=FixedPlaceholder(image_token=token, tokens_per_image=found.tokens, before=prefix),
        instruction=_instruction(checkpoint, found) if found.instructed else None,
    )


def _instruction(checkpoint: Checkpoint, found: Branch) -> Instruction:
    if TOKENIZER not in checkpoint.extra_tokenizers:
        raise UnsupportedModelError(
            f"{checkpoint.source.name} has no {TOKENIZER} beside its tokenizer, by which its Q-Former reads instructions: save "
            "the model's processor there (processor.save_pretrained)."
        )
    return Instruction(tokenizer=f"{TOKENIZER}.json", max_length=int(found.qformer.config.max_position_embeddings))


FAMILY = QFormer()
