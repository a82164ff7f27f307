"""A conversation: its history goes into every prompt, and what earlier turns left in the KV cache is reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from vlm_edge_runtime.decode.options import SamplingKeywords
from vlm_edge_runtime.decode.result import Generation
from vlm_edge_runtime.errors import GenerationCancelled
from vlm_edge_runtime.preprocess import ImageLike

from .images import Picture
from .run import Run
from .stream import TextStream

if TYPE_CHECKING:
    from .vision_language_model import VisionLanguageModel

Message = dict[str, Any]


class Conversation:
    """Made by `VisionLanguageModel.chat()`. Options given there hold for every turn; a turn may set its own on top.

    A turn enters the history when it ends, for whatever reason, with the answer as far as it came; a turn that failed or was
    ended before it began leaves no trace.
    """

    def __init__(self, session: VisionLanguageModel, system: str | None, options: Mapping[str, Any]) -> None:
        self._session = session
        self._options = dict(options)
        self._messages: list[Message] = []
        self._pictures: list[Picture] = []
        if system is not None:
            self._messages.append({"role": "system", "content": [{"type": "text", "text": system}]})

    @property
    def messages(self) -> list[Message]:
        """The history as a chat template gets it: role, and a list of `image` and `text` parts. A copy."""
        return [{**message, "content": [dict(part) for part in message["content"]]} for message in self._messages]

    def send(
        self, text: str, images: ImageLike | Sequence[ImageLike] | None = None, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """One turn, answered as a whole. Errors as `VisionLanguageModel.generate`."""
        messages, pictures = self._with(text, images)
        try:
            answer = self._session.generate(messages, images=pictures or None, **{**self._options, **options})
        except GenerationCancelled as cancelled:
            self._keep(messages, pictures, cancelled.partial_text)
            raise
        self._keep(messages, pictures, answer.text)
        return answer

    def stream(
        self, text: str, images: ImageLike | Sequence[ImageLike] | None = None, **options: Unpack[SamplingKeywords]
    ) -> TextStream:
        """One turn, piece by piece."""
        messages, pictures = self._with(text, images)

        def ended(run: Run) -> None:
            if run.stats.steps:
                self._keep(messages, pictures, run.results()[0].text)

        return self._session._stream(messages, pictures or None, ended, **{**self._options, **options})

    def reset(self) -> None:
        """Forgets all turns but the system prompt."""
        self._messages = [message for message in self._messages if message["role"] == "system"]
        self._pictures = []

    def _with(self, text: str, images: Any) -> tuple[list[Message], list[Picture]]:
        new = self._session._pictures(images)
        content: list[dict[str, Any]] = [{"type": "image"} for _ in new]
        content.append({"type": "text", "text": text})
        return [*self._messages, {"role": "user", "content": content}], [*self._pictures, *new]

    def _keep(self, messages: list[Message], pictures: list[Picture], answer: str) -> None:
        self._messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self._pictures = pictures
