"""The session of families that write text about images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, Unpack, overload

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.decode.actions import decode_actions
from vlm_edge_runtime.decode.cancel import CancelLike
from vlm_edge_runtime.decode.options import SamplingKeywords
from vlm_edge_runtime.decode.result import Generation
from vlm_edge_runtime.decode.stats import Counters, Stats
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.errors import BundleError, CapabilityError, GenerationCancelled, OptionError
from vlm_edge_runtime.preprocess import ImageLike
from vlm_edge_runtime.text import Message, Tokenizer

from .ahead import Ahead, Prefetcher
from .base import missing_method
from .conversation import Conversation
from .forced import logits_along
from .image_tokens import GeneratedImage, ImageKeywords, image_prompt, write_image
from .inputs import Given, as_given, as_list, as_rows
from .kv_plan import KVPlan, cache_sizes
from .media import Medium
from .parts import assemble
from .prepared import PreparedInput, PreparedPrompt
from .requests import open_run
from .run import Run
from .stream import TextStream

Prompt: TypeAlias = "str | Sequence[Message]"
Images: TypeAlias = "ImageLike | Sequence[ImageLike]"


class VisionLanguageModel(Ahead):
    """Answers prompts about images. Made by `load()`.

    Threads: calls of `generate` take turns, a second one waits until the first is done; an open `stream` takes a turn for
    each piece only, so it may stay open while others run. `cancel()` is safe from anywhere.

    Memory: each call's KV cache is allocated once (see `KVPlan`); caches of earlier calls are kept within
    `prefix_cache_bytes`; encoded images (videos …), and what cross-attention reads of them, within `image_cache_bytes`.

    Neither cache changes an answer beyond rounding, with one exception: a decoder whose activations are quantised on the
    fly (precision "int8") takes their range over all tokens of a call, so there batches and kept prefixes shift it slightly.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        context_length: int | None = None,
        image_cache_bytes: int = 256 << 20,
        prefix_cache: bool = True,
        prefix_cache_bytes: int = 512 << 20,
        image_options: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(bundle, engine)
        contract = bundle.manifest.contract
        if not isinstance(contract, GenerativeContract) or bundle.kv is None:
            raise BundleError(f"{bundle.path} is of family {bundle.manifest.family}: it does not generate text.")
        sizes = cache_sizes(bundle.build)
        most = min(contract.context_length, *sizes[-1:]) if sizes else contract.context_length
        limit = context_length if context_length is not None else most
        if not 2 <= limit <= most:
            whose = "this model's" if most == contract.context_length else f"what build '{bundle.build_name}' has an engine for"
            raise OptionError(f"context_length={limit} is out of range: {whose} is 2 … {most}.")
        if image_options and contract.modality("image") is None:
            raise OptionError(f"image_options={dict(image_options)!r}: {bundle.path} takes no images.")
        self._parts = assemble(
            bundle,
            engine,
            contract,
            lambda: self._image_processor(image_options),
            plan=KVPlan.make(bundle.kv, limit, getattr(engine, "kv_budget", None), sizes),
            image_cache_bytes=image_cache_bytes,
            prefix_cache_bytes=prefix_cache_bytes if prefix_cache else None,
            tokenizer=tokenizer,
        )
        self._turn = threading.Lock()
        self._active: dict[int, Run] = {}
        self._prefetcher = Prefetcher(self._parts.modalities)
        self._cancels = 0
        self._stats = Stats()
        self.counters = Counters()
        """Sums over all calls."""

    def __getattr__(self, name: str) -> Any:
        raise missing_method(self, name)

    # --- generation ---

    @overload
    def generate(
        self,
        prompt: str,
        images: Images | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
        **options: Unpack[SamplingKeywords],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Message],
        images: Images | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
        **options: Unpack[SamplingKeywords],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[Message]],
        images: Sequence[Images | None] | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
        **options: Unpack[SamplingKeywords],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        images: Images | Sequence[Images | None] | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
        **options: Unpack[SamplingKeywords],
    ) -> Generation | list[Generation]:
        """The answer to a prompt, or the answers to a list of prompts, which run as one batch.

        `prompt`: a text, or chat messages (dicts of role and content, as for a Hugging Face chat template; an image part may
        carry its image under "image"; likewise video, audio and state parts). A plain text becomes a user's message, its inputs
        before it, unless `raw` is set or it already holds placeholders: then it is used as it is. Where the bundle has no chat
        template, the contract's prompt format takes its place.
        `images`: one image or a list for one prompt; for a list of prompts one entry for each (an image, a list, or None).
        `videos`, `audio`, `states`: likewise, for models that take them. A video is a list of frames, uint8 `[frames, height,
        width, 3]`, or an animated image (a path, bytes or PIL image); audio is features float32 `[T, D]`; a state is a vector.
        `cancel`: a `CancelToken` or `threading.Event` that ends this call. `return_attention`: also what the decoder looked at
        for each token, where its graph says. Options: see `SamplingKeywords`.

        Raises GenerationCancelled (with the partial text), ContextLengthError, PromptError (images and placeholders do not
        match, the template refuses), OptionError, ImageError, DeviceError, CapabilityError (no attention to return).
        """
        began = time.perf_counter()
        cancels = self._cancels
        self._check_open()
        rows, single = as_rows(prompt, {"image": images, "video": videos, "audio": audio, "state": states})
        run = open_run(self._parts, rows, raw, cancel, began, options, return_attention)
        self._active[id(run)] = run
        if cancels != self._cancels:  # cancelled while the images were being opened
            run.cancel.cancel()
        with self._turn:
            try:
                self._begin(run)
                while not run.done:
                    run.advance()
            finally:
                run.close()
                self._end(run)
        results = run.results()
        if any(result.finish_reason == "cancelled" for result in results):
            text = "\n".join(result.text for result in results)
            count = run.stats.new_tokens
            raise GenerationCancelled(
                f"cancelled after {count} token{'s' * (count != 1)}; what there is stands in partial_text.", text
            )
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        images: Images | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
        **options: Unpack[SamplingKeywords],
    ) -> TextStream:
        """The answer to one prompt as an iterator of text pieces; arguments and errors as `generate`.

        Bad input is refused at once; the work begins with the first piece. Pieces never hold (a part of) a stop string.
        """
        given = as_given({"image": images, "video": videos, "audio": audio, "state": states})
        return self._stream(prompt, given, None, raw=raw, cancel=cancel, return_attention=return_attention, **options)

    def generate_image(
        self, prompt: Prompt, *, raw: bool = False, cancel: CancelLike | None = None, **options: Unpack[ImageKeywords]
    ) -> GeneratedImage:
        """The image that the model writes after a prompt (a text or messages, as for `generate`). Options: see `ImageKeywords`.

        Raises CapabilityError when the model writes text only, and as `generate`.
        """
        self._check_open()
        cancels = self._cancels
        ids = image_prompt(self._parts, prompt, raw)

        def between(count: int) -> None:
            if self._cancels != cancels or (cancel is not None and cancel.is_set()):
                raise GenerationCancelled(f"cancelled after {count} codes of an image, which show nothing yet.")

        with self._turn:
            self._check_open()
            return write_image(self._parts, ids, between, options)

    def chat(self, system: str | None = None, **options: Unpack[SamplingKeywords]) -> Conversation:
        """A conversation with a history. Raises PromptError when the bundle has no chat template."""
        self._check_open()
        self._parts.prompts.require_template()
        return Conversation(self, system, options)

    def decode_actions(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The actions in an answer's tokens, float32 `[actions, dimensions]`, by the bundle's action tokens.

        Raises CapabilityError when the model has none, PromptError when the answer breaks off inside an action.
        """
        rule = self._parts.contract.actions
        if rule is None:
            raise CapabilityError(f"{self.path} has no action tokens: its answers are text.")
        return decode_actions(rule, tokens)

    def cancel(self) -> None:
        """Ends every running generation of this session after its current step. Safe from any thread.

        Those that wait for their turn end without running; a stream that was not begun is not affected.
        """
        self._cancels += 1
        for run in tuple(self._active.copy().values()):
            run.cancel.cancel()

    # --- parts ---

    def embed_image(
        self, images: ImageLike | Sequence[ImageLike], *, instruction: str = ""
    ) -> npt.NDArray[np.generic] | list[npt.NDArray[np.generic]]:
        """What the decoder gets to see of an image: features float32 `[image tokens, hidden]`, or token ids int64 [image tokens].

        A list for a list of images. `instruction`: the text that the features depend on, where they do. Raises ImageError,
        DeviceError.
        """
        self._check_open()
        given = self._parts.prompts.open("image", as_list("image", images))
        media = [self._parts.modalities.instructed(medium, instruction) for medium in given]
        encoded = self._parts.modalities.features(media)
        found = [encoded.features[medium.key].values.copy() for medium in media]
        return found if isinstance(images, (list, tuple)) else found[0]

    def prepare(
        self,
        prompt: Prompt,
        images: Images | None = None,
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
    ) -> PreparedPrompt:
        """Tokens and processor arrays of one prompt; no graph runs. Errors as `generate`."""
        self._check_open()
        given = as_given({"image": images, "video": videos, "audio": audio, "state": states})
        row = self._parts.prompts.row(prompt, given, raw=raw)
        read = row.tokens if row.source is None else row.source
        inputs = [PreparedInput(medium.kind, self._parts.modalities.arrays(medium)) for medium in row.media]
        return PreparedPrompt(read.ids[read.prefix :].tolist(), row.tokens.ids[row.tokens.prefix :].tolist(), inputs)

    def logits_along(
        self,
        prompt: Prompt,
        images: Images | None,
        answer_tokens: Sequence[int],
        *,
        videos: Any = None,
        audio: Any = None,
        states: Any = None,
        raw: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Teacher forcing: float32 `[len(answer_tokens), vocab]`, the logits before each token of an answer, which is

        fed token by token after the prompt, as in generation. Errors as `generate`; ValueError for no tokens.
        """
        self._check_open()
        given = as_given({"image": images, "video": videos, "audio": audio, "state": states})
        return logits_along(self._parts, self._parts.prompts.row(prompt, given, raw=raw), answer_tokens)

    def decode_tokens(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._parts.prompts.tokenizer.decode([int(token) for token in tokens])

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself, without those the tokenizer adds around it."""
        return self._parts.prompts.count(text)

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt (image tokens included) and its answer may have together."""
        return self._parts.plan.context_length

    @property
    def stats(self) -> Stats:
        """Figures of the last call that began."""
        return self._stats

    def memory(self) -> dict[str, int]:
        """Bytes: `weights` (the build's graph files), `kv_per_token`, `kv_capacity` (one row's cache when full),

        `prefix_cache` and `image_cache` (what is kept now; cross-attention memories count as images).
        """
        return {
            **super().memory(),
            "kv_per_token": self._parts.plan.entry_bytes,
            "kv_capacity": self._parts.plan.bytes(1, self._parts.plan.context_length),
            "prefix_cache": self._parts.kept.bytes,
            "image_cache": self._parts.modalities.bytes,
        }

    def clear_caches(self) -> None:
        """Forgets encoded images and kept prefixes: the next call does all its work."""
        with self._turn:
            self._parts.kept.clear()
            self._parts.modalities.clear()

    def close(self) -> None:
        """Cancels what runs, then frees caches and graphs. Closing twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self.cancel()
        self._prefetcher.close()
        with self._turn:
            self._parts.kept.close()
            super().close()

    # --- shared with Conversation and TextStream ---

    def _stream(
        self,
        prompt: Prompt,
        given: Given,
        ended: Callable[[Run], None] | None,
        *,
        raw: bool = False,
        cancel: CancelLike | None = None,
        return_attention: bool = False,
        **options: Any,
    ) -> TextStream:
        began = time.perf_counter()
        self._check_open()
        run = open_run(self._parts, [(prompt, given)], raw, cancel, began, options, return_attention)

        def end(finished: Run) -> None:
            self._end(finished)
            if ended is not None:
                ended(finished)

        return TextStream(run, self._turn, self._begin, end)

    def _open(self, given: Given) -> dict[str, list[Medium]]:
        return {kind: self._parts.prompts.open(kind, sources) for kind, sources in given.items()}

    def _begin(self, run: Run) -> None:
        self._check_open()
        self._stats = run.stats
        self._active[id(run)] = run
        run.begin()

    def _end(self, run: Run) -> None:
        if self._active.pop(id(run), None) is not None:
            self.counters.add(run.stats)
