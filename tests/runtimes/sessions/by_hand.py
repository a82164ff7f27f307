"""A toy bundle's graphs called one by one, as a reference for what a session makes of them."""

from __future__ import annotations

import numpy as np
from flow_bundles import write

from vlm_edge_runtime import load
from vlm_edge_runtime.engines.base import SamplingParams

SHORT = {"max_new_tokens": 6, "ignore_eos": True}
WORDS = "a b c what is it a b c what is it"
IDS = [8, 9, 10, 11, 12, 13, 8, 9, 10, 11, 12, 13]


def opened(path, toy, graphs, made, files=None):
    return load(write(path / "toy.vlm", toy, graphs, made, files), build="portable")


class ByHand:
    """The bundle's graphs, called one by one."""

    def __init__(self, vlm) -> None:
        self.engine = vlm._engine
        self.decoder = self.engine.decoder()
        self._processor = vlm._parts.modalities._stores["image"].processor if "image" in vlm._parts.modalities.kinds else None

    def graph(self, role: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        return self.engine.graph(role).run(feeds)

    def pixels(self, picture) -> np.ndarray:
        return self._processor(picture).arrays["pixel_values"]

    def features(self, picture, role: str = "vision_encoder", name: str = "image_features") -> np.ndarray:
        return self.graph(role, pixel_values=self.pixels(picture))[name][0]

    def embeds(self, ids, **filled: tuple[list[int], np.ndarray]) -> np.ndarray:
        found = self.decoder.embed(np.array(ids)).copy()
        for at, rows in filled.values():
            found[at] = rows
        return found

    def tokens(self, embeds, ids, *, bind=None, token_inputs=None, following=None, positions=None, count: int = 6) -> list[int]:
        """Greedy tokens after a prompt that is run in one piece."""
        state = self.decoder.allocate(1, len(embeds) + count)
        if bind is not None:
            state.bind(0, bind)
        positions = np.arange(len(embeds)) if positions is None else positions
        state.prefill(0, embeds, positions, token_inputs)
        state.start(0, SamplingParams(), np.array(ids), int(positions[-1]) + 1, following)
        found = state.decode(count)[0].tokens
        while len(found) < count:
            found += state.decode(count - len(found))[0].tokens
        state.close()
        return found
