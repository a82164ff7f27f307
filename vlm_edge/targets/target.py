"""Targets are data: a TOML file says what a device is built for; this file reads and checks it."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import msgspec

from vlm_edge_runtime.errors import TargetError

from .precision import check_table

_SUFFIX = ".toml"


class Options(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How graphs are quantised for a target; the meaning of each stands in export_configs/targets/cpu.toml."""

    accuracy_level: Literal[1, 4] = 4
    scheme: Literal["mse", "absmax"] = "mse"
    symmetric: bool = True
    weight_bits: Literal[7, 8] = 7
    keep_first: int = 0
    keep_last: int = 0
    calibration: Literal["minmax", "percentile", "mse"] = "mse"


class Target(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One target: which engine runs the build, and in what precision each graph is made unless asked otherwise."""

    name: str
    backend: Literal["ort-cpu"]
    description: str
    precision: dict[str, str]
    options: Options = Options()
    architectures: list[str] = []


def targets() -> list[Target]:
    """The targets that ship with vlm-edge, by name."""
    return [load_target(name) for name in sorted(_shipped()) if not _table(name).get("abstract")]


def load_target(name_or_path: str | Path) -> Target:
    """A shipped target by name, or one of your own by the path of its TOML file (which may `extends` a shipped one).

    Raises TargetError: unknown name (with the nearest and all known ones), unreadable file, unknown key or value.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(_SUFFIX) or "/" in text:
        path = Path(name_or_path)
        if not path.is_file():
            raise TargetError(f"no target file {path}; give the path of a TOML file or one of: {', '.join(_names())}.")
        return _decode(_merged(_parse(path.read_bytes(), str(path)), str(path)), str(path))
    if text not in _shipped() or _table(text).get("abstract"):
        near = difflib.get_close_matches(text, _names(), n=1, cutoff=0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TargetError(f"unknown target '{text}'.{hint} Known: {', '.join(_names())}; or the path of a TOML file of your own.")
    return _decode(_merged(_table(text), f"{text}{_SUFFIX}"), f"{text}{_SUFFIX}")


def _folder() -> Traversable:
    """`export_configs/targets`: inside the package when installed, beside it in a source tree."""
    try:
        return resources.files("vlm_edge.export_configs.targets")
    except ModuleNotFoundError:
        return Path(__file__).resolve().parents[2] / "export_configs" / "targets"


def _shipped() -> list[str]:
    return [entry.name.removesuffix(_SUFFIX) for entry in _folder().iterdir() if entry.name.endswith(_SUFFIX)]


def _names() -> list[str]:
    return sorted(name for name in _shipped() if not _table(name).get("abstract"))


def _table(name: str) -> dict[str, Any]:
    return _parse((_folder() / f"{name}{_SUFFIX}").read_bytes(), f"{name}{_SUFFIX}")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{where} is not valid TOML: {error}.") from None


def _merged(table: dict[str, Any], where: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The table over the one it extends; tables inside are merged key by key."""
    base_name = table.get("extends")
    own = {key: value for key, value in table.items() if key not in ("extends", "abstract")}
    if base_name is None:
        return own
    if base_name in seen or base_name not in _shipped():
        what = "extends itself" if base_name in seen else f"extends '{base_name}', which is not a shipped target"
        raise TargetError(f"{where} {what}; known: {', '.join(sorted(_shipped()))}.")
    merged = _merged(_table(base_name), f"{base_name}{_SUFFIX}", (*seen, base_name))
    for key, value in own.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _decode(table: dict[str, Any], where: str) -> Target:
    try:
        target = msgspec.convert(table, type=Target)
    except msgspec.ValidationError as error:
        raise TargetError(f"{where} is not a valid target: {error}.") from None
    check_table(target.precision, where)
    return target
