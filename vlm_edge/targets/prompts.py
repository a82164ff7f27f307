"""What a decoder is given when it answers: prompts about pictures with the model's own answers, for calibration. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime.bundle.manifest import GenerativeContract, TensorSpec
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines import Decoder, Engine, Graph, open_engine
from vlm_edge_runtime.engines.portable import PortableDecoder
from vlm_edge_runtime.errors import TargetError, VlmEdgeError

from .samples import PAST, Feeds
from .steps import split_inputs

PROMPTS = (
    "Describe the picture.",
    "What is in this image?",
    "How many objects are there, and what are their colours?",
    "Is there a person? Answer yes or no.",
    "What is on the left?",
    "Describe the image in detail, from the foreground to the background.",
    "What could happen next?",
    "Read any text in the image.",
)
_LEAST, _MOST = 16, 64
"""Prompts that are run: as many as there are pictures, within these."""
_NEW_TOKENS = 16
_SIDE = 256


def decoder_feeds(bundle: Bundle, pictures: Sequence[str | Path]) -> list[Feeds]:
    """Prefills of the portable decoder, [1, S] each without a past: prompts about the pictures, and the greedy answers to them.

    `bundle`: opened on its portable graphs. Without `pictures`, drawn ones: random patterns. Raises TargetError for a bundle
    whose session cannot be run on a prompt and a picture alone.
    """
    from vlm_edge_runtime.sessions.vision_language_model import VisionLanguageModel

    contract = bundle.manifest.contract
    if not isinstance(contract, GenerativeContract):
        raise TargetError(f"{bundle.path}: family {bundle.manifest.family} has no decoder to calibrate.")
    shown: Sequence[Any] = list(pictures) or drawn_pictures()
    count = min(max(len(shown), _LEAST), _MOST)
    engine, found = _Watching(bundle), list[Feeds]()
    takes_images = contract.modality("image") is not None
    try:
        with VisionLanguageModel(bundle, engine, prefix_cache=False) as session:
            for number in range(count):
                turn, which = divmod(number, len(shown))
                prompt = PROMPTS[(which + turn) % len(PROMPTS)]  # another one for the same picture
                engine.seen.clear()
                images = [shown[which]] if takes_images else None
                session.generate(prompt, images=images, temperature=0.0, max_new_tokens=_NEW_TOKENS, ignore_eos=True)
                found.append(_joined(engine.seen, bundle.graphs["decoder"].inputs))
    except VlmEdgeError as error:
        said = " ".join(str(error).split())[:300]
        raise TargetError(
            f"{bundle.path}: the decoder's activations cannot be calibrated, for no answer could be had ({said}): choose int8w "
            "or fp16 for it."
        ) from error
    return found


def drawn_pictures(count: int = 8) -> list[Image.Image]:
    """Pictures of random blocks of colour under random gradients; the same ones every time."""
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        side = int(random.choice([2, 4, 8, 32]))
        blocks = random.integers(0, 256, (side, side, 3)).repeat(_SIDE // side, 0).repeat(_SIDE // side, 1)
        slope = np.linspace(0.3, 1.0, _SIDE)[:, None, None]
        found.append(Image.fromarray((blocks * (slope if seed % 2 else slope.transpose(1, 0, 2))).astype(np.uint8)))
    return found


class _Watched:
    """A graph that remembers what it was given."""

    def __init__(self, graph: Graph, seen: list[Feeds]) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self._graph, self._seen = graph, seen

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        past = bool(self._seen)
        kept = {name: array for name, array in feeds.items() if not past or not name.startswith(PAST)}
        self._seen.append({name: np.array(array) for name, array in kept.items()})
        return self._graph.run(feeds)

    def close(self) -> None:
        self._graph.close()


class _Watching:
    """The engine of portable graphs on the CPU, whose decoder is watched."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle) -> None:
        self._engine: Engine = open_engine(bundle, "cpu")
        self.seen: list[Feeds] = []

    def graph(self, role: str) -> Graph:
        return self._engine.graph(role)

    def decoder(self) -> Decoder:
        return PortableDecoder(_Watched(self._engine.graph("decoder"), self.seen), self._engine.graph("embed_tokens"))

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        return {}

    def close(self) -> None:
        self._engine.close()


def _joined(seen: Sequence[Feeds], specs: Sequence[TensorSpec]) -> Feeds:
    """A prefill and the steps after it as one prefill of all their tokens."""
    by_token, _ = split_inputs(specs)
    found = dict(seen[0])
    for name in found:
        if name == "attention_mask":
            found[name] = seen[-1][name]
        elif name == "position_ids":
            found[name] = np.concatenate([feeds[name] for feeds in seen], axis=-1)
        elif name == "inputs_embeds" or name in by_token:
            found[name] = np.concatenate([feeds[name] for feeds in seen], axis=1)
    return found
