"""Where the tokenizer's files come from: a bundle, or any checkpoint's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from vlm_edge_runtime.errors import BundleError


class SideFiles(Protocol):
    """What an open `Bundle` offers."""

    def has_file(self, name: str) -> bool: ...
    def read_text(self, name: str) -> str: ...
    def read_bytes(self, name: str) -> bytes: ...
    def read_json(self, name: str) -> dict[str, Any]: ...


Source: TypeAlias = "SideFiles | str | os.PathLike[str]"


class Folder:
    """The files of a folder. Raises BundleError for one that is missing, unreadable, or not what its name says."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def has_file(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read_text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise BundleError(f"{self.path} has no {name}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{self.path / name} cannot be read: {error}") from error

    def read_bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise BundleError(f"{self.path} has no {name}") from error
        except OSError as error:
            raise BundleError(f"{self.path / name} cannot be read: {error}") from error

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.read_text(name))
        except ValueError as error:
            raise BundleError(f"{self.path / name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise BundleError(f"{self.path / name} holds a {type(content).__name__}; expected an object")
        return content


def side_files(source: Source) -> SideFiles:
    """The source itself, or the folder that it names."""
    return Folder(source) if isinstance(source, (str, os.PathLike)) else source


def optional_json(files: SideFiles, name: str) -> dict[str, Any] | None:
    """A JSON file that a checkpoint may lack."""
    return files.read_json(name) if files.has_file(name) else None
