"""A bundle's contract as rows of a table, in the contract's own words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from vlm_edge_runtime.bundle.manifest import Contract, GenerativeContract, Memory, Modality, PromptFormat, TokenInput

_ROWS = {"image": "one row each", "tile": "a row per tile or frame", "patches": "one row of patches"}
_JOINS = {
    "tokens": "features take the places of its tokens",
    "memory": "features are what cross-attention reads",
    "codes": "gives the ids of its tokens",
}


def contract_rows(contract: Contract) -> Iterator[tuple[str, str]]:
    """(title, text) of each part. What has its default is left out."""
    if not isinstance(contract, GenerativeContract):
        yield from ((key, _said(value)) for key, value in _fields(contract) if key != "family")
        return
    for one in contract.modalities:
        yield one.kind, _modality(one)
    if contract.memory is not None:
        yield "cross-attention", _memory(contract.memory)
    for token in contract.token_inputs:
        yield "input per token", _token_input(token)
    if (prompt := _prompt(contract.prompt)) != "":
        yield "prompt", prompt
    own = {"family", "modalities", "memory", "token_inputs", "prompt"}
    yield from ((key.replace("_", " "), _said(value)) for key, value in _fields(contract) if key not in own and value is not None)


def _modality(one: Modality) -> str:
    said = [" → ".join(one.graphs), _ROWS[one.batch], _JOINS[one.joins]]
    if one.placeholder is not None:
        said.append(f"placeholder {_said(one.placeholder)}")
    if one.token_id is not None:
        said.append(f"token {one.token_id}")
    own = {"kind", "graphs", "batch", "joins", "token_id", "placeholder"}
    return "; ".join(said + [f"{key.replace('_', ' ')} {_said(value)}" for key, value in _set(one) if key not in own])


def _memory(memory: Memory) -> str:
    reads = "the prompt as graph encoder reads it" if memory.source == "encoder" else "features"
    masks = {"none": "all of it", "source": "as far as each row has some", "tokens": "what each token may see"}
    own = {"source", "mask", "hidden_size"}
    said = [f"{reads}, {memory.hidden_size} wide, {masks[memory.mask]}"]
    return "; ".join(said + [f"{key.replace('_', ' ')} {_said(value)}" for key, value in _set(memory) if key not in own])


def _token_input(one: TokenInput) -> str:
    about = {
        "blocks": f"tokens of one block see each other in both directions ({one.blocks})",
        "features": "features of further layers",
        "media": f"which images it sees ({one.rule})",
    }
    after = "zeros" if one.decode == "zero" else "what the prompt's last token had"
    return f"{one.name}: {about[one.kind]}; a generated token has {after}"


def _prompt(prompt: PromptFormat) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_said(value)}" for key, value in _set(prompt))


def _fields(struct: msgspec.Struct) -> Iterator[tuple[str, Any]]:
    yield from ((field.name, getattr(struct, field.name)) for field in msgspec.structs.fields(struct))


def _set(struct: msgspec.Struct) -> Iterator[tuple[str, Any]]:
    """Fields that are not at their default."""
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if value != default:
            yield field.name, value


def _said(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        parts = ", ".join(f"{key}={_said(one)}" for key, one in _set(value))
        return f"{tag} ({parts})" if tag and parts else str(tag or parts)
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} → {_said(one)}" for key, one in value.items())
    if isinstance(value, str) and (not value or not value.isprintable() or value != value.strip()):
        return repr(value)
    return str(value)
