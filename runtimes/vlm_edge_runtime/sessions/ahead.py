"""What a session does before it is asked: inputs are encoded in the background, while an answer is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vlm_edge_runtime.decode.result import Generation
from vlm_edge_runtime.decode.stats import Stats
from vlm_edge_runtime.errors import DeviceError
from vlm_edge_runtime.preprocess import ImageLike

from .base import Session
from .inputs import as_list
from .media import Medium
from .modalities import Modalities
from .prefetched import Prefetched
from .watch import Watch

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Prefetcher:
    """Encodes what it is given, in turn. Its thread is there from the first input on until `close`."""

    def __init__(self, modalities: Modalities) -> None:
        self._modalities = modalities
        self._executor: ThreadPoolExecutor | None = None
        self._given: list[Prefetched] = []
        self._lock = threading.Lock()
        self._closed = False

    def start(
        self, kind: str, take: Callable[[], Any], instruction: str = "", *, wake: Callable[[], None] = lambda: None
    ) -> Prefetched:
        """Begins to encode the inputs that `take` gives, or waits behind those before. `wake` ends a `take` that waits.

        Raises DeviceError when closed.
        """

        def work(between: Callable[[], None]) -> list[Medium]:
            inputs = as_list(kind, take())
            between()
            return self._modalities.encoded(kind, inputs, instruction, between)

        self._modalities.modality(kind)
        with self._lock:
            if self._closed:
                raise DeviceError("the session is closed: load it again.")
            if self._executor is None:
                from concurrent.futures import ThreadPoolExecutor  # here and not above: it brings logging along

                self._executor = ThreadPoolExecutor(1, "vlm-edge-prefetch")
            given = Prefetched(self._executor, work, wake)
            self._given = [*(one for one in self._given if not one.done), given]
        return given

    def close(self) -> None:
        """Cancels what is not ready, and waits for the graph that runs. Closing twice does no harm."""
        with self._lock:
            self._closed = True
            given, self._given = self._given, []
            executor, self._executor = self._executor, None
        for one in given:
            one.cancel()
        if executor is not None:
            executor.shutdown()


class Ahead(Session):
    """A session that generates, and encodes inputs ahead of that."""

    _prefetcher: Prefetcher
    _stats: Stats
    generate: Any

    def prefetch(self, inputs: Any, *, kind: str = "image", instruction: str = "") -> Prefetched:
        """Opens, preprocesses and encodes inputs in the background while this thread goes on; returns at once.

        `inputs`: what `generate` takes as `images` (`kind` "video", "audio", "state": as `videos` …). For a camera: `ahead =
        vlm.prefetch(frame)`, then the answer about the frame before, then `generate(prompt, images=ahead)`, whose vision pass is
        done; `watch` does just that. `instruction`: the prompt's text, for models whose features depend on it (with another one
        they are encoded again). What is wrong with the inputs is raised where they are used.

        Both parts share the machine's cores: see `encoder_threads` and `spin` of `load`. Raises DeviceError when closed,
        PromptError for a kind that the model does not take.
        """
        self._check_open()
        return self._prefetcher.start(kind, lambda: inputs, instruction)

    def watch(self, frames: Iterable[ImageLike], prompt: Any, *, drop: bool = True, **options: Any) -> Watch:
        """Answers to one prompt about each frame of a camera, as an iterator; the next frame is encoded meanwhile.

        `frames`: any iterable of images, read by a thread of its own. An answer takes longer than a frame: the newest one that
        came while the answer before was begun is next, and those between are dropped and counted (`Watch.dropped`). With `drop`
        off every frame gets its answer. Options: as `generate`. What the source raises is raised here.
        """
        self._check_open()

        def generate(ahead: Prefetched) -> tuple[Generation, Stats]:
            answer: Generation = self.generate(prompt, images=ahead, **options)
            return answer, self._stats

        return Watch(frames, drop, lambda take, wake: self._prefetcher.start("image", take, wake=wake), generate)
