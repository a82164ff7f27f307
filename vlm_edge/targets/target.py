"""Targets are data: a TOML file says what a device is built for; this file reads and checks it."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vlm_edge_runtime.errors import TargetError

from .device import Card, Context, Device, check_device
from .precision import Words, check_table, words_for

_SUFFIX = ".toml"


class Options(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How graphs are quantised for a target, and what runs a decoder; export_configs/targets/cpu.toml says what each means."""

    accuracy_level: Literal[1, 4] = 4
    scheme: Literal["mse", "absmax"] = "mse"
    symmetric: bool = True
    weight_bits: Literal[7, 8] = 7
    keep_first: int = 0
    keep_last: int = 0
    calibration: Literal["minmax", "percentile", "mse"] = "mse"
    smooth: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    kernels: Literal["native", "onnxruntime"] = "onnxruntime"
    kv: Literal["float", "int8"] = "float"
    encoder_kernels: Literal["native", "onnxruntime"] = "onnxruntime"


class Target(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One target: which engine runs the build, and in what precision each graph is made unless asked otherwise.

    `device` and `context` describe a GPU (None for the CPU). `cards` names single products of the family that are targets of
    their own: the family's, with the card's memory.
    """

    name: str
    backend: Literal["ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"]
    description: str
    precision: dict[str, str]
    options: Options = Options()
    architectures: list[str] = []
    device: Device | None = None
    context: Context | None = None
    cards: dict[str, Card] = {}

    @property
    def words(self) -> Words:
        """What each kind of graph may be built as here: what the backend knows and the hardware has."""
        return words_for(self.backend, self.device.precisions if self.device else None)

    def gpu(self) -> tuple[Device, Context]:
        """The device and its context lengths. Raises TargetError for a target of the CPU."""
        if self.device is None or self.context is None:
            raise TargetError(f"{self.name} describes no GPU; choose a target with a device: see `vlm-edge targets`.")
        return self.device, self.context


def targets() -> list[Target]:
    """The targets that ship with vlm-edge, by name; cards of a family are in its `cards`."""
    return [load_target(name) for name in _names()]


def load_target(name_or_path: str | Path) -> Target:
    """A shipped target or card by name, or one of your own by the path of its TOML file (which may `extends` a shipped one).

    Raises TargetError: unknown name (with the nearest and all known ones), unreadable file, unknown key or value.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(_SUFFIX) or "/" in text:
        path = Path(name_or_path)
        if not path.is_file():
            raise TargetError(f"no target file {path}; give the path of a TOML file or one of: {', '.join(_names())}.")
        return _decode(_merged(_parse(path.read_bytes(), str(path)), str(path)), str(path))
    if text in _names():
        return _decode(_merged(_table(text), f"{text}{_SUFFIX}"), f"{text}{_SUFFIX}")
    cards = _cards()
    if text in cards:
        return _of_card(load_target(cards[text]), text)
    near = difflib.get_close_matches(text, [*_names(), *cards], n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise TargetError(f"unknown target '{text}'.{hint} Known: {', '.join(_names())}; or the path of a TOML file of your own.")


def _cards() -> dict[str, str]:
    """Name of each card → the target of its family."""
    return {card: name for name in _names() for card in _table(name).get("cards", {})}


def _of_card(family: Target, name: str) -> Target:
    card = family.cards[name]
    changes = {key: value for key, value in msgspec.structs.asdict(card).items() if value is not None}
    device = msgspec.structs.replace(family.gpu()[0], **changes)
    description = f"{family.description}: {card.memory_gib:g} GiB at {card.bandwidth_gbs:g} GB/s"
    return msgspec.structs.replace(family, name=name, description=description, device=device, cards={})


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
    merged.pop("cards", None)  # they are the base's own
    for key, value in own.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _decode(table: dict[str, Any], where: str) -> Target:
    try:
        target = msgspec.convert(table, type=Target)
    except msgspec.ValidationError as error:
        raise TargetError(f"{where} is not a valid target: {error}.") from None
    if (target.backend == "ort-cpu") != (target.device is None):
        raise TargetError(f"{where}: backend {target.backend} {'has no' if target.device else 'needs a'} [device] table.")
    if target.device is not None:
        target = msgspec.structs.replace(target, context=target.context or Context())
        check_device(*target.gpu(), target.backend, where)
    check_table(target.precision, where, target.words)
    return target
