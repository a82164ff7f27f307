"""What a plan cannot say."""

from __future__ import annotations


class NotExpressible(Exception):
    """Something in a decoder has no native step; the message says what. The decoder then stays with ONNX Runtime, as a whole."""
