"""Checks of option values: each error names the option, its value and the valid range."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from vlm_edge_runtime.errors import OptionError

MAX_SEED = 2**64 - 1


def any_seed() -> int:
    """63 random bits of the system's, as `secrets.randbits` gives them; importing that takes 2 ms of a cold start."""
    return int.from_bytes(os.urandom(8)) >> 1


def number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number in [low, high], or (low, high]."""
    bracket = "(" if open_low or low == -math.inf else "["
    lowest = "-∞" if low == -math.inf else f"{low:g}"
    valid = f"{bracket}{lowest}, {'∞)' if high == math.inf else f'{high:g}]'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OptionError(f"{name}={value!r} is not a finite number; it must lie in {valid}.")
    if value < low or value > high or (open_low and value == low):
        raise OptionError(f"{name}={value!r} is out of range; it must lie in {valid}.")
    return float(value)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer of `low` or more, at most `high`."""
    valid = f"{low} or more" if high is None else f"{low} … {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise OptionError(f"{name}={value!r} must be an integer, {valid}.")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be True or False.")
    return value


def tokens(name: str, value: Any, vocab_size: int, *, drop: bool = False) -> tuple[int, ...]:
    """A token id or a list of them; those outside the vocabulary are refused, or dropped."""
    listed = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    if drop:
        listed = [one for one in listed if not isinstance(one, int) or 0 <= one < vocab_size]
    return tuple(integer(name, one, 0, vocab_size - 1) for one in listed)


def seeds(value: Any, rows: int) -> tuple[int, ...]:
    """One seed, or one for each row."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != rows:
            raise OptionError(f"seed has {len(value)} values for {rows} prompts: give one number, or one for each prompt.")
        return tuple(integer("seed", one, 0, MAX_SEED) for one in value)
    return (integer("seed", value, 0, MAX_SEED),)


def stops(value: Any) -> tuple[str, ...]:
    """One stop string, or several."""
    listed = (value,) if isinstance(value, str) else tuple(value)
    for text in listed:
        if not isinstance(text, str) or not text:
            raise OptionError(f"stop={value!r}: every stop string must be a text of at least one character.")
    return listed
