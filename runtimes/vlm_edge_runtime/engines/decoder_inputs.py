"""What a decoder graph reads besides embeddings, mask, positions and cache, told apart by its signature alone.

Three kinds: `state.{i}` is recurrent (the output `present_state.{i}` follows it), an input with a dimension named "sequence" has
a value per token, any other is static for a row. Arrays are kept without the dimensions that the engine puts around them: statics
and states without the batch, per-token values without batch and sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .base import Array

PAST = "past_key_values."
STATE = "state."
_OWN = ("inputs_embeds", "attention_mask", "position_ids")

Arrays = Mapping[str, Array]
Sizes = dict[str, int]
"""Sizes of named dynamic dimensions of one row's inputs ("source", "media" …)."""


class DecoderInputs:
    """The further inputs of a decoder graph: `static`, `recurrent` and `tokens`, each name → spec.

    Raises DeviceError for an input that is none of these.
    """

    def __init__(self, graph: str, inputs: Sequence[TensorSpec]) -> None:
        self.static: dict[str, TensorSpec] = {}
        self.recurrent: dict[str, TensorSpec] = {}
        self.tokens: dict[str, TensorSpec] = {}
        for spec in inputs:
            if spec.name in _OWN or spec.name.startswith(PAST):
                continue
            kind = self._kind(spec)
            if kind is None:
                raise DeviceError(
                    f"graph '{graph}' has an input '{spec.name}' {_shape(spec.shape)}: expected is [batch, sequence, …] (a value "
                    "per token), [batch, …] or [1, …] (static), or, named state.N, [batch, …] of fixed sizes (recurrent)"
                )
            kind[spec.name] = spec
        self.bound = self.static | self.recurrent
        everything = [*self.static.values(), *self.tokens.values()]
        masked = {name for spec in everything if "mask" in spec.name for name in _named(spec)}
        static = {name for spec in self.static.values() for name in _named(spec)}
        self._alike = (static - masked) | {name for key, spec in self.static.items() if self.shared(key) for name in _named(spec)}

    def _kind(self, spec: TensorSpec) -> dict[str, TensorSpec] | None:
        shape = spec.shape
        if "sequence" in shape:
            batched = len(shape) >= 2 and isinstance(shape[0], str) and shape[1] == "sequence" and shape.count("sequence") == 1
            return self.tokens if batched else None
        if spec.name.startswith(STATE):
            fixed = len(shape) >= 1 and isinstance(shape[0], str) and all(isinstance(size, int) for size in shape[1:])
            return self.recurrent if fixed else None
        return self.static if shape and (isinstance(shape[0], str) or shape[0] == 1) else None

    def shared(self, name: str) -> bool:
        """Whether all rows read one array: a static input whose first dimension is a fixed 1."""
        return self.static[name].shape[0] == 1

    def check_bound(self, given: Arrays) -> tuple[dict[str, Array], Sizes]:
        """One row's static inputs and initial states, and the sizes they fix. Raises ValueError or TypeError."""
        if unknown := given.keys() - self.bound.keys():
            raise ValueError(f"the decoder has no input {_names(unknown)} to bind; it takes {_names(self.bound) or 'none'}")
        if missing := self.bound.keys() - given.keys():
            raise ValueError(f"the decoder's input {_names(missing)} is missing: all of a row's inputs are bound at once")
        sizes: Sizes = {}
        arrays = {name: _checked(spec, given[name], spec.shape[1:], sizes) for name, spec in self.bound.items()}
        return arrays, sizes

    def check_tokens(self, given: Arrays | None, tokens: int | None, sizes: Sizes) -> tuple[dict[str, Array], Sizes]:
        """Values for `tokens` tokens `[tokens, …]` (None: for each token to come, `[…]`), zeros where none are given.

        `sizes` are the row's so far; returned with those that the values add. Raises ValueError or TypeError.
        """
        given = given or {}
        if unknown := given.keys() - self.tokens.keys():
            raise ValueError(f"the decoder has no per-token input {_names(unknown)}; it takes {_names(self.tokens) or 'none'}")
        sizes = dict(sizes)
        front = () if tokens is None else (tokens,)
        arrays = {name: _checked(self.tokens[name], array, (*front, *self._rest(name)), sizes) for name, array in given.items()}
        for name, spec in self.tokens.items():
            if name not in arrays:
                shape = self._known(name, sizes) if tokens is not None else self._later(name, sizes)
                arrays[name] = np.zeros((*front, *shape), dtype=spec.dtype)
        return arrays, sizes

    def _rest(self, name: str) -> tuple[int | str, ...]:
        return self.tokens[name].shape[2:]

    def _known(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        rest = self._rest(name)
        if unknown := [size for size in rest if isinstance(size, str) and size not in sizes]:
            raise ValueError(
                f"the decoder's per-token input '{name}' {_shape(self.tokens[name].shape)} must be given: nothing else says how "
                f"large '{unknown[0]}' is"
            )
        return tuple(sizes[size] if isinstance(size, str) else size for size in rest)

    def _later(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Zeros that `stack` fills up: dimensions of unknown size are empty so far."""
        return tuple(sizes.get(size, 0) if isinstance(size, str) else size for size in self._rest(name))

    def clash(self, one: tuple[Arrays, Sizes], other: tuple[Arrays, Sizes]) -> str | None:
        """Why two rows cannot run together with what they are bound to, or None."""
        for name in sorted(self._alike):
            if one[1][name] != other[1][name]:
                return (
                    f"size {one[1][name]} in '{name}', another row has {other[1][name]}: they cannot run together, since the "
                    "decoder has no mask input that would hide the filling of the shorter one"
                )
        for name in self.static:
            if self.shared(name) and not np.array_equal(one[0][name], other[0][name]):
                return f"other values of '{name}' than another row, which is one array for all rows"
        return None

    def stack(self, name: str, arrays: Sequence[Array], sizes: Sizes, front: int = 0) -> Array:
        """Rows' arrays as one `[batch, …]`, filled with zeros behind to `sizes`; the first `front` dimensions stay as they are.

        Rows that share one array are not copied.
        """
        spec = self.tokens.get(name) or self.bound[name]
        names = spec.shape[2 if name in self.tokens else 1 :]
        found = np.array([array.shape[front:] for array in arrays]).max(axis=0)
        target = [
            max(size, sizes.get(named, 0)) if isinstance(named, str) else size for size, named in zip(found, names, strict=True)
        ]
        padded = [_pad(array, (*array.shape[:front], *target)) for array in arrays]
        first = padded[0]
        if name in self.static and self.shared(name):
            return first[None]
        if len(arrays) == 1 or all(array is arrays[0] for array in arrays):
            return np.broadcast_to(first, (len(arrays), *first.shape))
        return np.stack(padded)

    @staticmethod
    def longest(rows: Sequence[Sizes]) -> Sizes:
        """The largest size of each dimension over the rows."""
        largest: Sizes = {}
        for sizes in rows:
            for name, size in sizes.items():
                largest[name] = max(size, largest.get(name, 0))
        return largest


def newest(spec: TensorSpec, array: Array, at: int, sizes: Sizes) -> Array:
    """Row `at` of a graph's output at its newest token, without the filling of dimensions whose size for the row is known.

    The cache is filled in front, everything else behind.
    """
    keep: list[int | slice] = []
    for axis, name in enumerate(spec.shape):
        if axis == 0:
            keep.append(at)
        elif name == "sequence":
            keep.append(-1)
        elif name == "total":
            keep.append(slice(array.shape[axis] - sizes["total"], None))
        elif isinstance(name, str) and name in sizes:
            keep.append(slice(sizes[name]))
        else:
            keep.append(slice(None))
    return array[tuple(keep)].copy()


def _checked(spec: TensorSpec, given: Array, expected: Sequence[int | str], sizes: Sizes) -> Array:
    """The array, if it has the spec's type and shape. Dynamic dimensions must agree with `sizes`, or are added to it."""
    array = np.asarray(given)
    if array.dtype != np.dtype(spec.dtype):
        raise TypeError(f"{spec.name} is {array.dtype}, expected {spec.dtype}")
    if array.ndim != len(expected):
        raise ValueError(f"{spec.name} has {array.ndim} dimensions, expected {len(expected)}: {_shape(expected)}")
    for axis, (size, name) in enumerate(zip(array.shape, expected, strict=True)):
        if isinstance(name, str) and name:
            name = sizes.setdefault(name, size)
        if isinstance(name, int) and size != name:
            raise ValueError(f"{spec.name} has size {size} in dimension {axis} ({expected[axis]}), expected {name}")
    return array


def _pad(array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape == shape:
        return array
    padded = np.zeros(shape, dtype=array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def _named(spec: TensorSpec) -> set[str]:
    return {size for size in spec.shape[1:] if isinstance(size, str) and size != "sequence"}


def _names(names: object) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))  # type: ignore[call-overload]


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
