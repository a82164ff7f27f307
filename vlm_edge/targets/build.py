"""Builds a bundle for a target: every portable graph through its passes, checked, written to `builds/NAME`."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import onnx_ir as ir

from vlm_edge.progress import Progress, Silent
from vlm_edge.quantize.blockwise import BLOCK_SIZES
from vlm_edge_runtime.bundle.manifest import Build, FileRef, GenerativeContract, GraphEntry, KVLayout, TensorSpec
from vlm_edge_runtime.bundle.reader import PORTABLE, Bundle, open_bundle
from vlm_edge_runtime.bundle.writer import BuildWriter, now
from vlm_edge_runtime.errors import BundleError, TargetError

from .pipeline import (
    Inputs,
    Lowered,
    lower_decoder,
    lower_embedding,
    lower_encoder,
    lower_growing_decoder,
    lower_recurrent_decoder,
)
from .precision import Kind, bundle_roles, kind_of, resolve_precision, stored_as
from .samples import Feeds, Samples, modality_feeds
from .selfcheck import FP32_TOLERANCE, Difference, check_decoder, check_encoder
from .steps import is_shared
from .target import Target, load_target

_REPORT = "report.json"


def build(
    bundle: str | Path,
    target: str | Path | Target,
    *,
    precision: str | dict[str, str] | None = None,
    block_size: int = 32,
    calibration: Sequence[str | Path] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Build:
    """Lowers the portable graphs of `bundle` for `target` and adds the result to the bundle.

    `precision` overrides the target's (see `parse_precision`); `block_size` is the number of weights per scale of
    weight-only graphs; `calibration` are pictures for static int8 activation ranges (none: dynamic ranges). Every built
    graph is run against its portable one: fp32 graphs must agree to 1e-4, for others the distance is recorded in the
    build's options. Graphs that no pass changes are not copied; the runtime takes them from `portable/`.

    Raises TargetError (unknown target or precision, a graph that the target cannot run), BundleError (damage, the name is
    taken, no space left). Nothing is left behind on any error.
    """
    progress = progress or Silent()
    chosen = target if isinstance(target, Target) else load_target(target)
    label = _checked_name(name or chosen.name)
    if block_size not in BLOCK_SIZES:
        raise TargetError(f"block size {block_size} is not possible; it can be: {', '.join(map(str, BLOCK_SIZES))}.")
    opened = open_bundle(bundle)
    kinds = bundle_roles(opened.graphs)
    words = resolve_precision(chosen.precision, precision, kinds, chosen.words)
    samples = Samples(opened)
    pictures = list(calibration or [])
    graphs: dict[str, GraphEntry] = {}
    options: dict[str, str | int | float | bool] = {
        "block_size": block_size,
        "calibration_images": len(pictures),
        **{key: value for key, value in msgspec.to_builtins(chosen.options).items() if value is not None},
    }
    report: dict[str, object] = {}
    try:
        with BuildWriter(opened.path, label, overwrite=overwrite) as writer:
            for role in opened.graphs:
                step = f"lower {role} ({words[role]})"
                progress.start(step)
                try:
                    lowered = _lower(opened, role, kinds[role], words, chosen, block_size, pictures)
                    detail = "unchanged"
                    if lowered.changed:
                        graphs[role] = _save(lowered.model, writer, role, stored_as(kinds[role], words[role]))
                        difference = _check(opened, role, words, writer.path / f"{role}.onnx", samples)
                        options |= {
                            f"{role}.max_abs": difference.max_abs,
                            f"{role}.relative": difference.relative,
                            f"{role}.cosine": difference.cosine,
                        }
                        detail = f"{graphs[role].nodes} nodes, cosine {difference.cosine:.5f} to portable"
                        if kinds[role] == "decoder" and opened.kv is not None and opened.kv.layers:
                            kept = is_shared([spec.name for spec in graphs[role].inputs])
                            options[f"{role}.kv_cache"] = "shared" if kept else "growing"
                            detail += "" if kept else "; its cache grows (see report.json)"
                    report[role] = _report(lowered)
                except BaseException as error:
                    progress.failed(step, str(error))
                    raise
                progress.done(step, detail)
            (writer.path / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            made = Build(
                name=label,
                target=chosen.name,
                backend=chosen.backend,
                precision=words,
                graphs=graphs,
                options=options,
                kv=_kv(opened, graphs.get("decoder")),
                created=now(),
                versions=_versions(),
            )
            writer.commit(made)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BundleError(f"no space left while building {label} in {opened.path}: free some; nothing was kept.") from error
        raise
    return made


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == PORTABLE:
        raise TargetError(f"'{name}' cannot be a build's name: letters, digits, '.', '_', '-' (and not '{PORTABLE}').")
    return name


def _lower(
    bundle: Bundle, role: str, kind: Kind, words: dict[str, str], target: Target, block_size: int, pictures: Sequence[str | Path]
) -> Lowered:
    model = ir.load(bundle.graph_path(role))
    contract = bundle.manifest.contract
    if kind == "decoder":
        if not isinstance(contract, GenerativeContract):
            raise TargetError(f"{bundle.path}: a decoder in family {bundle.manifest.family} is not known to {target.name}.")
        weights = {"precision": words["decoder"], "head": words["lm_head"]}
        if not contract.kv.layers:
            return lower_recurrent_decoder(model, **weights, block_size=block_size, options=target.options)
        try:
            return lower_decoder(
                model, **weights, context_length=contract.context_length, block_size=block_size, options=target.options
            )
        except TargetError as error:  # what the fused kernel cannot do; nothing of the half-rewritten graph is kept
            model = ir.load(bundle.graph_path(role))
            return lower_growing_decoder(model, why=str(error), **weights, block_size=block_size, options=target.options)
    if kind == "embedding":
        return lower_embedding(model, precision=words[role], block_size=block_size)  # type: ignore[arg-type]
    return lower_encoder(
        model,
        precision=stored_as(kind, words[role]),
        block_size=block_size,
        options=target.options,
        calibration=_calibration(bundle, role, pictures),
    )


def _calibration(bundle: Bundle, role: str, pictures: Sequence[str | Path]) -> Inputs | None:
    """Inputs of a graph that images pass through; None where pictures say nothing (or there are none)."""
    contract = bundle.manifest.contract
    modalities = contract.modalities if isinstance(contract, GenerativeContract) else []
    through = [graph for one in modalities if one.kind == "image" for graph in one.graphs] if modalities else ["vision_encoder"]
    if not pictures or role not in through:
        return None

    def inputs() -> Iterator[Feeds]:
        yield from modality_feeds(bundle, role, pictures)

    return inputs


def _save(model: ir.Model, writer: BuildWriter, role: str, precision: str) -> GraphEntry:
    """Writes the graph with its weights beside it; weights are computed one after another as they are written."""
    file, data = f"{role}.onnx", f"{role}.onnx.data"
    model.producer_name, model.producer_version = "vlm-edge", _version("vlm-edge")
    ir.save(model, writer.path / file, external_data=data)
    refs: list[FileRef] = [writer.ref(data)] if (writer.path / data).is_file() else []
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return GraphEntry(
        role=role,
        model=writer.ref(file),
        data=refs,
        inputs=[_spec(value) for value in model.graph.inputs],
        outputs=[_spec(value) for value in model.graph.outputs],
        precision=precision,
        nodes=sum(1 for _ in model.graph),
        parameters=sum(tensor.size for tensor in tensors if tensor.dtype.is_floating_point() or tensor.size > 64),
    )


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise TargetError(f"{value.name} has no type or shape after lowering.")
    shape = tuple(size if isinstance(size, int) else str(size.value or f"dim{axis}") for axis, size in enumerate(value.shape))
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)


def _check(bundle: Bundle, role: str, words: dict[str, str], path: Path, samples: Samples) -> Difference:
    decoder = kind_of(role) == "decoder"
    difference = check_decoder(bundle, path, samples) if decoder else check_encoder(bundle, role, path, samples)
    exact = words[role] == "fp32" and (role != "decoder" or words["lm_head"] == "fp32")
    if exact and not difference.relative <= FP32_TOLERANCE:
        raise TargetError(
            f"lowering changed what {role} computes: relative difference {difference.relative:.2e} to the portable graph, "
            f"{FP32_TOLERANCE:.0e} is allowed in fp32. Please report this model; build it for another target meanwhile."
        )
    if difference.max_abs == float("inf"):
        raise TargetError(f"the built {role} ({words[role]}) gives NaN or infinity; choose another precision for it.")
    return difference


def _kv(bundle: Bundle, decoder: GraphEntry | None) -> KVLayout | None:
    """The cache as the built decoder keeps it: in a shared buffer where the graph was lowered to one, else growing.

    A decoder without layers that cache has nothing that could grow.
    """
    layout = bundle.kv
    if layout is None:
        return None
    shared = decoder is not None and (not layout.layers or is_shared([spec.name for spec in decoder.inputs]))
    return msgspec.structs.replace(layout, shared_buffer=shared)


def _report(lowered: Lowered) -> dict[str, object]:
    passes = [{"pass": change.name, "changes": dict(change.counts), "notes": change.notes} for change in lowered.changes]
    return {"passes": [one for one in passes if one["changes"] or one["notes"]]}


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("vlm-edge", "onnx-ir", "onnx", "onnxruntime", "numpy")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source"
