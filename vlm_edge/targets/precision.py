"""In what precision each graph is built: the words, which graph may have which, and the `--precision` option."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Literal

from vlm_edge_runtime.bundle.manifest import GraphEntry
from vlm_edge_runtime.errors import TargetError

Kind = Literal["encoder", "embedding", "decoder", "head", "codes"]

Words = Mapping[Kind, tuple[str, ...]]
"""What each kind of graph may be stored in."""

CPU_WORDS: Words = {
    "encoder": ("fp32", "int8", "int8w", "int4"),
    "embedding": ("fp32", "fp16", "int8", "int4"),
    "decoder": ("fp32", "int8", "int4"),
    "head": ("fp32", "int8", "int4"),
    "codes": ("fp32",),
}
"""On CPUs. Encoders: `int8` computes in integers (weights and activations), `int8w` and `int4` are weight-only. A decoder's and a

head's `int8` and `int4` are weight-only everywhere. `fp16` is a storage format for the embedding table only: computing in it is
slower than fp32 on CPUs. Graphs that give codes (an image tokenizer) stay fp32: the nearest code of a patch is discrete, and a
small error makes it another one.
"""
CUDA_WORDS: Words = {
    "encoder": ("fp32", "fp16"),
    "embedding": ("fp32", "fp16"),
    "decoder": ("fp32", "fp16", "int8", "int4"),
    "head": ("fp32", "fp16", "int8", "int4"),
    "codes": ("fp32",),
}
"""ONNX Runtime on CUDA: weights alone are quantised (MatMulNBits), and what computes beside them is fp16."""
TENSORRT_WORDS: Words = {
    "encoder": ("fp32", "fp16", "bf16", "int8", "int8w", "int4", "fp8", "fp8w", "nvfp4"),
    "embedding": ("fp32", "fp16", "bf16"),
    "decoder": ("fp32", "fp16", "bf16", "int8", "int8w", "int4", "fp8", "fp8w", "nvfp4"),
    "head": ("fp32", "fp16", "bf16", "int8", "int8w", "int4", "fp8", "fp8w", "nvfp4"),
    "codes": ("fp32",),
}
"""TensorRT: what is not quantised computes in fp16 or bf16, but for islands that stay fp32. `int8` and `fp8` are of weights and

activations, `int8w`, `fp8w`, int4 and nvfp4 of weights alone; a decoder's `fp8` and a head's `fp8` and `int8` are of weights
alone too.
"""
BACKEND_WORDS: dict[str, Words] = {
    "ort-cpu": CPU_WORDS,
    "ort-cuda": CUDA_WORDS,
    "tensorrt": TENSORRT_WORDS,
    "tensorrt-rtx": TENSORRT_WORDS,
}
NEAREST: dict[str, tuple[str, ...]] = {
    "int4": ("int8w", "int8", "fp16", "fp32"),
    "nvfp4": ("fp8w", "fp16", "fp32"),
    "int8": ("fp16", "fp32"),
    "int8w": ("int8", "fp16", "fp32"),
    "fp8": ("fp16", "fp32"),
    "fp8w": ("fp16", "fp32"),
    "bf16": ("fp32",),
    "fp16": ("fp32",),
    "fp32": (),
}
"""What a graph gets that cannot have the one word that was given for all: the nearest wider one, fewest bits first. An embedding

table on a GPU is fp16 beside int8 and int4, an encoder on ONNX Runtime's CUDA provider fp16 beside int4.
"""
_HARDWARE = {"int8w": "int8", "fp8w": "fp8"}
"""What the hardware must have for a word, where it is not called the same."""

ROLES: dict[str, Kind] = {
    "vision_encoder": "encoder",
    "projector": "encoder",
    "text_encoder": "encoder",
    "image_tokenizer": "codes",
    "embed_tokens": "embedding",
    "decoder": "decoder",
    "lm_head": "head",
    "image_head": "head",
}
"""The graphs whose kind their name tells. A role that a family invents is an encoder. `lm_head` is the decoder's last matrix

