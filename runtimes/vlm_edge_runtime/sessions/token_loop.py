"""Who chooses the next tokens of a run: the engine's own loop, or another with the same two methods (beam search)."""

from __future__ import annotations

from typing import Protocol

from vlm_edge_runtime.engines.base import DecoderState, RowTokens
from vlm_edge_runtime.errors import DeviceError


class TokenLoop(Protocol):
    """Produces the answers of rows that are filled and started."""

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` steps: new tokens for each prompt, none yet where they only come with the last step."""


class EngineLoop:
    """The engine's token loop: each row's next token by its own parameters."""

    def __init__(self, state: DecoderState) -> None:
        self._state = state

    def decode(self, max_steps: int) -> list[RowTokens]:
        """As `DecoderState.decode`."""
        return self._state.decode(max_steps)


def check_progress(produced: list[RowTokens]) -> None:
    """Raises DeviceError when an engine's loop gave nothing though rows are open: it would go on for ever."""
    if not any(new.tokens for new in produced):
        raise DeviceError("the decoder produced no token although rows are open: this is a fault in the engine.")
