"""The part of the manifest for models that write images, token by token."""

from __future__ import annotations

import msgspec


class CodebookOutput(msgspec.Struct, kw_only=True, tag="codebook", tag_field="kind", forbid_unknown_fields=True):
    """Janus: an image is `tokens` codes of a codebook with `codes` entries, which has an embedding and a head of its own.

    The prompt's tokens and `begin_token` go in; then each step takes the decoder's further output `hidden_states`
    `[batch, sequence, hidden]` through graph `image_head` → `image_logits` `[batch, sequence, codes]`, chooses a code (int64
    `image_codes`), and feeds what graph `image_embed` makes of it, `inputs_embeds` `[batch, sequence, hidden]`. At last graph
    `image_detokenizer` makes `image_codes` `[images, tokens]` into `pixels` float32 `[images, 3, height, width]`; a channel is
    pixel · `std` + `mean`, from 0 to 1.

    Guidance (Parti, arXiv 2206.10789, section 3.2; Ho & Salimans, 2207.12598): logits = unconditional + scale · (conditional −
    unconditional). The unconditional prompt is the prompt with `blank_token` for every token but `kept_tokens`; `guidance_scale`
    is the checkpoint's own.
    """

    tokens: int
    codes: int
    begin_token: int
    blank_token: int
    kept_tokens: list[int]
    guidance_scale: float
    mean: list[float]
    std: list[float]


ImageOutput = CodebookOutput
"""How a model writes images; other kinds join here."""