product, not a graph.
"""
DEFAULTS: dict[Kind, str] = {"encoder": "encoder", "embedding": "embed_tokens", "decoder": "decoder", "head": "lm_head"}
"""The key of a target's precision table that holds for a kind of graph where the table does not name the role itself."""

ALIASES = {"vision": "vision_encoder", "text": "text_encoder", "embed": "embed_tokens", "head": "lm_head"}
_EXAMPLE = "vision=int8,projector=fp32,decoder=int4"


def kind_of(role: str) -> Kind:
    """What a graph is by its name alone."""
    return ROLES.get(role, "encoder")


def bundle_roles(graphs: Mapping[str, GraphEntry]) -> dict[str, Kind]:
    """The roles of a bundle's graphs with their kinds, `lm_head` after its decoder.

    A graph whose outputs are all integers gives codes, whatever its name.
    """
    found: dict[str, Kind] = {}
    for role, entry in graphs.items():
        discrete = bool(entry.outputs) and all("int" in spec.dtype for spec in entry.outputs)
        found[role] = "codes" if discrete else kind_of(role)
        if role == "decoder":
            found["lm_head"] = "head"
    return found


def words_for(backend: str, precisions: Collection[str] | None = None) -> Words:
    """What the graphs of a backend may be built as, on hardware that has `precisions` (None: whatever the backend knows)."""
    known = BACKEND_WORDS[backend]
    if precisions is None:
        return known
    return {kind: tuple(word for word in words if _HARDWARE.get(word, word) in precisions) for kind, words in known.items()}


