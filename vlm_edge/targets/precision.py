"""In what precision each graph is built: the words, which graph may have which, and the `--precision` option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from vlm_edge_runtime.errors import TargetError

_ENCODER = ("fp32", "int8", "int8w", "int4")
_EXAMPLE = "vision=int8,projector=fp32,decoder=int4"
_DECODER = ("fp32", "int8", "int4")

ROLES: dict[str, tuple[str, ...]] = {
    "vision_encoder": _ENCODER,
    "projector": _ENCODER,
    "text_encoder": _ENCODER,
    "embed_tokens": ("fp32", "fp16", "int8", "int4"),
    "decoder": _DECODER,
    "lm_head": _DECODER,
}
"""What each graph may be stored in. Encoders: `int8` computes in integers (weights and activations), `int8w` and `int4` are

weight-only. The decoder's `int8` and `int4` are weight-only. `lm_head` is the decoder's last matrix product. `fp16` is a
storage format for the embedding table only: computing in it is slower than fp32 on CPUs.
"""

ALIASES = {"vision": "vision_encoder", "text": "text_encoder", "embed": "embed_tokens", "head": "lm_head"}


def check_precision(role: str, word: str, where: str) -> None:
    """Raises TargetError unless `role` is known and may be built as `word`."""
    if role not in ROLES:
        near = difflib.get_close_matches(role, [*ROLES, *ALIASES], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TargetError(f"{where}: unknown graph '{role}'.{hint} Known: {', '.join(ROLES)}.")
    if word not in ROLES[role]:
        why = " (computing in fp16 is slower than fp32 on CPUs)" if word == "fp16" else ""
        raise TargetError(f"{where}: {role} cannot be '{word}'{why}; it can be: {', '.join(ROLES[role])}.")


def parse_precision(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """`vision=int8,projector=fp32,decoder=int4`, one word for all graphs, or a mapping → {role: word}.

    Raises TargetError for an unknown graph or word, one named twice, or a malformed item.
    """
    if given is None:
        return {}
    where = f"precision {given!r}" if isinstance(given, str) else "precision"
    if isinstance(given, Mapping):
        items = list(given.items())
    elif "=" not in given:
        word = given.strip()
        known = sorted({word for words in ROLES.values() for word in words})
        if word not in known:
            raise TargetError(f"{where}: not a precision; write one of {', '.join(known)}, or {_EXAMPLE}.")
        for role in ROLES:
            check_precision(role, word, where)
        return dict.fromkeys(ROLES, word)
    else:
        items = []
        for item in given.split(","):
            role, equals, word = item.partition("=")
            if not equals or not role.strip() or not word.strip():
                raise TargetError(f"{where}: '{item.strip()}' is not GRAPH=PRECISION; write {_EXAMPLE}.")
            items.append((role.strip(), word.strip()))
    found: dict[str, str] = {}
    for name, word in items:
        role = ALIASES.get(name, name)
        check_precision(role, word, where)
        if role in found:
            raise TargetError(f"{where}: {role} is named twice.")
        found[role] = word
    return found


def resolve_precision(defaults: Mapping[str, str], given: str | Mapping[str, str] | None) -> dict[str, str]:
    """The precision of every role: the target's, overridden by what the user gave.

    A decoder precision given without one for its head takes the head along, except that a 4-bit decoder keeps an 8-bit
    head (as in cpu-int4).
    """
    chosen = parse_precision(given)
    if "decoder" in chosen and "lm_head" not in chosen:
        chosen["lm_head"] = "int8" if chosen["decoder"] == "int4" else chosen["decoder"]
    return {**defaults, **chosen}
