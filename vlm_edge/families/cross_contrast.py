"""The contrastive half of a captioner (CoCa, arXiv 2205.01917): images and texts as vectors of one space, as graphs.

Not a family: a part of family `cross_attention`. The graph `contrast_head` goes on from the features that the decoder reads; the
graph `text_encoder` is the decoder's unimodal layers over a text that ends with a token of its own.
"""

from __future__ import annotations

import torch

from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import DualEncoderContract, SoftmaxSimilarity, TensorSpec
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Tensors, float32, int64, randn

CONTRAST_HEAD, TEXT_ENCODER = "contrast_head", "text_encoder"
_NEEDED = ("get_text_features", "logit_scale")


def contrast_plans(
    checkpoint: Checkpoint, vision: Part, decoder: Part, features: TensorSpec, length: int
) -> tuple[tuple[GraphPlan, ...], DualEncoderContract]:
    """The two graphs, and the rule of comparison. `features`: the vision encoder's output; `length`: most tokens of a text.

    The model has `get_text_features(input_ids, attention_mask)` and `logit_scale`, its vision encoder `contrast(features)`, its
    decoder's configuration `cls_token_id`. Raises UnsupportedModelError for one that has not.
    """
    model: Part = checkpoint.model
    missing = [name for name in _NEEDED if not hasattr(model, name)] + ([] if hasattr(vision, "contrast") else ["contrast"])
    end = getattr(decoder.config, "cls_token_id", None)
    if missing or end is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {missing[0] if missing else 'cls_token_id'}: a captioner that also compares images "
            "with texts gives its vectors by get_text_features() and its vision encoder's contrast()."
        )
    pad = checkpoint.pad_token_id()
    head = _image_head(model, vision, features)
    text = _text_encoder(model, decoder, length, int(end), pad)
    contract = DualEncoderContract(
        embedding_dim=int(head.outputs[0].shape[-1]),
        similarity=SoftmaxSimilarity(logit_scale=float(model.logit_scale.exp())),
        text_length=length,
        text_padding="longest",
        pad_token_id=pad,
        end_token_id=int(end),
        image_graphs=[CONTRAST_HEAD],
    )
    return (head, text), contract


class _ImageHead(torch.nn.Module):
    """`image_features [images, queries, hidden]` → `image_embeds [images, projection]`."""

    def __init__(self, vision: Part) -> None:
        super().__init__()
        self.vision: Part = vision

    def forward(self, image_features: torch.Tensor) -> Tensors:
        return (self.vision.contrast(image_features),)


def _image_head(model: Part, vision: Part, features: TensorSpec) -> GraphPlan:
    cases = tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3))

    def reference(case: Case, inputs: Tensors) -> Tensors:
        return (vision.contrast(inputs[0].clone()),)

    with torch.no_grad():
        width = int(reference(cases[0], (randn(features, cases[0]),))[0].shape[-1])
    outputs = (float32("image_embeds", "images", width),)
    return GraphPlan(
        CONTRAST_HEAD, _ImageHead(vision), (features,), outputs, cases, lambda case: (randn(features, case),), reference
    )


class _TextEncoder(torch.nn.Module):
    """`input_ids`, `attention_mask` int64 `[texts, sequence]` → `text_embeds [texts, projection]`."""

    def __init__(self, model: Part) -> None:
        super().__init__()
        self.model: Part = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tensors:
        return (self.model.get_text_features(input_ids, attention_mask).pooler_output,)


def _text_encoder(model: Part, decoder: Part, length: int, end: int, pad: int) -> GraphPlan:
    """Texts of several lengths; the first of several is shorter than the others and padded on the right."""
    inputs = (int64("input_ids", "texts", "sequence"), int64("attention_mask", "texts", "sequence"))
    vocabulary = int(decoder.get_input_embeddings().weight.shape[0])
    cases = tuple(
        Case(f"{texts} text{'s' * (texts > 1)} of {tokens} tokens", {"texts": texts, "sequence": tokens})
        for texts, tokens in ((2, min(7, length)), (1, min(5, length)), (3, min(19, length)))
    )

    def sample(case: Case) -> Tensors:
        ids = torch.randint(0, vocabulary, case.shape(inputs[0]), generator=case.generator())
        real = torch.full((ids.shape[0],), ids.shape[1])
        if ids.shape[0] > 1:
            real[0] = max(2, ids.shape[1] // 2)
        beyond = torch.arange(ids.shape[1])[None] >= real[:, None]
        ids[beyond] = pad
        ids[torch.arange(ids.shape[0]), real - 1] = end
        return (ids, (~beyond).long())

    def reference(case: Case, tensors: Tensors) -> Tensors:
        return (model.get_text_features(*(tensor.clone() for tensor in tensors)).pooler_output,)

    with torch.no_grad(), attention_implementation(model, "eager"):
        width = int(reference(cases[0], sample(cases[0]))[0].shape[-1])
    return GraphPlan(
        TEXT_ENCODER, _TextEncoder(model), inputs, (float32("text_embeds", "texts", width),), cases, sample, reference
    )
