"""In what precision each graph is built: the words, which graph may have which, and the `--precision` option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

from vlm_edge_runtime.bundle.manifest import GraphEntry
from vlm_edge_runtime.errors import TargetError

Kind = Literal["encoder", "embedding", "decoder", "head", "codes"]

WORDS: dict[Kind, tuple[str, ...]] = {
    "encoder": ("fp32", "int8", "int8w", "int4"),
    "embedding": ("fp32", "fp16", "int8", "int4"),
    "decoder": ("fp32", "int8", "int4"),
    "head": ("fp32", "int8", "int4"),
    "codes": ("fp32",),
}
"""What each kind of graph may be stored in. Encoders: `int8` computes in integers (weights and activations), `int8w` and `int4`

are weight-only. A decoder's and a head's `int8` and `int4` are weight-only. `fp16` is a storage format for the embedding table
only: computing in it is slower than fp32 on CPUs. Graphs that give codes (an image tokenizer) stay fp32: the nearest code of a
patch is discrete, and a small error makes it another one.
"""

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


def check_precision(role: str, word: str, where: str, roles: Mapping[str, Kind]) -> None:
    """Raises TargetError unless `role` is one of `roles` and may be built as `word`."""
    if role not in roles:
        short = [alias for alias, name in ALIASES.items() if name in roles]
        near = difflib.get_close_matches(role, [*roles, *short], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TargetError(f"{where}: unknown graph '{role}'.{hint} There is: {', '.join(roles)}.")
    _check_word(role, word, where, roles[role])


def _check_word(role: str, word: str, where: str, kind: Kind) -> None:
    if word in WORDS[kind]:
        return
    why = " (computing in fp16 is slower than fp32 on CPUs)" if word == "fp16" else ""
    why = " (its output is codes, which an error would change)" if kind == "codes" else why
    raise TargetError(f"{where}: {role} cannot be '{word}'{why}; it can be: {', '.join(WORDS[kind])}.")


def check_table(precision: Mapping[str, str], where: str) -> None:
    """A target's precision table. Raises TargetError for a word that a graph cannot have, or a kind without any."""
    for role, word in precision.items():
        _check_word(role, word, where, kind_of(role))
    missing = [role for role in DEFAULTS.values() if role not in precision]
    if missing:
        raise TargetError(f"{where} names no precision for: {', '.join(missing)}.")


def parse_precision(given: str | Mapping[str, str] | None, roles: Mapping[str, Kind] = ROLES) -> dict[str, str]:
    """`vision=int8,projector=fp32,decoder=int4`, one word for all graphs, or a mapping → {role: word}.

    `roles`: the graphs there are. One word for all leaves graphs that give codes as they are. Raises TargetError for an unknown
    graph or word, one named twice, or a malformed item.
    """
    if given is None:
        return {}
    where = f"precision {given!r}" if isinstance(given, str) else "precision"
    if isinstance(given, Mapping):
        items = list(given.items())
    elif "=" not in given:
        return _for_all(given.strip(), roles, where)
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
        check_precision(role, word, where, roles)
        if role in found:
            raise TargetError(f"{where}: {role} is named twice.")
        found[role] = word
    return found


def _for_all(word: str, roles: Mapping[str, Kind], where: str) -> dict[str, str]:
    known = sorted({word for words in WORDS.values() for word in words})
    if word not in known:
        raise TargetError(f"{where}: not a precision; write one of {', '.join(known)}, or {_EXAMPLE}.")
    chosen = [role for role, kind in roles.items() if kind != "codes"]
    for role in chosen:
        check_precision(role, word, where, roles)
    return dict.fromkeys(chosen, word)


def resolve_precision(
    defaults: Mapping[str, str], given: str | Mapping[str, str] | None, roles: Mapping[str, Kind] = ROLES
) -> dict[str, str]:
    """The precision of every one of `roles`: the target's, overridden by what the user gave.

    A decoder precision given without one for its head takes the head along, except that a 4-bit decoder keeps an 8-bit
    head (as in cpu-int4).
    """
    chosen = parse_precision(given, roles)
    if "decoder" in chosen and "lm_head" not in chosen:
        chosen["lm_head"] = "int8" if chosen["decoder"] == "int4" else chosen["decoder"]
    return {role: chosen.get(role) or _default(defaults, role, kind) for role, kind in roles.items()}


def _default(defaults: Mapping[str, str], role: str, kind: Kind) -> str:
    if kind == "codes":
        return "fp32"
    return defaults.get(role) or defaults[DEFAULTS[kind]]


def stored_as(kind: Kind, word: str) -> str:
    """A precision word as the manifest names it: a decoder's `int8` is `int8w` there, for its activations stay fp32."""
    return "int8w" if word == "int8" and kind in ("decoder", "head") else word
