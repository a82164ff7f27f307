"""Family `prefix_lm`: a decoder that sees its prefix in both directions and writes causally after it.

PaliGemma (arXiv 2407.07726), PaliGemma 2 (2412.03555), GIT (2205.14100), SimVLM (2108.10904, section 3.1). Four graphs:
`vision_encoder`, `projector`, `embed_tokens`, `decoder`; the decoder also reads `block_ids` (see blocks.py). A line of the
registry says what the models differ in:

- `joins`: features take the places of image tokens in the text (`tokens`), or stand before it (`prefix`);
- `blocks`: the prefix that is seen in both directions is the whole prompt (`prompt`) or the image alone (`prefix`);
- `first_position`: the position of the prompt's first token; with `counts_images` off, of the first after the image, whose tokens
  have no positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from transformers import PreTrainedConfig

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import (
    FixedPlaceholder,
    GenerativeContract,
    Modality,
    PrefixPlaceholder,
    PromptFormat,
    SequentialPositions,
    TokenInput,
)
from vlm_edge_runtime.errors import UnsupportedModelError

from . import prefix_git
from .base import Part, Split, options, submodule
from .blocks import NAME, block_cases, block_input
from .decoder import ExtraInput, decoder_plan, embed_plan, probe
from .layouts import image_layout
from .projector_prompt import image_token_id
from .projector_vision import vision_plans
from .registry import Entry


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    joins: Literal["tokens", "prefix"]
    blocks: Literal["prompt", "prefix"]
    projector: str
    first_position: int
    counts_images: bool
    prompt: str
    parts: Literal["", "git"] = ""


@dataclass(frozen=True, slots=True)
class Apart:
    """How a model is run in parts: `parts` has `get_image_features` and takes embeddings, `extra` is its `block_ids`."""

    parts: Part
    extra: ExtraInput


def _as_it_is(model: Part, wanted: Options) -> Apart:
    return Apart(model, block_input(model, wanted.blocks))


def _as_git(model: Part, wanted: Options) -> Apart:
    parts = prefix_git.GitParts(model)
    return Apart(parts, prefix_git.git_block_input(parts))


_APART: dict[str, Callable[[Part, Options], Apart]] = {"": _as_it_is, "git": _as_git}
_REFUSALS: dict[str, Callable[[PreTrainedConfig], None]] = {"git": prefix_git.refuse}


def _prompt(template: str, tokenizer: Any) -> PromptFormat:
    """What the model's processor writes around a text, in code; it names the tokenizer's special tokens."""
    special = {"bos_token": tokenizer.bos_token, "cls_token": tokenizer.cls_token}
    for name, token in special.items():
        template = template.replace("{" + name + "}", str(token))
    return PromptFormat(template=template, add_special_tokens=False)


class PrefixLM:
    """See the module's docstring."""

    name = "prefix_lm"
    auto_class = "AutoModelForImageTextToText"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        wanted = options(entry, Options)
        if wanted.parts in _REFUSALS:
            _REFUSALS[wanted.parts](config)
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise UnsupportedModelError(
                f"The text model '{text.model_type}' has layers of the kind {', '.join(sorted(kinds))}; only full and sliding "
                "attention can be carried."
            )

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        apart = _APART[wanted.parts](model, wanted)
        projector = submodule(model, wanted.projector, entry)
        kv, hidden, vocabulary = probe(model)
        text = model.config.get_text_config()
        vision_plan, projector_plan, tokens = vision_plans(apart.parts, projector, image_layout(apart.parts, model, projector))
        before = 0 if wanted.counts_images else tokens
        context_length = int(text.max_position_embeddings) + before
        contract = GenerativeContract(
            family=self.name,
            modalities=[_modality(checkpoint, wanted, [vision_plan.role, projector_plan.role], tokens)],
            positions=SequentialPositions(offset=wanted.first_position - before),
            kv=kv,
            hidden_size=hidden,
            vocab_size=vocabulary,
            context_length=context_length,
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            prompt=_prompt(wanted.prompt, checkpoint.tokenizer),
            token_inputs=[TokenInput(name=NAME, kind="blocks", blocks=wanted.blocks)],
        )
        graphs = (
            vision_plan,
            projector_plan,
            embed_plan(apart.parts, hidden, vocabulary),
            decoder_plan(apart.parts, kv, hidden, vocabulary, context_length, extras=[apart.extra], more_cases=block_cases(text)),
        )
        return Split(graphs, contract)


def _modality(checkpoint: Checkpoint, wanted: Options, graphs: list[str], tokens: int) -> Modality:
    """An image before the text, or images in the places of their tokens; there is no prompt without an image."""
    most = None if wanted.counts_images else 1
    if wanted.joins == "prefix":
        return Modality(
            graphs=graphs,
            batch="image",
            token_id=checkpoint.pad_token_id(),
            placeholder=PrefixPlaceholder(tokens_per_image=tokens),
            least=1,
            most=most,
        )
    token_id = image_token_id(checkpoint.config)
    token = checkpoint.tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        raise UnsupportedModelError(f"The tokenizer has no token {token_id}, which the configuration calls its image.")
    placeholder = FixedPlaceholder(image_token=token, tokens_per_image=tokens)
    return Modality(graphs=graphs, batch="image", token_id=token_id, placeholder=placeholder, least=1, most=most)


FAMILY = PrefixLM()
