"""What the last call took, and what all calls took together. Times are in seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Stats:
    """One generation. All rows of a batch are counted together.

    `ttft_s`: from the call to the first token, image preprocessing and encoding included. `tpot_s`: mean time of a decode
    step after the first token. `prefill_tps` counts only tokens that were really computed (`prefill_tokens`), not the
    `reused_tokens` that a kept KV cache already held. An image that did not have to be encoded is a hit, whether its features
    were cached or its tokens lay in a reused prefix. `prefix_cache_hits` counts rows that reused a prefix. Of prompt-lookup
    speculation: `drafted_tokens` were run as drafts, `accepted_tokens` of them are in an answer, and each of those saved a step.
    """

    rows: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    reused_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    ttft_s: float = 0.0
    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    image_cache_hits: int = 0
    image_cache_misses: int = 0
    prefix_cache_hits: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        """Seconds of a decode step; 0 when there was none after the first token."""
        return self.decode_s / (self.steps - 1) if self.steps > 1 else 0.0

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first step, over all rows."""
        return (self.new_tokens - self.rows) / self.decode_s if self.decode_s > 0 and self.steps > 1 else 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Every number, the derived ones too."""
        derived = {"tpot_s": self.tpot_s, "prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps}
        return {**asdict(self), **derived}


@dataclass(slots=True)
class Counters:
    """Sums over all calls of a session."""

    calls: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    image_cache_hits: int = 0
    image_cache_misses: int = 0
    prefix_cache_hits: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, stats: Stats) -> None:
        """Adds one finished call."""
        self.calls += 1
        for name in (field.name for field in fields(self) if field.name != "calls"):
            setattr(self, name, getattr(self, name) + getattr(stats, name))

    def to_dict(self) -> dict[str, int | float]:
        """Every number."""
        return asdict(self)
