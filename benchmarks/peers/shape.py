"""What a checkpoint's shape costs: multiplications, bytes of cache; from its config.json alone.

A multiplication and an addition count as two operations. Attention counts the causal half (token t looks at t + 1 tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True, frozen=True)
class Shape:
    """A decoder (gated MLP, grouped-query attention) behind a vision transformer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    vision_products: float
    """Operations of the vision encoder's matrix products with weights, one tile, the projector among them."""
    vision_attention: float
    """Operations of its attention, one tile."""

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        query, cache = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * query + 2 * cache + 3 * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Numbers in the matrix that gives the logits."""
        return self.hidden * self.vocabulary

    def cache_bytes(self, context: float, number: float) -> float:
        """Bytes of keys and values of `context` tokens, `number` bytes each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context * number

    def prompt_products(self, tokens: int) -> float:
        """Operations of the matrix products of a prompt, whose last token alone needs logits."""
        return 2.0 * self.layer_weights * tokens + 2.0 * self.head_weights

    def prompt_attention(self, tokens: int) -> float:
        """Operations of causal attention over a prompt."""
        return 2.0 * tokens * (tokens + 1) * self.heads * self.head_dim * self.layers


def read(checkpoint: Path, picture: tuple[int, int]) -> Shape:
    """The shape in a checkpoint's config.json; `picture`: width and height in pixels of what the encoder sees as one tile.

    Raises ValueError for a model type whose vision encoder is not known here.
    """
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    heads = text["num_attention_heads"]
    products, attention = _vision(config, text, picture)
    return Shape(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        vision_products=products,
        vision_attention=attention,
    )


def _vision(config: Mapping[str, Any], text: Mapping[str, Any], picture: tuple[int, int]) -> tuple[float, float]:
    vision, kind = config["vision_config"], config["model_type"]
    channels, patch = vision.get("num_channels", vision.get("in_channels", 3)), vision["patch_size"]
    if kind in ("smolvlm", "idefics3"):
        tokens = (vision["image_size"] // patch) ** 2
        width, layers, inner = vision["hidden_size"], vision["num_hidden_layers"], vision["intermediate_size"]
        scale = config["scale_factor"] ** 2
        project = 2.0 * (tokens // scale) * width * scale * text["hidden_size"]
        embed = 2.0 * tokens * width * channels * patch**2
    elif kind == "qwen2_vl":
        tokens = (picture[0] // patch) * (picture[1] // patch)
        width, layers = vision["embed_dim"], vision["depth"]
        inner, merged = int(width * vision.get("mlp_ratio", 4)), width * vision.get("spatial_merge_size", 2) ** 2
        project = 2.0 * tokens / vision.get("spatial_merge_size", 2) ** 2 * merged * (merged + vision["hidden_size"])
        embed = 2.0 * tokens * width * channels * patch**2 * vision.get("temporal_patch_size", 2)
    else:
        raise ValueError(f"the bench counts the operations of smolvlm, idefics3 and qwen2_vl, not of '{kind}'")
    layer = 2.0 * tokens * (4 * width**2 + 2 * width * inner)
    return layers * layer + embed + project, 4.0 * tokens**2 * width * layers
