"""Every error a user can meet. Each message says what was found, what was expected, and what to do."""

from __future__ import annotations


class VlmEdgeError(Exception):
    """Base of all errors that vlm-edge raises on purpose."""


class BundleError(VlmEdgeError):
    """The bundle cannot be used: a file is missing or truncated, a hash differs, the schema is too new."""


class TargetError(VlmEdgeError):
    """An unknown target, or a build that the target cannot have."""


class UnsupportedModelError(VlmEdgeError):
    """The checkpoint's model type or configuration cannot be carried; raised before anything is traced."""


class ExportError(VlmEdgeError):
    """Tracing or checking a graph failed."""


class ParityError(VlmEdgeError):
    """A comparison could not be carried out (a comparison that *fails* is a verdict, not an error)."""


class DeviceError(VlmEdgeError):
    """The asked-for device or engine is not available here."""


class ImageError(VlmEdgeError):
    """The input is not an image that can be decoded, or is outside what the model accepts."""


class PromptError(VlmEdgeError):
    """The prompt and the images do not fit together, or the chat template refused the messages."""


class ContextLengthError(PromptError):
    """The prompt (with its image tokens) and the asked-for answer do not fit the KV cache."""


class OptionError(PromptError, ValueError):
    """A generation option is outside its range, or asks for something this runtime does not do."""


class CapabilityError(VlmEdgeError, AttributeError):
    """The bundle's family has no such method (`generate` of a dual encoder); names what it can do."""


class GenerationCancelled(VlmEdgeError):
    """`cancel()` was called while a blocking `generate` was running; carries what was generated so far."""

    def __init__(self, message: str, partial_text: str = "") -> None:
        super().__init__(message)
        self.partial_text = partial_text
