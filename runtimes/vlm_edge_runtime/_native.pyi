"""The C extension: image arithmetic, sampling, ONNX Runtime sessions and the decode loop. Sources in runtimes/native."""

import os
from collections.abc import Mapping, Sequence
from mmap import mmap
from typing import Any, Literal, Protocol

import numpy.typing as npt

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
"""What exports the buffer protocol (collections.abc.Buffer, which is younger than Python 3.11)."""

class _SamplingParams(Protocol):
    """What is read of `engines.base.SamplingParams`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def logprobs(self) -> int: ...
    @property
    def min_length(self) -> int: ...
    @property
    def no_repeat_ngram_size(self) -> int: ...
    @property
    def suppress_tokens(self) -> tuple[int, ...]: ...
    @property
    def begin_suppress_tokens(self) -> tuple[tuple[int, tuple[int, ...]], ...]: ...
    @property
    def forced_tokens(self) -> tuple[tuple[int, tuple[int, ...]], ...]: ...
    @property
    def sequence_bias(self) -> tuple[tuple[tuple[int, ...], float], ...]: ...

# --- images and prompts ---

def normalize_u8(
    frames: Sequence[Buffer],
    scale: float,
    mean: Sequence[float],
    std: Sequence[float],
    out: Buffer,
    patch: int = 0,
    merge: int = 1,
    depth: int = 1,
    threads: int = 1,
) -> None:
    """uint8 frames [height, width, channels] of one size → `out` float32 = (float32(value · scale) − mean) / std.

    The product is taken in float64 and rounded once, the rest is float32: bit for bit what transformers' numpy image
    processors compute. 1 to 4 channels. Lines may lie apart (a part of a larger image), pixels may not.

    `out` is [frames, channels, height, width]; with `patch`, [⌈frames / depth⌉ · rows · columns, channels · depth · patch²]: the
    patches of one merge × merge block next to each other, blocks in reading order, the last frame filling up the last step.
    Raises ValueError or TypeError for buffers that do not fit.
    """

def resize_u8(
    source: Buffer,
    out: Buffer,
    filter: Literal["box", "bilinear", "hamming", "bicubic", "lanczos"],
    order: Literal["auto", "horizontal", "vertical"] = "auto",
    threads: int = 1,
    kernels: Literal["scalar", "avx2", "avx512", "neon"] | None = None,
) -> None:
    """`source` uint8 [height, width, channels] → `out`, of another size: Pillow's 8-bit arithmetic, integer for integer.

    `Image.resize` of modes L and RGB. `order`: which pass is first (its result is rounded); "auto" is Pillow 13's choice, older
    ones always start "horizontal". Channels are independent: unlike Pillow with RGBA, alpha is not multiplied in first.
    The source's lines may lie apart. `kernels`: the best of the CPU; the result is the same with any.
    """

def merge_features(embeddings: Buffer, input_ids: Buffer, image_token_id: int, features: Buffer) -> int:
    """Feature rows float32 [rows, hidden] replace, in order and in place, the embeddings float32 [tokens, hidden] of those

    `input_ids` int64 [tokens] that equal `image_token_id`; returns how many. Raises PromptError naming both numbers, with
    nothing written, when they differ.
    """

# --- sampling ---

def uniform(seed: int, step: int) -> float:
    """Draw number `step` of the stream `seed`, in [0, 1): 53 bits of Philox4x32-10 with counter `step` and key `seed`."""

def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011)."""

class Sampler:
    """The decode loop's sampler for one row, usable by itself. Raises ValueError for parameters out of range."""

    def __init__(self, vocab_size: int, params: _SamplingParams) -> None: ...
    def accept(self, token: int) -> None:
        """Adds a token to those that the penalty and the rules on what may come next look at."""

    def choose(self, logits: Buffer) -> tuple[int, float, list[tuple[int, float]]]:
        """(token, its log probability, the most likely tokens) for float32 [vocab]; the last two as `logprobs` asks.

        Raises DeviceError when the logits contain NaN or +∞, or are all −∞.
        """

    def distribution(self, logits: Buffer) -> bytes:
        """float64 [vocab]: the filtered distribution that `choose` draws from."""

