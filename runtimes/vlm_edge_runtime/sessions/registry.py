"""Which session class runs which kind of contract, as data."""

from __future__ import annotations

SESSIONS: dict[str, tuple[str, str]] = {
    "generative": ("vlm_edge_runtime.sessions.vision_language_model", "VisionLanguageModel"),
    "dual_encoder": ("vlm_edge_runtime.sessions.dual_encoder", "DualEncoder"),
}
"""A contract's tag → (module, class). Modules are imported when a bundle of the family is loaded."""

METHODS: dict[str, tuple[str, ...]] = {
    "generative": ("generate", "stream", "chat", "cancel", "embed_image", "count_tokens", "prepare", "logits_along"),
    "dual_encoder": ("embed_image", "embed_text", "similarity", "classify"),
}
"""What can be asked of each: named when something else is asked."""
