"""Family `dual_encoder`: an image encoder and a text encoder into one space, compared by the cosine of their vectors.

CLIP (arXiv 2103.00020), SigLIP (2303.15343). Two graphs, `vision_encoder` and `text_encoder`; both vectors leave the graphs
before they are brought to unit length.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch
from transformers import PreTrainedConfig

from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import (
    DualEncoderContract,
    SigmoidSimilarity,
    Similarity,
    SoftmaxSimilarity,
)
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Split, Tensors, float32, int64, options, randn
from .layouts import pixels_of
from .registry import Entry


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about a model type of this family; see registry.toml."""

    similarity: Literal["softmax", "sigmoid"]
    text: list[Literal["input_ids", "attention_mask"]]
    padding: Literal["longest", "max_length"]


class DualEncoder:
    """See the module's docstring."""

    name = "dual_encoder"
    auto_class = "AutoModel"

    def refuse(self, config: PreTrainedConfig, entry: Entry) -> None:
        for part in ("vision_config", "text_config"):
            if getattr(config, part, None) is None:
                raise UnsupportedModelError(f"The configuration of '{entry.model_type}' has no {part}: it is not a dual encoder.")

    def split(self, checkpoint: Checkpoint, entry: Entry) -> Split:
        model, wanted = checkpoint.model, options(entry, Options)
        length = int(model.config.text_config.max_position_embeddings)
        pad = checkpoint.pad_token_id()
        vision, text = _vision_plan(model), _text_plan(checkpoint, wanted, length, pad)
        contract = DualEncoderContract(
            embedding_dim=int(vision.outputs[0].shape[-1]),
            similarity=_similarity(model, wanted.similarity),
            text_length=length,
            text_padding=wanted.padding,
            pad_token_id=pad,
        )
        return Split((vision, text), contract)


class _ImageEncoder(torch.nn.Module):
    """`pixel_values [images, channels, height, width]` → `image_embeds [images, embedding]`."""

    def __init__(self, model: Part) -> None:
        super().__init__()
        self.model: Part = model

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        return (self.model.get_image_features(pixel_values=pixel_values).pooler_output,)


class _TextEncoder(torch.nn.Module):
    """`input_ids [texts, sequence]` and, where the model reads one, `attention_mask` → `text_embeds [texts, embedding]`."""

    def __init__(self, model: Part, names: list[str]) -> None:
        super().__init__()
        self.model: Part = model
        self._names = tuple(names)

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        return (self.model.get_text_features(**dict(zip(self._names, tensors, strict=True))).pooler_output,)


def _vision_plan(model: Part) -> GraphPlan:
    pixels = pixels_of(model.config.vision_config, "images")
    cases = tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3))

    def reference(case: Case, inputs: Tensors) -> Tensors:
        return (model.get_image_features(pixel_values=inputs[0].clone()).pooler_output,)

    width = _width(model, reference, cases[0], (randn(pixels, cases[0]),))
    outputs = (float32("image_embeds", "images", width),)
    return GraphPlan(
        "vision_encoder", _ImageEncoder(model), (pixels,), outputs, cases, lambda case: (randn(pixels, case),), reference
    )


def _text_plan(checkpoint: Checkpoint, wanted: Options, length: int, pad: int) -> GraphPlan:
    """Texts of several lengths; with a mask, the first text is shorter than the others and padded on the right."""
    model: Part = checkpoint.model
    names: list[str] = list(wanted.text)
    dynamic = wanted.padding == "longest"
    sequence: int | str = "sequence" if dynamic else length
    inputs = tuple(int64(name, "texts", sequence) for name in names)
    lengths = (min(7, length), min(5, length), length) if dynamic else (length,) * 3
    cases = tuple(
        Case(f"{texts} text{'s' * (texts > 1)} of {tokens} tokens", {"texts": texts, "sequence": tokens})
        for texts, tokens in zip((2, 1, 3), lengths, strict=True)
    )
    vocabulary = int(model.config.text_config.vocab_size)
    end = checkpoint.tokenizer.eos_token_id

    def sample(case: Case) -> Tensors:
        ids = torch.randint(0, vocabulary, case.shape(inputs[0]), generator=case.generator())
        real = torch.full((ids.shape[0],), ids.shape[1])
        if ids.shape[0] > 1:
            real[0] = max(2, ids.shape[1] // 2)
        beyond = torch.arange(ids.shape[1])[None] >= real[:, None]
        ids[beyond] = pad
        if end is not None:  # CLIP reads its vector at the first end of text, which must stand where the text ends
            ids[ids == end] = (end + 1) % vocabulary if (end + 1) % vocabulary != pad else 0
            ids[beyond] = pad
            ids[torch.arange(ids.shape[0]), real - 1] = end
        mask = (~beyond).long()
        return (ids, mask)[: len(names)]

    def reference(case: Case, tensors: Tensors) -> Tensors:
        named = {name: tensor.clone() for name, tensor in zip(names, tensors, strict=True)}
        return (model.get_text_features(**named).pooler_output,)

    width = _width(model, reference, cases[0], sample(cases[0]))
    return GraphPlan(
        "text_encoder", _TextEncoder(model, names), inputs, (float32("text_embeds", "texts", width),), cases, sample, reference
    )


def _width(model: Part, reference: Any, case: Case, inputs: Tensors) -> int:
    with torch.no_grad(), attention_implementation(model, "eager"):
        return int(reference(case, inputs)[0].shape[-1])


def _similarity(model: Part, kind: str) -> Similarity:
    if (temperature := getattr(model, "temperature", None)) is not None:  # ALIGN divides by it
        scale = 1.0 / float(temperature)
    else:
        scale = float(model.logit_scale.exp())
    return (
        SigmoidSimilarity(logit_scale=scale, logit_bias=float(model.logit_bias))
        if kind == "sigmoid"
        else SoftmaxSimilarity(logit_scale=scale)
    )


FAMILY = DualEncoder()
