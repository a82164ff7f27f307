"""The toy decoder in numpy: the whole sequence at once, without a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from toy_decoder import Toy

Array = npt.NDArray[np.generic]


@dataclass(slots=True)
class Source:
    """What one row of a toy is bound to, and what its tokens have besides embeddings."""

    bound: dict[str, Array] = field(default_factory=dict)
    prompt: dict[str, Array] = field(default_factory=dict)
    """Per prompt token [S, …]."""
    later: dict[str, Array] = field(default_factory=dict)
    """What every generated token has, each […]."""


def random_source(toy: Toy, entries: int, tokens: int, seed: int) -> Source:
    """Inputs for a row whose cross-attention has `entries` source entries and whose prompt has `tokens` tokens."""
    random = np.random.default_rng(seed)
    source = Source()

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    for name in toy.cross_names:
        source.bound[name] = normal(toy.heads, entries, toy.size)
    if toy.cross and toy.source_mask:
        source.bound["encoder_attention_mask"] = _mask(random, entries)
    if toy.recurrent:
        source.bound["state.0"] = normal(toy.hidden)
    if toy.shared:
        source.bound["shift"] = np.linspace(-1, 1, toy.hidden, dtype=np.float32)
    if toy.cross and toy.token_mask:
        source.prompt["cross_attention_mask"] = np.stack([_mask(random, entries) for _ in range(tokens)])
        source.later["cross_attention_mask"] = _mask(random, entries)
    if toy.media:
        source.prompt["image_attention_mask"] = np.stack([_mask(random, entries // toy.media) for _ in range(tokens)])
        source.later["image_attention_mask"] = _mask(random, entries // toy.media)
    if toy.feature:
        source.prompt["deepstack.0"] = normal(tokens, toy.hidden)
        source.later["deepstack.0"] = normal(toy.hidden)
    if toy.blocks:
        source.prompt["block_ids"] = np.repeat(np.arange(tokens), 2)[:tokens].astype(np.int64)
    return source


class Reference:
    """A toy's weights, and what it computes."""

    def __init__(self, toy: Toy) -> None:
        assert not toy.rotary and toy.axes == 1, "the rotary and M-RoPE toys are compared with their portable graph"
        toy.embed_model()
        self._table = toy._weights["embed"]
        toy.portable_model()
        self._weights = dict(toy._weights)
        self._toy = toy

    def run(self, tokens: list[int], source: Source) -> dict[str, Array]:
        """`logits` [vocab] after the last token, its `attentions` [source] and the `state` [hidden]."""
        toy, w = self._toy, self._weights
        count, prompt = len(tokens), len(next(iter(source.prompt.values()), tokens))
        embeds = self._table[tokens].astype(np.float64)
        x = embeds + w["positions0"][:count]
        x = x + source.bound.get("shift", 0)
        if toy.feature:
            x = x + _all(source, "deepstack.0", count, prompt)
        if toy.blocks:
            ids = np.concatenate([source.prompt["block_ids"], np.zeros(count - prompt, np.int64)])
            for block in np.unique(ids[ids > 0]):
                inside = ids == block
                x[inside] += embeds[inside].mean(axis=0)
        state = source.bound.get("state.0")
        if state is not None:
            steps = []
            for row in x:
                state = np.tanh(w["rnn_w"][0] @ row + w["rnn_r"][0] @ state)
                steps.append(state)
            x = x + np.stack(steps)
        found: dict[str, Array] = {} if state is None else {"state": state}
        for layer in range(toy.layers):
            if toy.cached:
                q, k, v = (x @ w[f"{name}{layer}"] for name in "qkv")
                groups = toy.heads // toy.kv_heads
                k, v = (np.repeat(_heads(part, toy.size), groups, axis=0) for part in (k, v))
                causal = np.tril(np.ones((count, count), bool))
                mixed, _ = _attend(_heads(q, toy.size), k, v, causal)
                x = x + mixed @ w[f"o{layer}"]
            if toy.cross:
                k, v = (source.bound[f"cross_key_values.{layer}.{kind}"] for kind in ("key", "value"))
                allowed = np.ones((count, k.shape[1]), bool)
                if toy.source_mask:
                    allowed &= source.bound["encoder_attention_mask"] != 0
                if toy.token_mask:
                    allowed &= _all(source, "cross_attention_mask", count, prompt) != 0
                if toy.media:
                    allowed &= np.repeat(_all(source, "image_attention_mask", count, prompt), toy.media, axis=1) != 0
                mixed, weights = _attend(_heads(x @ w[f"cq{layer}"], toy.size), k, v, allowed)
                x = x + mixed @ w[f"co{layer}"]
                if layer == 0:
                    found["attentions"] = weights.mean(axis=0)[-1]
            x = x + np.tanh(x @ w[f"up{layer}"]) @ w[f"down{layer}"]
        return found | {"logits": x[-1] @ w["head"]}

    def greedy(self, prompt: list[int], source: Source, steps: int) -> list[int]:
        """The greedy continuation."""
        tokens = list(prompt)
        for _ in range(steps):
            tokens.append(int(self.run(tokens, source)["logits"].argmax()))
        return tokens[len(prompt) :]


def _all(source: Source, name: str, count: int, prompt: int) -> Array:
    later: Mapping[str, Array] = source.later
    return np.concatenate([source.prompt[name], np.broadcast_to(later[name], (count - prompt, *later[name].shape))])


def _heads(x: Array, size: int) -> Array:
    return x.reshape(len(x), -1, size).swapaxes(0, 1)


def _attend(q: Array, k: Array, v: Array, allowed: Array) -> tuple[Array, Array]:
    scores = np.where(allowed, q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5, -1e9)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(q.shape[1], -1), weights


def _mask(random: np.random.Generator, entries: int) -> Array:
    """Zeros and ones, the first always one, so that every token sees something."""
    mask = (random.random(entries) < 0.7).astype(np.int64)
    mask[0] = 1
    return mask
