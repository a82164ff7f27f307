"""One ONNX graph → one serialised engine: parsed, checked layer by layer, compiled, in memory of TensorRT's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlm_edge.progress import Progress, Silent
from vlm_edge_runtime.bundle.engine_profile import EngineProfile
from vlm_edge_runtime.errors import TargetError

from . import seam
from .cache import TimingCache
from .network import Layers, check_network, node_label
from .progress import BuildProgress, monitor, run_watched
from .seam import Library

_UNUSED = re.compile(r"unused", re.IGNORECASE)
_HARMLESS = (re.compile(r"^Use of .* deprecated", re.IGNORECASE),)
_MOST_ERRORS = 3


@dataclass(slots=True)
class Engine:
    """A compiled engine before it is written. `data` is a buffer of TensorRT's (its bytes by `memoryview`).

    `layers`: what the network was made of. `warnings`: what TensorRT remarked that does not make the engine wrong.
    """

    data: Any
    layers: Layers
    warnings: list[str] = field(default_factory=list)


class _Log:
    """What TensorRT says, by severity."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def listener(self, library: Library) -> Any:
        """An ILogger of that library which writes in here. TensorRT calls it from threads of its own."""
        log, severity = self, library.module.ILogger

        class Listener(library.module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                library.module.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    log.errors.append(message)
                elif level == severity.WARNING:
                    log.warnings.append(message)

        return Listener()

    def remarks(self) -> list[str]:
        """The warnings worth keeping, each once."""
        return [one for one in dict.fromkeys(self.warnings) if not any(known.search(one) for known in _HARMLESS)]


def compile_engine(
    library: Library,
    path: Path,
    *,
    profiles: Sequence[EngineProfile],
    sm: Sequence[int],
    workspace: int | None = None,
    timings: TimingCache | None = None,
    progress: Progress | None = None,
    step: str = "engine",
) -> Engine:
    """Compiles the graph at `path` (weights beside it) for the compute capabilities `sm`.

    `profiles`: sizes of the inputs. `workspace`: bytes of scratch memory at most. `timings`: kept between builds where the
    library can. `step` names the step of `progress`, which must have been started with total 1. Nothing is written.

    Raises TargetError: an operator that the parser does not take (node, operator, module), a network that is not the graph (an
    input left out, an attention taken apart, a cache that is not updated in place, another type), or a failed compilation.
    KeyboardInterrupt passes when TensorRT has stopped.
    """
    log = _Log()
    listener = log.listener(library)
    graph = ir.load(path)
    builder = library.module.Builder(listener)
    if builder is None or log.errors:
        raise TargetError(f"{library.flavour} {library.version} does not start here: {_said(log)}.")
    network, parser = _parsed(library, builder, listener, graph, path)
    layers = check_network(library, network, graph, path)
    config = builder.create_builder_config()
    seam.set_targets(library, config, sm)
    seam.keep_capturable(library, config)
    seam.keep_float32(library, config)
    seam.set_workspace(library, config, workspace)
    if timings is not None and seam.has_timing_cache(library):
        seam.set_timings(library, config, timings.read())
    _add_profiles(builder, network, config, profiles, path)
    watched = BuildProgress()
    config.progress_monitor = watcher = monitor(library, watched)
    log.errors.clear()
    data = run_watched(lambda: builder.build_serialized_network(network, config), watched, progress or Silent(), step)
    del watcher, parser  # they had to live until here
    if data is None:
        raise TargetError(f"{library.flavour} {library.version} does not compile {path}: {_failure(log, graph)}.")
    if unused := [one for one in log.remarks() if _UNUSED.search(one)]:
        raise TargetError(f"{path}: {unused[0].rstrip('.')}: the engine would ignore an input of the graph.")
    if timings is not None and seam.has_timing_cache(library):
        timings.write(seam.timings(config))
    return Engine(data, layers, log.remarks())


def _parsed(library: Library, builder: Any, listener: Any, graph: ir.Model, path: Path) -> tuple[Any, Any]:
    network = seam.create_network(library, builder)
    parser = library.module.OnnxParser(network, listener)
    if parser.parse_from_file(str(path)):
        return network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [_parser_error(graph, error) for error in errors[:_MOST_ERRORS]]
    raise TargetError(
        f"{library.flavour} {library.version} does not take {path}: {'; '.join(said) or 'it gives no reason'}. Build for another "
        "target, or report this model."
    )


def _parser_error(graph: ir.Model, error: Any) -> str:
    said = " ".join(str(error.desc()).split())
    name = str(error.node_name())
    return f"{node_label(graph, name)}: {said}" if name else said


def _failure(log: _Log, graph: ir.Model) -> str:
    """The first things that TensorRT said, with the nodes that it named."""
    said = _said(log)
    names = [str(node.name) for node in graph.graph if node.name and str(node.name) in said]
    named = ", ".join(node_label(graph, name) for name in names[:_MOST_ERRORS])
    return f"{said} [{named}]" if named else said


def _said(log: _Log) -> str:
    return "; ".join(" ".join(one.split())[:400] for one in log.errors[:_MOST_ERRORS]).rstrip(".") or "it gives no reason"


def _add_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[EngineProfile], path: Path) -> None:
    dynamic = [
        network.get_input(index)
        for index in range(network.num_inputs)
        if any(size < 0 for size in network.get_input(index).shape)
    ]
    for number, wanted in enumerate(profiles if dynamic else ()):
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            if tensor.name not in wanted.shapes:
                raise TargetError(f"{path}: profile {number} ({wanted.use}) has no sizes for the dynamic input '{tensor.name}'.")
            sizes = wanted.shapes[tensor.name]
            profile.set_shape(tensor.name, sizes.min, sizes.opt, sizes.max)
        if config.add_optimization_profile(profile) != number:
            raise TargetError(f"{path}: TensorRT refuses profile {number} ({wanted.use}): {dict(wanted.shapes)}.")
