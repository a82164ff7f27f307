"""GIT (arXiv 2205.14100) taken apart: the parts of family `prefix_lm` in which it differs from the others.

Its decoder is BERT-like: text tokens get learned positions and a LayerNorm before the first layer, image features get neither.
`block_ids` tells them apart: the prefix, block 1, is the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_edge.export.attention import blocks
from vlm_edge.export.patches.git import git_attention
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, Part, int64
from .blocks import NAME
from .decoder import Arguments, ExtraInput
from .layouts import pixels_of


def refuse(config: PreTrainedConfig) -> None:
    """Raises UnsupportedModelError for what cannot be carried."""
    if (frames := getattr(config, "num_image_with_embedding", None)) is not None:
        raise UnsupportedModelError(
            f"This GIT reads {frames} frames of a video, each with an embedding of its time (num_image_with_embedding); only "
            "checkpoints that read one image can be carried."
        )


class GitParts(torch.nn.Module):
    """A `GitForCausalLM` with the methods of a vision-language model of transformers' newer kind.

    Called with embeddings in which the tokens of block 1 are image features, it gives logits and fills the cache.
    """

    def __init__(self, model: Part) -> None:
        super().__init__()
        self.model: Part = model
        self.config = model.config

    def get_input_embeddings(self) -> torch.nn.Module:
        found: torch.nn.Module = self.model.git.get_input_embeddings()
        return found

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[images, channels, height, width]` → `[images, tokens, hidden]`."""
        git = self.model.git
        features: torch.Tensor = git.visual_projection(git.image_encoder(pixel_values).last_hidden_state)
        return features

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        block_ids: torch.Tensor,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        git = self.model.git
        # The embeddings add positions in place.
        words = git.embeddings(inputs_embeds=inputs_embeds.clone(), position_ids=position_ids)
        hidden = torch.where((block_ids > 0)[..., None], inputs_embeds, words)
        mask = create_causal_mask(
            config=git.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        output = git.encoder(hidden, attention_mask=mask, past_key_values=past_key_values, use_cache=True)
        return CausalLMOutputWithPast(logits=self.model.output(output.last_hidden_state), past_key_values=past_key_values)


def git_block_input(parts: GitParts) -> ExtraInput:
    """`block_ids` of GIT. The reference is the original model's own forward: an image before the text, or text after a past."""

    @contextmanager
    def traced(model: Part, block_ids: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        arguments["block_ids"] = block_ids
        with blocks(block_ids), git_attention():
            yield

    def original(model: Part, block_ids: torch.Tensor, arguments: Arguments) -> AbstractContextManager[Any]:
        arguments["block_ids"] = block_ids
        return _original_forward(parts)

    return ExtraInput(int64(NAME, "batch", "sequence"), _sample, traced, original)


def _sample(case: Case) -> torch.Tensor:
    """An image of half the tokens stands before the text; GIT's own forward has no other place for it."""
    ids = torch.zeros(case.sizes["batch"], case.sizes["sequence"], dtype=torch.long)
    if not case.sizes["past"] and not case.padding:
        ids[:, : ids.shape[1] // 2] = 1
    return ids


@contextmanager
def _original_forward(parts: GitParts) -> Iterator[None]:
    """Inside, `parts` calls `GitForCausalLM` itself: features come out of its projection, masks are its own."""

    def forward(
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        block_ids: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        model = parts.model
        prefix = int(block_ids[0].sum())
        given: dict[str, Any] = {"past_key_values": past_key_values, "position_ids": position_ids[:, prefix:], **kwargs}
        with ExitStack() as stack:
            if prefix:
                pixels = pixels_of(model.config.vision_config, "images")
                given["pixel_values"] = torch.zeros(Case("", {"images": len(block_ids)}).shape(pixels))
                given["attention_mask"] = attention_mask[:, prefix:]
                handle = model.git.visual_projection.register_forward_hook(lambda *_: inputs_embeds[:, :prefix])
                stack.callback(handle.remove)
            else:
                # A two-dimensional mask would be widened by the tokens of an image; one that is drawn is taken as it is.
                given["attention_mask"] = create_causal_mask(
                    config=model.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
            return model(inputs_embeds=inputs_embeds[:, prefix:].clone(), **given)

    parts.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del parts.forward
