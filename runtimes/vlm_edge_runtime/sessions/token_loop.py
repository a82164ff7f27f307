"""Who chooses the next tokens of a run: the engine's own loop, a loop in Python, or a beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from vlm_edge_runtime.decode.beam import BeamLoop, BeamSearch
from vlm_edge_runtime.decode.options import GenerationOptions
from vlm_edge_runtime.decode.processors import Ids
from vlm_edge_runtime.decode.prompt_lookup import LookupRow, PromptLookupLoop
from vlm_edge_runtime.decode.stepwise import StepRow, StepwiseLoop
from vlm_edge_runtime.engines.base import DecoderState, RowTokens, SamplingParams, VerifyingState
from vlm_edge_runtime.errors import DeviceError


class TokenLoop(Protocol):
    """Produces the answers of rows that are filled and started."""

    steps: int
    """Steps so far, the first one's choice from the prompts' logits included."""

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` steps: new tokens for each prompt, none yet where they only come with the last step."""

    def drop(self, row: int) -> None:
        """The prompt's answer has ended for a reason of the caller's: it takes no further part."""


class EngineLoop:
    """The engine's token loop: each row's next token by its own parameters."""

    def __init__(self, state: DecoderState) -> None:
        self._state = state
        self.steps = 0

    def decode(self, max_steps: int) -> list[RowTokens]:
        """As `DecoderState.decode`."""
        produced = self._state.decode(max_steps)
        self.steps += max(len(new.tokens) for new in produced)
        return produced

    def drop(self, row: int) -> None:
        """Nothing: a truncated row is out."""


@dataclass(slots=True, frozen=True)
class Wanted:
    """One answer that a loop is asked for. `history`: the tokens before it; `source`: those that encoder controls look at;

    `copied`: the history as drafts are copied from it, negative where it must not be.
    """

    params: SamplingParams
    limit: int
    history: Ids
    source: Ids
    copied: Ids


def token_loop(
    state: DecoderState,
    options: GenerationOptions,
    wanted: Sequence[Wanted],
    cancelled: Callable[[], bool],
    stops: Callable[[Ids], bool],
) -> TokenLoop:
    """The loop that a call's options need. `stops`: whether new tokens end the text (for beams)."""
    if options.lookup is not None:
        rows_ = [LookupRow(one.copied, one.limit, options.lookup) for one in wanted]
        return PromptLookupLoop(cast(VerifyingState, state), rows_, cancelled)
    if not options.beams and not options.in_python:
        return EngineLoop(state)
    beams = options.beams is not None
    processors = [options.controls.processors(one.params, len(one.history), one.source.tolist(), beams=beams) for one in wanted]
    if options.beams is not None:
        searches = [
            BeamSearch(
                options.beams,
                one.history,
                one.limit,
                one.params.eos_token_ids,
                each,
                stops=stops if options.stop else None,
                seed=one.params.seed,
            )
            for one, each in zip(wanted, processors, strict=True)
        ]
        return BeamLoop(state, searches, cancelled)
    guided = options.controls.guided
    rows = [
        StepRow(one.history, one.params, each, number + len(wanted) if guided else None, options.controls.guidance_scale)
        for number, (one, each) in enumerate(zip(wanted, processors, strict=True))
    ]
    return StepwiseLoop(state, rows, cancelled)


def check_progress(steps: int) -> None:
    """Raises DeviceError when a loop did nothing though rows are open: it would go on for ever."""
    if steps == 0:
        raise DeviceError("the decoder produced no token although rows are open: this is a fault in the engine.")
