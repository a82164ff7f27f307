"""A bundle's portable graphs put together with numpy, as plainly as can be: what the runtime must also come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import open_bundle


class Portable:
    """Runs the graphs of a projector bundle. `cache` holds key and value of every layer, `[batch, kv_heads, past, head_dim]`."""

    def __init__(self, path: Path) -> None:
        self.bundle = open_bundle(path)
        self.contract = self.bundle.manifest.contract
        assert isinstance(self.contract, GenerativeContract)
        self._sessions: dict[str, ort.InferenceSession] = {}
        self.cache: list[np.ndarray] = []

    def run(self, role: str, **feed: np.ndarray) -> list[np.ndarray]:
        if role not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            path = str(self.bundle.graph_path(role))
            self._sessions[role] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = self._sessions[role]
        taken = {value.name for value in session.get_inputs()}
        return session.run(None, {name: value for name, value in feed.items() if name in taken})

    def features(self, **images: np.ndarray) -> np.ndarray:
        """Vision encoder and projector, flattened to `[tokens, hidden]`."""
        (hidden,) = self.run("vision_encoder", **images)
        (features,) = self.run("projector", image_hidden_states=hidden)
        return features.reshape(-1, features.shape[-1])

    def embed(self, input_ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """Token embeddings; the features take the place of image tokens, in order over the batch."""
        (embeddings,) = self.run("embed_tokens", input_ids=input_ids)
        if features is not None:
            embeddings[input_ids == self.contract.modalities[0].token_id] = features
        return embeddings

    def step(self, embeddings: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One decoder step over what is cached already; returns logits and keeps the presents."""
        kv = self.contract.kv
        if not self.cache:
            empty = np.zeros((embeddings.shape[0], kv.kv_heads, 0, kv.head_dim), np.float32)
            self.cache = [empty] * (2 * kv.layers)
        names = [f"{layer}.{part}" for layer in range(kv.layers) for part in ("key", "value")]
        past = {f"past_key_values.{name}": tensor for name, tensor in zip(names, self.cache, strict=True)}
        logits, *self.cache = self.run("decoder", inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, **past)
        return logits
