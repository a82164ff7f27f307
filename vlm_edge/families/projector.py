"""Family `projector`: the features of an image take the place of its image tokens in the decoder's input.

LLaVA (arXiv 2304.08485), Idefics3 (2408.12637), SmolVLM (2504.05299), LLaVA-OneVision (2408.03326), InternVL3 (2504.10479),
Aya Vision (2505.08751), Qwen2-VL (2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631), Pixtral (2410.07073). Four graphs:
`vision_encoder`, `projector`, `embed_tokens`, `decoder`. The model's own `get_image_features` is the description of the first
two; the call of its projector is the seam between them. How an image enters differs, and is the *layout* of the registry's line:

- `image`: every image has one size and becomes a fixed number of tokens;
- `crops`: so is each crop of an image that was cut up in addition to being seen whole;
- `tiles`: an image is cut into rows × columns of full tiles and a global view; pixel shuffle belongs to the projector;
- `any_resolution`: tiles and the whole image, whose features the host puts back together, without padding;
- `framed_tiles`: tiles and the whole image, one after another in one frame; `numbered_tiles`: so, each after its number;
  `ended_tiles`: so, each with an end of its own;
- `patches`: an image of any size is one row of patches, in blocks that become one token; what depends on its size (the height and
  width index of each patch, windows, resampled positions) is computed on the host;
- `patch_rows`: so it is, in reading order, and the prompt shows its rows; `patch_grid`: the prompt does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import torch
from transformers import PreTrainedConfig

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import GenerativeContract, Modality, MRopePositions, TokenInput
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Part, Split, options, submodule
from .blocks import NAME as BLOCK_IDS
from .blocks import block_cases, block_input
from .decoder import decoder_plan, embed_plan, probe
from .deepstack import deepstack_inputs
from .layouts import Layout, any_resolution_layout, framed_layout, image_layout, tile_layout
from .layouts_patches import patch_layout, patch_rows_layout
from .projector_prompt import image_token_id, placeholder, positions, video_modality
from .projector_states import action_tokens, state_modality
from .projector_vision import vision_plans
from .registry import Entry

LayoutName = Literal[
    "image",
    "crops",
    "tiles",
    "any_resolution",
    "framed_tiles",
    "numbered_tiles",
    "ended_tiles",
    "patches",
    "patch_rows",
    "patch_grid",
]
LAYOUTS: dict[LayoutName, tuple[Callable[[Part, Part, torch.nn.Module], Layout], Literal["image", "tile", "patches"]]] = {
    "image": (image_layout, "image"),
    "crops": (image_layout, "tile"),
    "tiles": (tile_layout, "tile"),
    "any_resolution": (any_resolution_layout, "tile"),
    "framed_tiles": (framed_layout, "tile"),
    "numbered_tiles": (framed_layout, "tile"),
    "ended_tiles": (framed_layout, "tile"),
    "patches": (patch_layout, "patches"),
    "patch_rows": (patch_rows_layout, "patches"),
    "patch_grid": (patch_rows_layout, "patches"),
}
"""How each enters, and what one input is to the first graph (`Modality.batch`)."""


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    layout: LayoutName
    projector: str
    vision: str = ""
    towers: dict[str, LayoutName] = {}
    videos: Literal["", "grid", "timed_frames", "pooled_frames", "labelled_frames"] = ""
    blocks: Literal["", "images"] = ""
    states: str = ""


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
        tower = getattr(getattr(model.config, "vision_config", None), "model_type", "")
        kind = wanted.towers.get(tower, wanted.layout)
        make, batch = LAYOUTS[kind]
        layout = make(model, vision, projector)
        kv, hidden, vocabulary = probe(model)
        text = model.config.get_text_config()
        context_length = int(text.max_position_embeddings)
        placed = positions(model.config)
        vision_plan, projector_plan, tokens = vision_plans(model, projector, layout)
        image = Modality(
            graphs=[vision_plan.role, projector_plan.role],
            batch=batch,
            token_id=image_token_id(model.config),
            placeholder=placeholder(checkpoint, kind, tokens),
            geometry=list(layout.geometry),
        )
        video = video_modality(checkpoint, wanted.videos, image)
        states = [state_modality(checkpoint, submodule(model, wanted.states, entry))] if wanted.states else []
        extras = [*([block_input(model, wanted.blocks)] if wanted.blocks else ()), *deepstack_inputs(model, layout.taps, hidden)]
        token_inputs = [TokenInput(name=BLOCK_IDS, kind="blocks", blocks=wanted.blocks)] if wanted.blocks else []
        token_inputs += [TokenInput(name=spec.name, kind="features") for spec in projector_plan.outputs[1:]]
        contract = GenerativeContract(
            family=self.name,
            modalities=[image, *([video] if video is not None else []), *(modality for modality, _ in states)],
            positions=placed,
            kv=kv,
            hidden_size=hidden,
            vocab_size=vocabulary,
            context_length=context_length,
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            token_inputs=token_inputs,
            actions=action_tokens(checkpoint),
        )
        more_cases = block_cases(text) if wanted.blocks else ()
        axes = 3 if isinstance(placed, MRopePositions) else 1
        graphs = (
            vision_plan,
            projector_plan,
            *(plan for _, plan in states),
            embed_plan(model, hidden, vocabulary),
            decoder_plan(model, kv, hidden, vocabulary, context_length, rotary_axes=axes, extras=extras, more_cases=more_cases),
        )
        return Split(graphs, contract)


FAMILY = Projector()
