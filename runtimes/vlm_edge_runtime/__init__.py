"""vlm-edge's runtime: vision-language models on a device, without PyTorch.

    from vlm_edge_runtime import load

    vlm = load("smolvlm.vlm")
    for piece in vlm.stream("What is on the table?", images=["table.jpg"]):
        print(piece, end="")

Importing this package is cheap: ONNX Runtime and everything else is loaded with the first bundle.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BundleError,
    CapabilityError,
    ContextLengthError,
    DeviceError,
    GenerationCancelled,
    ImageError,
    OptionError,
    PromptError,
    TargetError,
    UnsupportedModelError,
    VlmEdgeError,
)

if TYPE_CHECKING:
    from .bundle.manifest import Manifest
    from .decode.cancel import CancelToken
    from .decode.result import FinishReason, Generation
    from .decode.stats import Counters, Stats
    from .sessions.base import Session
    from .sessions.contrastive_captioner import ContrastiveCaptioner
    from .sessions.conversation import Conversation
    from .sessions.dual_encoder import DualEncoder, EmbeddingStats, LabelScore, Similarity
    from .sessions.image_tokens import GeneratedImage
    from .sessions.load import load
    from .sessions.prefetched import Prefetched
    from .sessions.prepared import PreparedInput, PreparedPrompt
    from .sessions.stream import TextStream
    from .sessions.vision_language_model import VisionLanguageModel
    from .sessions.watch import Sight, Watch

__version__ = "0.1.0"

_LAZY = {
    "CancelToken": ".decode.cancel",
    "ContrastiveCaptioner": ".sessions.contrastive_captioner",
    "Conversation": ".sessions.conversation",
    "Counters": ".decode.stats",
    "DualEncoder": ".sessions.dual_encoder",
    "EmbeddingStats": ".sessions.dual_encoder",
    "FinishReason": ".decode.result",
    "GeneratedImage": ".sessions.image_tokens",
    "Generation": ".decode.result",
    "LabelScore": ".sessions.dual_encoder",
    "Manifest": ".bundle.manifest",
    "Prefetched": ".sessions.prefetched",
    "PreparedInput": ".sessions.prepared",
    "PreparedPrompt": ".sessions.prepared",
    "Session": ".sessions.base",
    "Similarity": ".sessions.dual_encoder",
    "Sight": ".sessions.watch",
    "Stats": ".decode.stats",
    "TextStream": ".sessions.stream",
    "VisionLanguageModel": ".sessions.vision_language_model",
    "Watch": ".sessions.watch",
    "load": ".sessions.load",
}

__all__ = [
    "BundleError",
    "CancelToken",
    "CapabilityError",
    "ContextLengthError",
    "ContrastiveCaptioner",
    "Conversation",
    "Counters",
    "DeviceError",
    "DualEncoder",
    "EmbeddingStats",
    "FinishReason",
    "GeneratedImage",
    "Generation",
    "GenerationCancelled",
    "ImageError",
    "LabelScore",
    "Manifest",
    "OptionError",
    "Prefetched",
    "PreparedInput",
    "PreparedPrompt",
    "PromptError",
    "Session",
    "Sight",
    "Similarity",
    "Stats",
    "TargetError",
    "TextStream",
    "UnsupportedModelError",
    "VisionLanguageModel",
    "VlmEdgeError",
    "Watch",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
