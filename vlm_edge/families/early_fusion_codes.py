"""Images as tokens of the text's vocabulary: the VQ tokenizer, and a decoder that answers in text. A part of `early_fusion`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Tensors, float32, int64, randn
from .decoder import Decoder


class ImageTokenizer(torch.nn.Module):
    """`pixel_values [images, channels, size, size]` → `image_codes` int64 `[images, tokens]`, in the text's vocabulary.

    The nearest entry of the codebook (arXiv 1711.00937, equation 1; Make-a-Scene's tokenizer, 2203.13131, section 3.2), then the
    model's own mapping from entries to tokens.
    """

    def __init__(self, model: Part) -> None:
        super().__init__()
        self.tokenizer: Part = model.model.vqmodel
        self.register_buffer("tokens", model.model.vocabulary_mapping.img2bpe_mapping_tensor.long(), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        hidden = self.tokenizer.quant_conv(self.tokenizer.encoder(pixel_values))
        entries = self.tokenizer.quantize(hidden)[2]
        tokens: torch.Tensor = self.tokens  # type: ignore[assignment]
        return (tokens[entries].view(hidden.shape[0], hidden.shape[2] * hidden.shape[3]),)


def image_tokenizer_plan(model: Part) -> GraphPlan:
    """The graph `image_tokenizer`."""
    config: Any = model.config.vq_config
    pixels = float32("pixel_values", "images", config.in_channels, config.resolution, config.resolution)
    with torch.no_grad():
        tokens = model.get_image_tokens(torch.zeros(1, *(int(size) for size in pixels.shape[1:]))).shape[1]
    return GraphPlan(
        role="image_tokenizer",
        module=ImageTokenizer(model),
        inputs=(pixels,),
        outputs=(int64("image_codes", "images", tokens),),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        sample=lambda case: (randn(pixels, case).clamp(-1, 1),),
        reference=lambda case, inputs: (model.get_image_tokens(inputs[0].clone()).long(),),
    )


class _TextAnswers(torch.nn.Module):
    """The model without an image; logits of image tokens are the type's minimum, as the model itself writes them."""

    def __init__(self, model: Part, tokens: torch.Tensor) -> None:
        super().__init__()
        self.model: Part = model.model
        self.lm_head: Part = model.lm_head
        self.register_buffer("image_tokens", tokens, persistent=False)

    def forward(self, **arguments: Any) -> SimpleNamespace:
        logits = self.lm_head(self.model(**arguments).last_hidden_state)
        tokens: torch.Tensor = self.image_tokens  # type: ignore[assignment]
        return SimpleNamespace(logits=torch.where(tokens, torch.finfo(logits.dtype).min, logits))


def without_image_tokens(plan: GraphPlan, model: Part) -> GraphPlan:
    """The graph `decoder` of a model that never names an image token.

    The type's minimum would make every other difference look small: image tokens are compared by themselves, before tracing.
    """
    images = torch.zeros(int(plan.outputs[0].shape[-1]), dtype=torch.bool)
    images[model.model.vocabulary_mapping.image_tokens] = True
    with torch.no_grad():
        logits = model(inputs_embeds=model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long))).logits
    if not torch.equal(logits[0, 0] == torch.finfo(logits.dtype).min, images):
        raise UnsupportedModelError(
            f"The logits of {type(model).__name__} leave out other tokens than the image tokens of its vocabulary_map: this "
            "family expects those, and none besides."
        )
    before = plan.compared

    def compared(case: Case, inputs: Tensors) -> Tensors:
        masks = before(case, inputs) or tuple(
            torch.ones(1, *[1] * (len(spec.shape) - 1), dtype=torch.bool) for spec in plan.outputs
        )
        return (masks[0] & ~images, *masks[1:])

    return replace(plan, module=Decoder(_TextAnswers(model, images)), compared=compared)