def check_precision(role: str, word: str, where: str, roles: Mapping[str, Kind], words: Words = CPU_WORDS) -> None:
    """Raises TargetError unless `role` is one of `roles` and may be built as `word`."""
    if role not in roles:
        short = [alias for alias, name in ALIASES.items() if name in roles]
        near = difflib.get_close_matches(role, [*roles, *short], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TargetError(f"{where}: unknown graph '{role}'.{hint} There is: {', '.join(roles)}.")
    _check_word(role, word, where, roles[role], words)


def _check_word(role: str, word: str, where: str, kind: Kind, words: Words) -> None:
    if word in words[kind]:
        return
    why = ""
    if kind == "codes":
        why = " (its output is codes, which an error would change)"
    elif word == "fp16" and "fp16" not in words["decoder"]:
        why = " (computing in fp16 is slower than fp32 on CPUs)"
    elif any(word in known[kind] for known in BACKEND_WORDS.values()):
        why = " on this target"
    raise TargetError(f"{where}: {role} cannot be '{word}'{why}; it can be: {', '.join(words[kind])}.")


def check_table(precision: Mapping[str, str], where: str, words: Words = CPU_WORDS) -> None:
    """A target's precision table. Raises TargetError for a word that a graph cannot have, or a kind without any."""
    for role, word in precision.items():
        _check_word(role, word, where, kind_of(role), words)
    missing = [role for role in DEFAULTS.values() if role not in precision]
    if missing:
        raise TargetError(f"{where} names no precision for: {', '.join(missing)}.")


def parse_precision(
    given: str | Mapping[str, str] | None, roles: Mapping[str, Kind] = ROLES, words: Words = CPU_WORDS
) -> dict[str, str]:
    """`vision=int8,projector=fp32,decoder=int4`, one word for all graphs, or a mapping → {role: word}.

    `roles`: the graphs there are; `words`: what the target can build each as (`Target.words`). One word for all must be one
    that the decoder can have (or the first graph, without a decoder); other graphs that cannot have it get the nearest wider
    one (NEAREST; `replaced` tells which), and those that give codes stay as they are. Raises TargetError for an unknown graph
    or word, one named twice, or a malformed item.
    """
    if given is None:
        return {}
    where = f"precision {given!r}" if isinstance(given, str) else "precision"
    if isinstance(given, Mapping):
        items = list(given.items())
    elif "=" not in given:
        return _for_all(given.strip(), roles, where, words)
    else:
        items = []
        for item in given.split(","):
            role, equals, word = item.partition("=")
            if not equals or not role.strip() or not word.strip():
                raise TargetError(f"{where}: '{item.strip()}' is not GRAPH=PRECISION; write {_EXAMPLE}.")
            items.append((role.strip(), word.strip()))
    found: dict[str, str] = {}
    for name, word in items:
        role = name if name in roles else ALIASES.get(name, name)
        check_precision(role, word, where, roles, words)
        if role in found:
            raise TargetError(f"{where}: {role} is named twice.")
        found[role] = word
    return found


def _for_all(word: str, roles: Mapping[str, Kind], where: str, words: Words) -> dict[str, str]:
    known = sorted({word for some in words.values() for word in some})
    if word not in known:
        raise TargetError(f"{where}: not a precision; write one of {', '.join(known)}, or {_EXAMPLE}.")
    chosen = {role: kind for role, kind in roles.items() if kind != "codes"}
    if not chosen:
        return {}
    leading = next((role for role, kind in chosen.items() if kind == "decoder"), None) or next(iter(chosen))
    check_precision(leading, word, where, roles, words)
    return {role: nearest(word, kind, words) for role, kind in chosen.items()}


def nearest(word: str, kind: Kind, words: Words) -> str:
    """The word, or, where a kind of graph cannot have it, the first of NEAREST's that it can."""
    return next((one for one in (word, *NEAREST[word]) if one in words[kind]), "fp32")


def replaced(given: str | Mapping[str, str] | None, chosen: Mapping[str, str], roles: Mapping[str, Kind]) -> dict[str, str]:
    """Graphs that got another word than the one that was given for all, with what they got. Builds say so."""
    if not isinstance(given, str) or "=" in given:
        return {}
    return {role: chosen[role] for role, kind in roles.items() if kind != "codes" and chosen[role] != given.strip()}


def resolve_precision(
    defaults: Mapping[str, str],
    given: str | Mapping[str, str] | None,
    roles: Mapping[str, Kind] = ROLES,
    words: Words = CPU_WORDS,
) -> dict[str, str]:
    """The precision of every one of `roles`: the target's, overridden by what the user gave.

    A decoder precision given without one for its head takes the head along, except that a 4-bit or fp8 decoder, and one whose
    activations are int8, keeps a finer head: 8-bit on CPUs (as in cpu-int4), fp16 on GPUs.
    """
    chosen = parse_precision(given, roles, words)
    if "decoder" in chosen and "lm_head" not in chosen:
        finer = "fp16" if "fp16" in words["head"] else "int8"
        coarse = {"int4", "nvfp4", "fp8", "fp8w", *(["int8"] if "int8w" in words["decoder"] else [])}
        chosen["lm_head"] = finer if chosen["decoder"] in coarse else chosen["decoder"]
    return {role: chosen.get(role) or _default(defaults, role, kind) for role, kind in roles.items()}


def _default(defaults: Mapping[str, str], role: str, kind: Kind) -> str:
    if kind == "codes":
        return "fp32"
    return defaults.get(role) or defaults[DEFAULTS[kind]]


def stored_as(kind: Kind, word: str, backend: str = "ort-cpu") -> str:
    """A precision word as the manifest names it: a head's `int8` is `int8w` there (and `fp8` `fp8w`): its activations are not

    quantised; no more are a decoder's, except with TensorRT's `int8`.
    """
    if kind == "decoder" and word == "int8" and "int8w" in BACKEND_WORDS[backend]["decoder"]:
        return word
    return f"{word}w" if word in ("int8", "fp8") and kind in ("decoder", "head") else word
