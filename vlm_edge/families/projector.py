"""Family `projector`: the features of an image take the place of its image tokens in the decoder's input.

LLaVA (arXiv 2304.08485), Idefics3 (2408.12637), SmolVLM (2504.05299), Qwen2-VL (2409.12191). Four graphs: `vision_encoder`,
`projector`, `embed_tokens`, `decoder`. The model's own `get_image_features` is the description of the first two; the call of its
projector is the seam between them. How an image enters differs, and is the *layout* of the registry's line:

- `image`: every image has one size and becomes a fixed number of tokens;
- `crops`: so is each crop of an image that was cut up in addition to being seen whole;
- `tiles`: an image is cut into rows × columns of full tiles and a global view; pixel shuffle belongs to the projector;
- `patches`: an image of any size is one row of patches; the height and width index of each is computed on the host.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch
from transformers import PreTrainedConfig

from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import (
    CropsPlaceholder,
    FixedPlaceholder,
    GenerativeContract,
    GridPlaceholder,
    Modality,
    MRopePositions,
    Placeholder,
    Positions,
    SequentialPositions,
    TilePlaceholder,
    TokenInput,
)
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Single, Split, Tensors, float32, options, submodule
from .blocks import NAME as BLOCK_IDS
from .blocks import block_cases, block_input
from .decoder import decoder_plan, embed_plan, probe
from .layouts import LAYOUTS, Layout
from .registry import Entry

_VISION_BATCH: dict[str, Literal["image", "tile", "patches"]] = {
    "image": "image",
    "crops": "tile",
    "tiles": "tile",
    "patches": "patches",
}


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    layout: Literal["image", "crops", "tiles", "patches"]
    projector: str
    vision: str = ""
    blocks: Literal["", "images"] = ""


class Projector:
    """See the module's docstring."""

    name = "projector"
    auto_class = "AutoModelForImageTextToText"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        text = config.get_text_config()
        if getattr(text, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"'{entry.model_type}' with the encoder-decoder text model '{text.model_type}' cannot be carried: this family's "
                "decoder reads image features in its own sequence."
            )
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise UnsupportedModelError(
                f"The text model '{text.model_type}' has layers of the kind {', '.join(sorted(kinds))}; only full and sliding "
                "attention can be carried."
            )

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        projector = submodule(model, wanted.projector, entry)
        vision = submodule(model, wanted.vision, entry) if wanted.vision else model
        layout = LAYOUTS[wanted.layout](model, vision, projector)
        kv, hidden, vocabulary = probe(model)
        text = model.config.get_text_config()
        context_length = int(text.max_position_embeddings)
        positions = _positions(model.config)
        vision_plan, projector_plan, tokens = vision_plans(model, projector, layout)
        image = Modality(
            graphs=[vision_plan.role, projector_plan.role],
            batch=_VISION_BATCH[wanted.layout],
            token_id=image_token_id(model.config),
            placeholder=_placeholder(checkpoint, wanted.layout, tokens),
        )
        contract = GenerativeContract(
            family=self.name,
            modalities=[image],
            positions=positions,
            kv=kv,
            hidden_size=hidden,
            vocab_size=vocabulary,
            context_length=context_length,
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            token_inputs=[TokenInput(name=BLOCK_IDS, kind="blocks", blocks=wanted.blocks)] if wanted.blocks else [],
        )
        extras = [block_input(model, wanted.blocks)] if wanted.blocks else []
        more_cases = block_cases(text) if wanted.blocks else ()
        axes = 3 if isinstance(positions, MRopePositions) else 1
        graphs = (
            vision_plan,
            projector_plan,
            embed_plan(model, hidden, vocabulary),
            decoder_plan(model, kv, hidden, vocabulary, context_length, rotary_axes=axes, extras=extras, more_cases=more_cases),
        )
        return Split(graphs, contract)


