"""Text to token ids and back: tokenizer, chat template, image placeholders, position ids."""

from .chat_template import ChatTemplate, Message, find_chat_template, load_chat_template
from .expansion import Expansion, expand
from .placeholders import expand_text, image_text, image_tokens, joined, placeholder_token
from .positions import position_ids
from .stream import StreamDecoder
from .tokenizer import TextBatch, Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "Expansion",
    "Message",
    "StreamDecoder",
    "TextBatch",
    "Tokenizer",
    "expand",
    "expand_text",
    "find_chat_template",
    "image_text",
    "image_tokens",
    "joined",
    "load_chat_template",
    "load_tokenizer",
    "placeholder_token",
    "position_ids",
]
