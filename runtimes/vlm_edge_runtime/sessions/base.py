"""What every session has: the opened bundle, its engine, memory figures, and an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlm_edge_runtime.bundle.manifest import Build, Manifest
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.errors import CapabilityError, DeviceError
from vlm_edge_runtime.preprocess import load_image_processor
from vlm_edge_runtime.preprocess.base import ImageProcessor

from .registry import METHODS, methods


class Session:
    """A loaded bundle. Use it as a context manager, or call `close()`.

    Methods that the bundle's family does not have raise CapabilityError, which names those it has.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._bundle = bundle
        self._engine = engine
        self._closed = False

    def _image_processor(self, overrides: Mapping[str, Any] | None) -> ImageProcessor:
        """The bundle's own image processor, with the caller's options over the saved ones."""
        processor_config = (
            self._bundle.read_json("processor_config.json") if self._bundle.has_file("processor_config.json") else None
        )
        saved = self._bundle.read_json("preprocessor_config.json") if self._bundle.has_file("preprocessor_config.json") else {}
        return load_image_processor(saved, processor_config, overrides)

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self._bundle.path

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._bundle.manifest

    @property
    def build(self) -> Build | None:
        """The build that runs; None for the portable graphs."""
        return self._bundle.build

    @property
    def build_name(self) -> str:
        """The build's name, or `portable`."""
        return self._bundle.build_name

    def memory(self) -> dict[str, int]:
        """Bytes, by what takes them. `weights`: the graph files of this build, each file once."""
        refs = [ref for graph in self._bundle.graphs.values() for ref in (graph.model, *graph.data)]
        return {"weights": sum({ref.file: ref.bytes for ref in refs}.values())}

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        """Seconds of each graph's calls so far, by role."""
        return self._engine.graph_times()

    def clear_caches(self) -> None:
        """Forgets encoded images and kept prefixes: the next call does all its work."""

    def close(self) -> None:
        """Frees the engine's sessions. Further calls raise DeviceError; closing twice does no harm."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path} build={self.build_name}{' closed' if self._closed else ''}>"

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"{self.path} is closed: load it again.")


def missing_method(session: Session, name: str) -> AttributeError:
    """The error for an attribute that a session does not have."""
    if not any(name in known for known in METHODS.values()):
        return AttributeError(f"{type(session).__name__!r} object has no attribute {name!r}")
    manifest = session.manifest
    return CapabilityError(
        f"{session.path} ({manifest.model_type}, family {manifest.family}) has no {name}(); it has: "
        f"{', '.join(f'{method}()' for method in methods(manifest))}."
    )
