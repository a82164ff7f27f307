"""Which session class runs which family, as data: a new family is one line in each table."""

from __future__ import annotations

SESSIONS: dict[str, tuple[str, str]] = {
    "projector": ("vlm_edge_runtime.sessions.vision_language_model", "VisionLanguageModel"),
    "dual_encoder": ("vlm_edge_runtime.sessions.dual_encoder", "DualEncoder"),
}
"""A contract's tag → (module, class). Modules are imported when a bundle of the family is loaded."""

METHODS: dict[str, tuple[str, ...]] = {
    "projector": ("generate", "stream", "chat", "cancel", "embed_image", "count_tokens"),
    "dual_encoder": ("embed_image", "embed_text", "similarity", "classify"),
}
"""What can be asked of a family: named when something else is asked."""
