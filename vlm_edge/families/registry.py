"""Which family a model type belongs to, as data: `registry.toml` beside this file.

No torch here: `vlm-edge families` runs on a device too.
"""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vlm_edge_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from .base import Family

FILES: list[Path] = [Path(__file__).with_name("registry.toml")]
"""Read in order, later lines win. A program may append a file of its own."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the registry: a model type, its family, what the family needs to know about it, and the file it is from.

    `architecture`: the line counts for checkpoints of this class only (one model type may have several). `auto_class`: the
    transformers class that loads it, where it is not the family's usual one. `zoo`: the module of `vlm_edge.zoo` that defines it.
    """

    model_type: str
    family: str
    architecture: str = ""
    auto_class: str = ""
    zoo: str = ""
    options: dict[str, Any] = {}
    file: str = ""


def entries() -> list[Entry]:
    """Every known model type, sorted by family and name. Raises UnsupportedModelError when a registry file is damaged."""
    found: dict[tuple[str, str], Entry] = {}
    for file in FILES:
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise UnsupportedModelError(f"The registry {file} cannot be read: {error}") from None
        for family, lines in tables.items():
            for key, line in lines.items():
                model_type, _, architecture = key.partition(":")
                own = {name: str(line[name]) for name in ("auto_class", "zoo") if name in line}
                options = {name: value for name, value in line.items() if name not in own}
                found[model_type, architecture] = Entry(
                    model_type=model_type, architecture=architecture, family=family, options=options, file=file.name, **own
                )
    return sorted(found.values(), key=lambda entry: (entry.family, entry.model_type, entry.architecture))


def lookup(model_type: str, architectures: Sequence[str] = ()) -> Entry:
    """The line of a model type; one for its class (`architectures` of config.json) goes before one for all.

    Raises UnsupportedModelError listing the nearest known types and how to add one. Imports the zoo module of a zoo model, so
    that transformers knows its classes.
    """
    lines = {(entry.model_type, entry.architecture): entry for entry in entries()}
    for architecture in (*architectures, ""):
        if (found := lines.get((model_type, architecture))) is not None:
            if found.zoo:
                importlib.import_module(f"vlm_edge.zoo.{found.zoo}")
            return found
    if classes := [architecture for known, architecture in lines if known == model_type]:
        raise UnsupportedModelError(
            f"Model type '{model_type}' is known as {', '.join(classes)}; this checkpoint is of class "
            f"{', '.join(architectures) or 'unknown (config.json has no architectures)'}."
        )
    known = sorted({name for name, _ in lines})
    near = difflib.get_close_matches(model_type, known, n=4, cutoff=0.5)
    listed = ", ".join(near) if near else ", ".join(known)
    raise UnsupportedModelError(
        f"Model type '{model_type}' is not known; {'nearest' if near else 'known'}: {listed}. If it is built like one of these, "
        f"add a line for it to {FILES[0]}; `vlm-edge families` lists all."
    )


def families() -> list[str]:
    """The names of all families: each is a module of this package, and the head of a table of the registry."""
    return sorted({entry.family for entry in entries()})


def load(name: str) -> Family:
    """The family of a name (imports torch and transformers). Raises UnsupportedModelError for an unknown one."""
    if name not in families():
        raise UnsupportedModelError(f"There is no family '{name}'; there are: {', '.join(families())}.")
    family: Family = importlib.import_module(f".{name}", __package__).FAMILY
    return family
