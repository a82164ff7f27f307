"""A conversation: its history goes into every prompt, and what earlier turns left in the KV cache is reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from vlm_edge_runtime.decode.options import SamplingKeywords
from vlm_edge_runtime.decode.result import Generation
from vlm_edge_runtime.errors import GenerationCancelled
from vlm_edge_runtime.preprocess import ImageLike

from .inputs import ARGUMENTS, Given, as_given
from .media import Medium
from .run import Run
from .stream import TextStream

if TYPE_CHECKING:
    from .vision_language_model import VisionLanguageModel

Message = dict[str, Any]
Media = dict[str, list[Medium]]


class Conversation:
    """Made by `VisionLanguageModel.chat()`. Options given there hold for every turn; a turn may set its own on top.

    A turn enters the history when it ends, for whatever reason, with the answer as far as it came; a turn that failed or was
    ended before it began leaves no trace.
    """

    def __init__(self, session: VisionLanguageModel, system: str | None, options: Mapping[str, Any]) -> None:
        self._session = session
        self._options = dict(options)
        self._messages: list[Message] = []
        self._media: Media = {}
        if system is not None:
            self._messages.append({"role": "system", "content": [{"type": "text", "text": system}]})

    @property
    def messages(self) -> list[Message]:
        """The history as a chat template gets it: role, and a list of `image` (`video` …) and `text` parts. A copy."""
        return [{**message, "content": [dict(part) for part in message["content"]]} for message in self._messages]

    def send(
        self,
        text: str,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        **options: Unpack[SamplingKeywords],
    ) -> Generation:
        """One turn, answered as a whole. Inputs and errors as `VisionLanguageModel.generate`."""
        messages, media = self._with(text, {"image": images, "video": videos, "audio": audio, "state": states})
        opened: dict[str, Any] = {ARGUMENTS[kind]: own for kind, own in media.items()}
        try:
            answer: Generation = self._session.generate(messages, **opened, **{**self._options, **options})
        except GenerationCancelled as cancelled:
            self._keep(messages, media, cancelled.partial_text)
            raise
        self._keep(messages, media, answer.text)
        return answer

    def stream(
        self,
        text: str,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        **options: Unpack[SamplingKeywords],
    ) -> TextStream:
        """One turn, piece by piece."""
        messages, media = self._with(text, {"image": images, "video": videos, "audio": audio, "state": states})

        def ended(run: Run) -> None:
            if run.stats.steps:
                self._keep(messages, media, run.results()[0].text)

        given: Given = {kind: list(own) for kind, own in media.items()}
        return self._session._stream(messages, given, ended, **{**self._options, **options})

    def reset(self) -> None:
        """Forgets all turns but the system prompt."""
        self._messages = [message for message in self._messages if message["role"] == "system"]
        self._media = {}

    def _with(self, text: str, arguments: Mapping[str, Any]) -> tuple[list[Message], Media]:
        new = self._session._open(as_given(arguments))
        content: list[dict[str, Any]] = [{"type": kind} for kind, own in new.items() for _ in own]
        content.append({"type": "text", "text": text})
        media = {kind: [*self._media.get(kind, ()), *new.get(kind, ())] for kind in {**self._media, **new}}
        return [*self._messages, {"role": "user", "content": content}], media

    def _keep(self, messages: list[Message], media: Media, answer: str) -> None:
        self._messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self._media = media
