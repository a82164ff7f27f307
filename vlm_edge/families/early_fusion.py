"""Family `early_fusion`: text and image tokens in one sequence of one decoder, which may write images as well as read them.

Chameleon (arXiv 2405.09818), CM3Leon (2309.02591), Janus (2410.13848, 2501.17811). How an image is read is `images` of the
registry's line:

- `codes`: a VQ tokenizer (2203.13131) gives each patch the nearest entry of its codebook, and those are tokens of the text's own
  vocabulary: `image_tokenizer`, `embed_tokens`, `decoder`. Chameleon's decoder normalises queries and keys, and its logits
  never name an image's token (transformers writes the type's minimum there, and so does the graph): it answers in text.
- `features`: a vision encoder and a projector as in family `projector`: `vision_encoder`, `projector`, `embed_tokens`, `decoder`.

With `output` the decoder also writes images, token by token; see early_fusion_output. Of the two models in transformers that do,
Janus is carried and Emu3 is not: Janus writes its codes with an embedding and a head of its own over one decoder and decodes them
with 2-D convolutions, and transformers' own `generate` has the whole loop to compare with; Emu3 writes rows of codes in the
text's vocabulary under a grammar that its caller must supply (`prefix_allowed_tokens_fn`), and decodes with 3-D convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from transformers import PreTrainedConfig

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import FixedPlaceholder, GenerativeContract, Modality, PromptFormat, SequentialPositions
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import GraphPlan, Part, Split, options, submodule
from .decoder import decoder_plan, embed_plan, probe
from .early_fusion_codes import image_tokenizer_plan, without_image_tokens
from .early_fusion_output import image_output, image_output_plans, with_hidden
from .layouts import image_layout
from .projector_prompt import image_token_id
from .projector_vision import vision_plans
from .registry import Entry


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    images: Literal["codes", "features"]
    frame: list[str]
    projector: str = ""
    end: str = ""
    output: bool = False


def _read_codes(model: Part, wanted: Options, entry: Entry) -> tuple[list[GraphPlan], int]:
    """The tokenizer's graph, and how many codes an image becomes."""
    plan = image_tokenizer_plan(model)
    return [plan], int(plan.outputs[0].shape[-1])


def _read_features(model: Part, wanted: Options, entry: Entry) -> tuple[list[GraphPlan], int]:
    projector = submodule(model, wanted.projector, entry)
    reader = model.model  # Janus's outer class does not pass get_image_features on
    vision, mapped, tokens = vision_plans(model, projector, image_layout(reader, reader, projector))
    return [vision, mapped], tokens


_READ: dict[str, Callable[[Part, Options, Entry], tuple[list[GraphPlan], int]]] = {
    "codes": _read_codes,
    "features": _read_features,
}


class EarlyFusion:
    """See the module's docstring."""

    name = "early_fusion"
    auto_class = "AutoModelForImageTextToText"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        wanted = options(entry, Options)
        if wanted.images != "codes":
            return
        names = getattr(config, "vocabulary_map", None) or {}
        codes = [name for name in names if name.startswith("IMGIMG")]
        entries = int(getattr(getattr(config, "vq_config", None), "num_embeddings", 0))
        if "<image>" not in names or len(codes) < entries:
            raise UnsupportedModelError(
                f"vocabulary_map of '{entry.model_type}' names {len(codes)} image tokens (IMGIMG…) and "
                f"{'' if '<image>' in names else 'no '}<image>; the codebook has {entries} entries: put the tokenizer's whole "
                "vocabulary there."
            )

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        kv, hidden, vocabulary = probe(model)
        reading, tokens = _READ[wanted.images](model, wanted, entry)
        context_length = int(model.config.get_text_config().max_position_embeddings)
        decoder = decoder_plan(model, kv, hidden, vocabulary, context_length)
        if wanted.images == "codes":
            decoder = without_image_tokens(decoder, model)
        writing = image_output_plans(model, hidden) if wanted.output else []
        if wanted.output:
            decoder = with_hidden(decoder, model)
        contract = GenerativeContract(
            family=self.name,
            modalities=[_modality(checkpoint, wanted, [plan.role for plan in reading], tokens)],
            positions=SequentialPositions(),
            kv=kv,
            hidden_size=hidden,
            vocab_size=vocabulary,
            context_length=context_length,
            eos_token_ids=checkpoint.eos_token_ids(),
            pad_token_id=checkpoint.pad_token_id(),
            bos_token_id=checkpoint.bos_token_id(),
            prompt=_prompt(checkpoint, wanted),
            image_output=image_output(checkpoint, _frame_token(checkpoint, "boi", wanted.frame[0])) if wanted.output else None,
        )
        return Split((*reading, embed_plan(model, hidden, vocabulary), decoder, *writing), contract)


def _modality(checkpoint: Checkpoint, wanted: Options, graphs: list[str], tokens: int) -> Modality:
    """An image between its begin and end tokens, as the processors of Chameleon and Janus write it."""
    token_id = image_token_id(checkpoint.config)
    told = (checkpoint.processor or {}).get("image_token")
    token = getattr(checkpoint.tokenizer, "image_token", None) or told or checkpoint.tokenizer.convert_ids_to_tokens(token_id)
    if token is None or checkpoint.tokenizer.convert_tokens_to_ids(token) != token_id:
        raise UnsupportedModelError(f"The tokenizer's image token '{token}' is not token {token_id}, as the configuration says.")
    begin, end = (_frame_token(checkpoint, name, usual) for name, usual in zip(("boi", "eoi"), wanted.frame, strict=True))
    return Modality(
        graphs=graphs,
        batch="image",
        joins="codes" if wanted.images == "codes" else "tokens",
        token_id=token_id,
        placeholder=FixedPlaceholder(image_token=token, tokens_per_image=tokens, before=begin, after=end),
    )


def _frame_token(checkpoint: Checkpoint, name: str, usual: str) -> str:
    """`boi_token` or `eoi_token` of the tokenizer, or what the processor fixes in code."""
    tokenizer: Any = checkpoint.tokenizer
    token = str(getattr(tokenizer, f"{name}_token", None) or usual)
    if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
        raise UnsupportedModelError(f"The tokenizer has no token '{token}' ({name}_token), which stands around an image.")
    return token


def _prompt(checkpoint: Checkpoint, wanted: Options) -> PromptFormat:
    """What the processor writes after a text: Chameleon's separator, after which an answer begins."""
    end = getattr(checkpoint.tokenizer, wanted.end, None) if wanted.end else None
    if (checkpoint.processor or {}).get("return_for_text_completion"):
        end = None
    return PromptFormat(template=f"{{images}}{{text}}{end or ''}")


FAMILY = EarlyFusion()
