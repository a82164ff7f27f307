"""Which session class runs which kind of contract, as data."""

from __future__ import annotations

from vlm_edge_runtime.bundle.manifest import GenerativeContract, Manifest

SESSIONS: dict[str, tuple[str, str]] = {
    "generative": ("vlm_edge_runtime.sessions.vision_language_model", "VisionLanguageModel"),
    "dual_encoder": ("vlm_edge_runtime.sessions.dual_encoder", "DualEncoder"),
    "contrastive": ("vlm_edge_runtime.sessions.contrastive_captioner", "ContrastiveCaptioner"),
}
"""What kind of session → (module, class). Modules are imported when a bundle of the family is loaded."""

_WRITES = (
    "generate",
    "stream",
    "generate_image",
    "chat",
    "cancel",
    "embed_image",
    "count_tokens",
    "prefetch",
    "watch",
    "prepare",
    "logits_along",
    "decode_tokens",
)
_COMPARES = ("embed_text", "similarity", "classify")
METHODS: dict[str, tuple[str, ...]] = {
    "generative": _WRITES,
    "dual_encoder": ("embed_image", *_COMPARES),
    "contrastive": (*_WRITES, "image_vectors", *_COMPARES),
}
"""What can be asked of each."""


def session_kind(manifest: Manifest) -> str:
    """The key of SESSIONS: the contract's tag, or "contrastive" for a generative one that also compares."""
    contract = manifest.contract
    return "contrastive" if isinstance(contract, GenerativeContract) and contract.contrast is not None else manifest.session


def methods(manifest: Manifest) -> tuple[str, ...]:
    """What can be asked of one bundle: its contract's methods, less those that need what it does not have."""
    contract, files = manifest.contract, {ref.file for ref in manifest.files}
    found = METHODS[session_kind(manifest)]
    if isinstance(contract, GenerativeContract):
        lacks = {"embed_image"} if contract.modality("image") is None else set()
        lacks |= {"generate_image"} if contract.image_output is None else set()
        # Some checkpoints keep their template among the tokenizer's settings.
        lacks |= {"chat"} if files.isdisjoint({"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}) else set()
        found = tuple(name for name in found if name not in lacks)
    return found
