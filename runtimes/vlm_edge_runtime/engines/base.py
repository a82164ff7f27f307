"""What an engine must do. ONNX Runtime on the CPU implements this today; TensorRT and native kernels slot in here.

Two shapes of work exist: a `Graph` maps named arrays to named arrays (vision encoder, projector, text encoder), and a
`Decoder` owns a KV cache and produces tokens. Everything above this file is independent of who executes the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import TensorSpec

Array = npt.NDArray[np.generic]


@runtime_checkable
class Graph(Protocol):
    """One loaded graph. `run` may be called from any thread; calls on one graph are serialised by the engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the named inputs. Raises DeviceError with the graph's name if the engine refuses."""

    def close(self) -> None:
        """Frees the session and its memory; further calls raise DeviceError."""


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How the next token is chosen for one row; the order of operations is transformers' (penalty, temperature, k, p, min-p).

    `temperature` 0 means greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch each filter off.
    `seed` drives a counter-based generator of its own per row, so a row's text does not depend on its neighbours.

    Rules on what may come next; lengths count the tokens of `history` (see `DecoderState.start`) too. `min_length`: no
    end-of-sequence token before so many tokens are there. `no_repeat_ngram_size`: no n-gram twice (0: off).
    `suppress_tokens`: never. `begin_suppress_tokens`, `forced_tokens`: (length, tokens) pairs: at that length none, or nothing
    but, these. `sequence_bias`: (sequence, bias) pairs: added to the last token's score after the others; −∞ forbids it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    logprobs: int = -1
    """−1: none; 0: the chosen token's log probability; n > 0: also the n most likely tokens (before any filter)."""
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[tuple[int, tuple[int, ...]], ...] = ()
    forced_tokens: tuple[tuple[int, tuple[int, ...]], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()


@dataclass(slots=True)
class RowTokens:
    """What one row produced in one `decode` call (EOS included, as the last token, when it was reached)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finished: bool = False


class DecoderState(Protocol):
    """A KV cache of fixed capacity for `batch` rows, each with its own length.

    Rows are filled one by one (`prefill` appends to a row at its current length, so a reused prefix is simply a row that is
    already partly filled) and decoded together. A write past the capacity raises ContextLengthError before anything runs.
    """

    batch: int
    capacity: int

    @property
    def lengths(self) -> list[int]:
        """Valid KV entries per row."""

    def bind(self, row: int, inputs: Mapping[str, Array]) -> None:
        """Sets what one row's decoder reads besides its tokens, each array without the batch dimension, all of them at once.

        Static inputs (cross-attention keys and values, source masks) hold until the next `bind`; `state.{i}` is the initial value
        of a recurrent state. Only an empty row can be bound (`truncate` it first): its entries came from other inputs. Rows
        may differ in the length of a dynamic dimension; shorter ones are filled with zeros, which their masks hide. A decoder
        whose graph has such inputs refuses to run a row that was not bound. Raises ValueError for missing, unknown or
        misshapen inputs, and for rows of unlike length without a mask input.
        """

    def prefill(self, row: int, inputs_embeds: Array, positions: Array, token_inputs: Mapping[str, Array] | None = None) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] (or [3, S] for M-RoPE) to one row.

        `token_inputs`: the graph's further inputs with a value per token (`block_ids`, `cross_attention_mask`, `deepstack.{i}`),
        each [S, …]; those not given are zeros. A block of tokens that see each other must be given in one call.
        Leaves the last token's logits as that row's next-token logits, drops its pending token and disarms it. On an error
        the row's length is what it was.
        """

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the row's next-token logits, float32 [vocab]: after `prefill` those that follow the prompt, after `decode`

        those that the newest token was chosen from, after `push` those that follow the pushed token (which runs it).
        """

    def start(
        self,
        row: int,
        params: SamplingParams,
        history: npt.NDArray[np.int64],
        next_position: int,
        token_inputs: Mapping[str, Array] | None = None,
    ) -> None:
        """Arms a prefilled row for `decode`. `history`: token ids that the repetition penalty looks at (the prompt's);

        `next_position`: the position of the first generated token (all three axes of M-RoPE advance together from it).
        `token_inputs`: what every generated token has for the graph's further inputs, each […]; those not given are zeros.
        Clears an earlier `cancel`. Raises ValueError for parameters out of range.
        """

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` tokens for every unfinished row, the interpreter lock released. Stops early when all rows met EOS

        or `cancel` was called. The newest token's own KV is computed lazily, by the next `decode` call.

        A row that fills the cache on the way ends the call early for all rows; the next call raises ContextLengthError.
        Rows that were not started, or have finished, keep what they hold. Raises DeviceError for NaN or infinite logits.
        """

    def push(self, row: int, token: int) -> None:
        """Teacher forcing: replaces the row's pending token by `token` (parity checks, constrained decoding).

        A finished row goes on.
        """

    def step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs one token of every row as one batch and returns the logits that follow, float32 [batch, vocab].

        For whoever chooses tokens outside the engine (beam search, guidance). Every row must have been started; its pending
        token, if any, is replaced by `tokens[row]`, which is then part of the cache. Raises ContextLengthError before anything
        runs when a row is full.
        """

    def reorder(self, sources: Sequence[int]) -> None:
        """Row `i` becomes what row `sources[i]` was, all at once: entries, recurrent state, logits, position (beam search).

        Rows must be bound to equal static inputs where they trade places.
        """

    def outputs(self, row: int) -> dict[str, Array]:
        """The graph's further outputs for the row's newest token, each without batch and sequence (attention maps)."""

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's entries from `length` on, and its pending token and logits. Takes it out of `decode`.

        A decoder with recurrent state can only be truncated to 0.
        """

    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None:
        """Makes `row` a copy of the first `length` entries of another row: of this state, or of another of its decoder."""

    def cancel(self) -> None:
        """Makes a running `decode` return after the current step, and later ones return at once until the next `start`.

        Safe from any thread.
        """

    def close(self) -> None:
        """Frees the cache (after the running call, if there is one); further calls raise DeviceError."""


class VerifyingState(DecoderState, Protocol):
    """A state whose decoder gives the logits of several tokens of a row at once: that of a build with native kernels."""

    def verify(self, drafts: Sequence[Sequence[int]]) -> list[RowTokens]:
        """One step for every unfinished row, as `decode(1)`, in which tokens that may follow run together with the newest one.

        `drafts`: for each row, token ids; none for rows without a newest token. A row gives the token that `decode` would give,
        and, for as long as that is what its draft says too, those of further steps: from 1 to len(draft) + 1 tokens, bit for bit
        what single steps give (log probabilities included), fewer where an end-of-sequence token is among them. Only entries of
        tokens that were produced count as held. Raises ValueError for tokens outside the vocabulary and for decoders that cannot,
        ContextLengthError when a draft does not fit the cache, before anything runs.
        """


class Decoder(Protocol):
    """A loaded decoder: `embed_tokens` and `decoder` graphs with a token loop around them."""

    hidden_size: int
    vocab_size: int

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""

    def allocate(self, batch: int, capacity: int) -> DecoderState:
        """A new, empty cache. Raises DeviceError when the memory cannot be had."""

    def close(self) -> None:
        """Frees both sessions."""


@dataclass(slots=True, frozen=True)
class EngineOptions:
    """What `load()` passes to an engine. `threads` 0 means the number of physical cores.

    `spin`: idle workers wait actively for a short while (faster, warmer). `prefill_chunk`: prompts run in pieces of so many
    tokens (bounds the memory that a long prompt takes); 0 runs each prompt whole. `encoder_threads`: of the graphs that are not
    the decoder's (vision encoder, projector …); 0 means as many as `threads`.
    """

    threads: int = 0
    spin: bool = True
    prefill_chunk: int = 0
    encoder_threads: int = 0


class Engine(Protocol):
    """Loads the graphs of one build."""

    name: str

    def graph(self, role: str) -> Graph:
        """The graph of that role, loaded on first use."""

    def decoder(self) -> Decoder:
        """The decoder pair, loaded on first use."""

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        """Seconds of each call so far, per graph role (for `bench` and `vlm.stats`)."""

    def close(self) -> None:
        """Frees every session."""