def vision_plans(model: Part, projector: torch.nn.Module, layout: Layout) -> tuple[GraphPlan, GraphPlan, int]:
    """The graphs `vision_encoder` and `projector`, and how many tokens one image or tile becomes (0: depends on the image)."""
    seen: dict[str, Tensors] = {}

    def original(case: Case, inputs: Tensors) -> Tensors:
        """What went into the original's projector and what came out, while it encoded these images."""
        kept: list[torch.Tensor] = []
        handle = projector.register_forward_hook(lambda module, given, result: kept.extend((given[0], result)))
        try:
            layout.features(case, inputs)
        finally:
            handle.remove()
        seen[case.label] = tuple(tensor.detach().clone() for tensor in kept[:2])
        return seen[case.label]

    def hidden_states(case: Case) -> Tensors:
        """What the vision encoder really puts out, not noise; kept from its own check, for it may cost seconds a tile."""
        if case.label not in seen:
            with torch.no_grad(), attention_implementation(model, "eager"):
                original(case, layout.sample(case))
        return seen[case.label][:1]

    first = layout.cases[0]
    hidden, features = hidden_states(first)[0], seen[first.label][1]
    one_row = layout.tokens_dim is not None
    rows_in = (layout.rows,) if one_row else (layout.rows, hidden.shape[1])
    rows_out = (layout.tokens_dim,) if layout.tokens_dim else (layout.rows, features.shape[1])
    hidden_spec = float32("image_hidden_states", *rows_in, hidden.shape[-1])
    features_spec = float32("image_features", *rows_out, features.shape[-1])
    vision = GraphPlan(
        role="vision_encoder",
        module=layout.encoder,
        inputs=layout.inputs,
        outputs=(hidden_spec,),
        cases=layout.cases,
        sample=layout.sample,
        reference=lambda case, inputs: original(case, inputs)[:1],
    )
    mapped = GraphPlan(
        role="projector",
        module=Single(projector),
        inputs=(hidden_spec,),
        outputs=(features_spec,),
        cases=layout.cases,
        sample=hidden_states,
        reference=lambda case, inputs: (projector(inputs[0].clone()),),
    )
    return vision, mapped, 0 if one_row else features.shape[1]


def image_token_id(config: PreTrainedConfig) -> int:
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise UnsupportedModelError(f"The configuration of '{config.model_type}' names no image token (image_token_id).")


def _positions(config: PreTrainedConfig) -> Positions:
    """M-RoPE where the text model rotates by sections of time, height and width; else one position per token."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "mrope_section" not in rope:
        return SequentialPositions()
    return MRopePositions(
        merge_size=int(config.vision_config.spatial_merge_size),
        image_token_id=image_token_id(config),
        vision_start_token_id=int(config.vision_start_token_id),
    )


def _placeholder(checkpoint: Checkpoint, layout: str, tokens: int) -> Placeholder:
    """The text that stands for an image in the prompt, in the tokens of this checkpoint's tokenizer."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    image_token = tokenizer.convert_ids_to_tokens(image_token_id(config))
    if image_token is None:
        raise UnsupportedModelError(
            f"The tokenizer has no token {image_token_id(config)}, which the configuration calls its image."
        )
    if layout == "image":
        return FixedPlaceholder(image_token=image_token, tokens_per_image=tokens)
    if layout == "crops":
        return _crops_placeholder(config, tokenizer, image_token, tokens)
    if layout == "patches":
        return GridPlaceholder(image_token=image_token, merge_size=int(config.vision_config.spatial_merge_size))
    # The processors of Idefics3 and SmolVLM fix these words in their code; a tokenizer may name others (SmolVLM's does).
    fake = getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>"
    overall = getattr(tokenizer, "global_image_token", None) or "<global-img>"
    if tokenizer.convert_tokens_to_ids(fake) in (None, tokenizer.unk_token_id):
        raise UnsupportedModelError(f"The tokenizer has no token '{fake}', which frames every tile of an image.")
    return TilePlaceholder(image_token=image_token, fake_token=fake, global_token=overall, tokens_per_tile=tokens)


def _crops_placeholder(config: PreTrainedConfig, tokenizer: Any, soft_token: str, tokens: int) -> CropsPlaceholder:
    """What Gemma3Processor writes for an image, in code."""
    begin, end = tokenizer.convert_ids_to_tokens([config.boi_token_index, config.eoi_token_index])
    return CropsPlaceholder(
        image_token=begin,
        soft_token=soft_token,
        before=f"\n\n{begin}",
        after=f"{end}\n\n",
        tokens_per_image=tokens,
        crops="Here is the original image {image} and here are some crops to help you see better {crops}",
    )


FAMILY = Projector()
