"""Images written token by token (Janus, arXiv 2410.13848, section 3.2; Janus-Pro, 2501.17811). A part of family `early_fusion`.

The decoder gives one more output, the hidden states that its heads read, and three small graphs do what text does not need:
`image_head` (hidden states → logits over the codebook), `image_embed` (a code → what the decoder reads next) and
`image_detokenizer` (an image's codes → pixels). Text pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlm_edge.export.attention import PastCache
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.image_output import CodebookOutput
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Single, Tensors, float32, int64, randn

USUAL_GUIDANCE = 5.0
"""What Janus's `generate` takes where the checkpoint says nothing."""
HIDDEN = "hidden_states"


class _DecoderWithHidden(torch.nn.Module):
    """The decoder graph with one more output, `[batch, sequence, hidden]`."""

    def __init__(self, model: Part) -> None:
        super().__init__()
        self.model: Part = model

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> Tensors:
        cache = PastCache(past)
        hidden = self.model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return (self.model.lm_head(hidden), *cache.presents(), hidden)


def with_hidden(plan: GraphPlan, model: Part) -> GraphPlan:
    """The graph `decoder`, which also gives what its head is called with."""
    width = plan.inputs[0].shape[-1]
    before, masks_before = plan.reference, plan.compared

    def reference(case: Case, inputs: Tensors) -> Tensors:
        seen: list[torch.Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
        try:
            outputs = before(case, inputs)
        finally:
            handle.remove()
        return (*outputs, *seen)

    def compared(case: Case, inputs: Tensors) -> Tensors | None:
        masks = masks_before(case, inputs)
        return None if masks is None else (*masks, masks[0])

    return replace(
        plan,
        module=_DecoderWithHidden(model),
        outputs=(*plan.outputs, float32(HIDDEN, "batch", "sequence", width)),
        reference=reference,
        compared=compared,
    )


class _Embed(torch.nn.Module):
    def __init__(self, model: Part) -> None:
        super().__init__()
        self.generation_embeddings = model.model.generation_embeddings
        self.generation_aligner = model.model.generation_aligner

    def forward(self, codes: torch.Tensor) -> Tensors:
        return (self.generation_aligner(self.generation_embeddings(codes)),)


class _Detokenizer(torch.nn.Module):
    """Codes `[images, tokens]` → pixels: the entries at unit length, in a square, through the VQ decoder."""

    def __init__(self, tokenizer: Part) -> None:
        super().__init__()
        self.tokenizer: Part = tokenizer

    def forward(self, codes: torch.Tensor) -> Tensors:
        return (self.tokenizer.decode(codes),)


def image_output_plans(model: Part, hidden: int) -> list[GraphPlan]:
    """The graphs `image_head`, `image_embed` and `image_detokenizer`."""
    codes, tokens = _codes(model), _tokens(model)
    with torch.no_grad():
        pixels = model.model.vqmodel.decode(torch.zeros(1, tokens, dtype=torch.long))
    states, code, whole = (
        float32(HIDDEN, "batch", "sequence", hidden),
        int64("image_codes", "batch", "sequence"),
        int64("image_codes", "images", tokens),
    )
    steps = _cases("batch", ("sequence", 3), (2, 1, 2))
    images = tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3))

    def sample(spec: object) -> object:
        return lambda case: (torch.randint(0, codes, case.shape(spec), generator=case.generator()),)

    return [
        GraphPlan(
            role="image_head",
            module=Single(model.model.generation_head),
            inputs=(states,),
            outputs=(float32("image_logits", "batch", "sequence", codes),),
            cases=steps,
            sample=lambda case: (randn(states, case),),
            reference=lambda case, inputs: (model.model.generation_head(inputs[0].clone()),),
        ),
        GraphPlan(
            role="image_embed",
            module=_Embed(model),
            inputs=(code,),
            outputs=(float32("inputs_embeds", "batch", "sequence", hidden),),
            cases=steps,
            sample=sample(code),  # type: ignore[arg-type]
            reference=lambda case, inputs: (model.prepare_embeddings_for_image_generation(inputs[0]),),
        ),
        GraphPlan(
            role="image_detokenizer",
            module=_Detokenizer(model.model.vqmodel),
            inputs=(whole,),
            outputs=(float32("pixels", "images", *pixels.shape[1:]),),
            cases=images,
            sample=sample(whole),  # type: ignore[arg-type]
            reference=lambda case, inputs: (model.decode_image_tokens(inputs[0]).permute(0, 3, 1, 2),),
        ),
    ]


def image_output(checkpoint: Checkpoint, begin: str) -> CodebookOutput:
    """What the host must know to write an image. Raises UnsupportedModelError for a codebook that does not fit the image."""
    model: Part = checkpoint.model
    generation = checkpoint.generation
    begin_token = (getattr(generation, "generation_kwargs", None) or {}).get("boi_token_id")
    if begin_token is None:
        begin_token = checkpoint.tokenizer.convert_tokens_to_ids(begin)
    bos = checkpoint.bos_token_id()
    images = checkpoint.image_processor
    return CodebookOutput(
        tokens=_tokens(model),
        codes=_codes(model),
        begin_token=int(begin_token),
        blank_token=checkpoint.pad_token_id(),
        kept_tokens=sorted({int(begin_token), *([bos] if bos is not None else [])}),
        guidance_scale=float(getattr(generation, "guidance_scale", None) or USUAL_GUIDANCE),
        mean=[float(value) for value in images["image_mean"]],
        std=[float(value) for value in images["image_std"]],
    )


def _codes(model: Part) -> int:
    return int(model.config.vq_config.num_embeddings)


def _tokens(model: Part) -> int:
    side = int(model.config.vq_config.num_patches)
    tokens = int(model.config.vision_config.num_image_tokens)
    if tokens != side * side:
        raise UnsupportedModelError(
            f"An image is written in {tokens} tokens (vision_config.num_image_tokens), and decoded from {side} × {side} "
            "(image_size / patch_size): these must be equally many."
        )
    return tokens


def _cases(rows: str, other: tuple[str, int], counts: Sequence[int]) -> tuple[Case, ...]:
    name, size = other
    lengths = (size, 1, size + 4)
    return tuple(Case(f"{rows} {n}, {length} tokens", {rows: n, name: length}) for n, length in zip(counts, lengths, strict=True))