# --- ONNX Runtime ---

def load_runtime(path: str) -> str:
    """Opens ONNX Runtime's shared library (once per process) and returns its version. Raises DeviceError."""

def runtime_version() -> str | None:
    """Version of the ONNX Runtime that is open in this process, or None."""

class Tensor:
    """An output of a graph: exports the buffer protocol over ONNX Runtime's own memory (no copy)."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

TensorInfo = tuple[str, str, tuple[int | str, ...]]
"""(name, numpy dtype, shape with names for dynamic dimensions)."""

def plan_step(session: Session, feeds: Mapping[str, Buffer]) -> dict[str, tuple[bytes, str, tuple[int, ...]]]:
    """One step of a decoder plan on arrays, as its lowered graph would be run: (bytes, dtype, shape) of each output.

    For checking: the caches are copied. Raises ValueError for arrays that do not fit each other, DeviceError.
    """

def kernels() -> list[str]:
    """Instruction sets of the native kernels that this CPU runs, the fastest (a plan's default) first: "avx512", "avx2", "neon",

    "scalar".
    """

def graph_run(session: Session, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
    """Runs the plan of a graph that is no decoder; fills the output arrays, which are given, each [images, …] as the inputs are.

    Raises DeviceError for arrays that are missing or of other sizes, TypeError and ValueError for other types and ranks.
    """

def rows_run(session: Session, tokens: Buffer, rows: Buffer) -> None:
    """Runs the plan of an embedding: int64 [batch, sequence] → float32 [batch, sequence, hidden], which is given and filled.

    Raises DeviceError for a token that the table has no row of, TypeError and ValueError for other types and shapes.
    """

def check_plan(path: str | os.PathLike[str]) -> None:
    """Raises DeviceError, saying both versions, for a plan of another one; nothing else of the file is looked at."""

def fill_pages(mapping: Buffer | mmap) -> bool:
    """Brings the pages of a mapped file into memory, other threads running meanwhile. False where the system cannot do that

    (it is Linux 5.14 that can), or cannot read some of them: then reading the file says why.
    """

def trim_heap() -> None:
    """Gives back what the C library keeps of freed memory, where it can be told to (glibc)."""

def plan_seconds(session: Session) -> list[tuple[str, int, float]]:
    """(kind, width, seconds of all threads together) of each step of a plan since the last call; the first begins to measure."""

class Session:
    """One graph loaded by ONNX Runtime on the CPU, or (`plan`) a decoder plan by its path, which runs in a DecoderState only.

    `kernels`: the instruction set of a plan by name, None for the best that the CPU has.

    `model`: a path, or the bytes of a model. `threads` and `spin` describe the thread pool: sessions that agree share one
    pool, another wish gets a pool of its own. `cuda`: options of the CUDA provider, which then comes before the CPU's
    (`user_compute_stream` is the stream's address in digits). Raises DeviceError, naming the graph, when ONNX Runtime refuses.
    """

    def __init__(
        self,
        model: str | bytes,
        name: str,
        config: Mapping[str, str] = ...,
        optimization_level: int = 99,
        threads: int = 1,
        spin: bool = True,
        plan: bool = False,
        kernels: str | None = None,
        cuda: Mapping[str, str] | None = None,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> list[TensorInfo]: ...
    @property
    def outputs(self) -> list[TensorInfo]: ...
    @property
    def kernels(self) -> str | None:
        """The instruction set that a plan runs with ("avx512", "avx2", "neon", "scalar"); None for a graph of ONNX Runtime."""

    @property
    def together(self) -> dict[str, int]:
        """Of a graph's plan: how many rows of each input and output belong to one image; empty for other sessions."""

    @property
    def shared_pool(self) -> bool:
        """Whether this session runs on the process-wide pool."""

    def run(self, feeds: Mapping[str, Buffer]) -> dict[str, Tensor]:
        """All outputs; the interpreter lock is released meanwhile. Raises DeviceError (also for wrong names, types, shapes)."""

    def close(self) -> None:
        """Frees the session as soon as nothing runs on it; further calls raise DeviceError."""

class DecoderState:
    """KV cache and token loop over a lowered decoder; see `engines.base.DecoderState` for the meaning of each call."""

    def __init__(self, decoder: Session, embed_tokens: Session, batch: int, capacity: int, prefill_chunk: int = 0) -> None: ...
    @property
    def batch(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache (address space; pages are taken when written)."""

    @property
    def verifies(self) -> bool:
        """Whether `verify` can be had: the decoder is a plan without recurrent state."""

    def bind(self, row: int, inputs: Mapping[str, Buffer]) -> None: ...
    def prefill(
        self, row: int, inputs_embeds: Buffer, positions: Buffer, token_inputs: Mapping[str, Buffer] | None = None
    ) -> None: ...
    def logits(self, row: int) -> bytes: ...
    def start(
        self,
        row: int,
        params: _SamplingParams,
        history: Buffer,
        next_position: int,
        token_inputs: Mapping[str, Buffer] | None = None,
    ) -> None: ...
    def decode(self, max_steps: int) -> list[tuple[list[int], list[float], list[list[tuple[int, float]]], bool]]: ...
    def verify(
        self, drafts: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[float], list[list[tuple[int, float]]], bool]]: ...
    def push(self, row: int, token: int) -> None: ...
    def step(self, tokens: Buffer) -> bytes: ...
    def reorder(self, sources: Sequence[int]) -> None: ...
    def outputs(self, row: int) -> dict[str, tuple[bytes, str, tuple[int, ...]]]:
        """Name → (bytes, numpy dtype, shape) of each further output for the row's newest token."""

    def truncate(self, row: int, length: int) -> None: ...
    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None: ...
    def take_times(self) -> tuple[list[float], list[float]]:
        """Seconds of each (embed_tokens, decoder) run since the last call."""

    def cancel(self) -> None: ...
    def close(self) -> None: ...

# --- CUDA ---

def session_placement(session: Session) -> list[tuple[str, str, str]] | None:
    """(provider, operator, node's name) of each node of a session that was made with the configuration entry

    `session.record_ep_graph_assignment_info`; None for an ONNX Runtime older than 1.24. Raises DeviceError.
    """

class BoundRun:
    """A run of `session` over memory at addresses, which the caller keeps alive: bound once, run many times.

    `cuda`: the addresses are of GPU 0, the run is queued on the session's stream and not waited for, and `graph_id` names the
    CUDA graph that ONNX Runtime captures of it (−1: none). Raises DeviceError.
    """

    def __init__(self, session: Session, cuda: bool = False, graph_id: int = -1) -> None: ...
    @property
    def runs(self) -> int:
        """How often it ran, in the C loop too."""

    def bind_input(self, name: str, address: int, shape: Sequence[int], host: bool = False, /) -> None:
        """Memory of the input's type and this shape; `host`: an address of the host. Raises DeviceError for what does not fit."""

    def bind_output(self, name: str, address: int, shape: Sequence[int], host: bool = False, /) -> None: ...
    def run(self) -> None:
        """Runs, with the interpreter lock released. Raises DeviceError naming the graph."""

class CudaLoop:
    """Launches decode steps, one ahead, and collects what each one chose; for one decoder state.

    `library`: the CUDA driver's shared library. Raises DeviceError when it cannot be used.
    """

    def __init__(self, library: str) -> None: ...
    def run(
        self,
        stream: int,
        events: tuple[int, int],
        graphs: tuple[int | Sequence[int | BoundRun], int | Sequence[int | BoundRun]],
        turn: int,
        ring: int,
        slots: int,
        batch: int,
        base: int,
        steps: int,
    ) -> tuple[bytes, int]:
        """Up to `steps` steps on `stream`, with the interpreter lock released: (records [done, batch], how many were launched).

        Handles and the `ring`'s host address are integers; `graphs[(turn + step) % 2]` is launched: a captured graph's handle, or
        a sequence of such and of runs, one after another; `base` steps are in the ring of `slots` already. Raises DeviceError
        with the driver's or ONNX Runtime's error.
        """

    def cancel(self) -> None: ...
    def resume(self) -> None: ...
    @property
    def cancelled(self) -> bool: ...
