"""Builds a bundle for a target: every portable graph through its passes, checked, written to `builds/NAME`."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir

from vlm_edge.progress import Progress, Silent
from vlm_edge.quantize.blockwise import BLOCK_SIZES
from vlm_edge_runtime.bundle.manifest import Build, FileRef, GraphEntry, TensorSpec
from vlm_edge_runtime.bundle.reader import PORTABLE, open_bundle
from vlm_edge_runtime.bundle.writer import BuildWriter, now
from vlm_edge_runtime.errors import BundleError, TargetError

from .backend import Backend, CompileOptions, Job, Option, backend_of, checked, settle_one_word
from .examine import Examination
from .native.build import save_plan
from .native.head import greedy_bytes, read_as
from .pipeline import Lowered
from .precision import bundle_roles, resolve_precision, stored_as
from .samples import Samples
from .target import Target, load_target

_REPORT = "report.json"


def build(
    bundle: str | Path,
    target: str | Path | Target,
    *,
    precision: str | dict[str, str] | None = None,
    block_size: int | None = None,
    calibration: Sequence[str | Path] | None = None,
    compiling: CompileOptions | None = None,
    kv: Literal["float", "int8"] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Build:
    """Lowers the portable graphs of `bundle` for `target` and adds the result to the bundle.

    `precision` overrides the target's (see `parse_precision`: of one word for all, each graph gets the nearest that it can
    have; what is not that word is said to `progress` and kept in the build's options as `ROLE.asked`); `block_size` is the
    number of weights per scale of weight-only graphs (None: what the backend takes by itself); `calibration` are pictures for
    static int8 activation ranges (none: dynamic ranges on CPUs; a decoder on TensorRT answers prompts about drawn pictures);
    `compiling`: what is compiled, for targets with compiled engines; `kv`: in what a native decoder on the CPU keeps keys and
    values (None: what the target says). A graph that native kernels can run becomes a plan at once (targets/native) and is not
    lowered; its ranges are measured while it runs, and pictures tell it how large channels are and, where a norm has a shift,
    their means. Every built graph is run against its portable one: fp32 graphs must agree to 1e-4, for others the distance is
    recorded in the build's options. Graphs that no pass changes are not copied; the runtime takes them from `portable/`.

    A build with engines that is there already is gone on with: what is missing or stale is compiled, nothing is lowered again.
    Raises TargetError (unknown target or precision, a graph that the target cannot run), BundleError (damage, the name is
    taken, no space left). Of the graphs nothing is left behind on any error; engines that were finished stay.
    """
    chosen = target if isinstance(target, Target) else load_target(target)
    if kv is not None:
        chosen = msgspec.structs.replace(chosen, options=msgspec.structs.replace(chosen.options, kv=kv))
    if chosen.options.kv != "float" and chosen.backend != "ort-cpu":
        raise TargetError(
            f"{chosen.name}: an int8 KV cache is one of native decoders on the CPU; build it without --kv "
            '(kv = "float" in the target file).'
        )
    label = _checked_name(name or chosen.name)
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise TargetError(f"block size {block_size} is not possible; it can be: {', '.join(map(str, BLOCK_SIZES))}.")
    opened = open_bundle(bundle)
    kinds = bundle_roles(opened.graphs)
    backend = backend_of(chosen)
    job = Job(
        bundle=opened,
        target=chosen,
        label=label,
        kinds=kinds,
        words=resolve_precision(chosen.precision, precision, kinds, chosen.words),
        block_size=block_size or backend.block_size,
        pictures=list(calibration or []),
        samples=Samples(opened),
        compiling=compiling or CompileOptions(),
        progress=progress or Silent(),
    )
    settle_one_word(job, precision)
    there = opened.manifest.builds.get(label)
    given = {"precision": precision, "block_size": block_size, "calibration": calibration}
    try:
        if there is not None and not overwrite and backend.resume(job, there, {k: v for k, v in given.items() if v is not None}):
            made = there
        else:
            backend.check(job)
            made = _lowered(job, backend, overwrite)
        return backend.compile(job, made)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BundleError(f"no space left while building {label} in {opened.path}: free some; nothing was kept.") from error
        raise


def _lowered(job: Job, backend: Backend, overwrite: bool) -> Build:
    """All graphs through their passes, compared, written, and in their place."""
    graphs: dict[str, GraphEntry] = {}
    options: dict[str, Option] = {
        "block_size": job.block_size,
        "calibration_images": len(job.pictures),
        **{key: value for key, value in msgspec.to_builtins(job.target.options).items() if value is not None},
        **job.options,
    }
    report: dict[str, object] = {}
    examination = Examination(job) if job.target.device is not None else None
    with BuildWriter(job.bundle.path, job.label, overwrite=overwrite) as writer:
        for role in job.bundle.graphs:
            step = f"lower {role} ({job.words[role]})"
            job.progress.start(step)
            try:
                detail, shared = "unchanged", None
                for name, lowered in backend.lower(job, role).items():
                    if examination is not None:
                        examination.add(role, name, lowered.model)
                    if lowered.changed:
                        stored = stored_as(job.kinds[role], job.words[role], job.target.backend)
                        if lowered.plan is not None:
                            graphs[name] = save_plan(lowered.plan, writer, role, stored, _parameters(lowered.model))
                        else:
                            graphs[name] = _save(lowered.model, writer, role, name, stored, shared)
                            shared = shared or writer.path / f"{name}.onnx"
                        said, detail = _compared(job, backend, role, name, graphs[name], writer)
                        options |= said
                    report[name] = _report(lowered)
                    if lowered.kernels:
                        options[f"{name}.kernels"] = lowered.kernels
                    if lowered.plan is not None and (head := read_as(lowered.plan)):
                        options |= {f"{name}.head": head, f"{name}.token_bytes": greedy_bytes(lowered.plan)}
                    if lowered.kernels.partition(": ")[2]:
                        detail = f"{detail}; {lowered.kernels}"
            except BaseException as error:
                job.progress.failed(step, str(error))
                raise
            job.progress.done(step, detail)
        if examination is not None:
            report["memory"] = _examined(job, examination)
        (writer.path / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        made = Build(
            name=job.label,
            target=job.target.name,
            backend=job.target.backend,
            precision=job.words,
            graphs=graphs,
            options=options,
            kv=backend.kv(job, graphs),
            created=now(),
            versions=_versions(),
        )
        backend.finish(job, writer, made)
        writer.commit(made)
    return made


def _examined(job: Job, examination: Examination) -> object:
    """Refuses what the target cannot build or hold, before anything is compiled; the memory plan for the report."""
    step = "plan the memory"
    job.progress.start(step)
    try:
        examination.refuse()
    except TargetError as error:
        job.progress.failed(step, str(error))
        raise
    job.progress.done(step, examination.summary())
    return msgspec.to_builtins(examination.plan())


def _compared(
    job: Job, backend: Backend, role: str, name: str, entry: GraphEntry, writer: BuildWriter
) -> tuple[dict[str, Option], str]:
    """The distance of a written graph to its portable one, as the build's options and as its progress line say it."""
    built = writer.path / Path(entry.model.file).name
    difference = checked(backend.compare(job, role, built), job, role, exact=backend.is_exact(job, role))
    options: dict[str, Option] = {
        f"{name}.max_abs": difference.max_abs,
        f"{name}.relative": difference.relative,
        f"{name}.cosine": difference.cosine,
    }
    more, remark = backend.describe(job, role, entry)
    count = f"{entry.nodes} {'steps' if entry.format == 'plan' else 'nodes'}"
    detail = f"{count}, cosine {difference.cosine:.5f} to portable"
    return options | more, f"{detail}; {remark}" if remark else detail


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == PORTABLE:
        raise TargetError(f"'{name}' cannot be a build's name: letters, digits, '.', '_', '-' (and not '{PORTABLE}').")
    return name


def _save(model: ir.Model, writer: BuildWriter, role: str, name: str, precision: str, like: Path | None) -> GraphEntry:
    """Writes the graph with its weights beside it; weights are computed one after another as they are written.

    `like`: a graph of the same role that was written before; the weights it has already are not written again.
    """
    file, data = f"{name}.onnx", f"{role}.onnx.data"
    model.producer_name, model.producer_version = "vlm-edge", _version("vlm-edge")
    if like is None:
        ir.save(model, writer.path / file, external_data=data)
    else:
        _share_weights(model, ir.load(like))
        ir.save(model, writer.path / file)
    refs: list[FileRef] = [writer.ref(data)] if (writer.path / data).is_file() else []
    return GraphEntry(
        role=role,
        model=writer.ref(file),
        data=refs,
        inputs=[_spec(value) for value in model.graph.inputs],
        outputs=[_spec(value) for value in model.graph.outputs],
        precision=precision,
        nodes=sum(1 for _ in model.graph),
        parameters=_parameters(model),
    )


def _parameters(model: ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(tensor.size for tensor in tensors if tensor.dtype.is_floating_point() or tensor.size > 64)


def _share_weights(model: ir.Model, written: ir.Model) -> None:
    """Lets `model` read the weights of a written graph: those of one name, type and shape lie beside that."""
    there = written.graph.initializers
    for name, value in model.graph.initializers.items():
        own, other = value.const_value, there[name].const_value if name in there else None
        if own is None or not isinstance(other, ir.ExternalTensor):
            continue
        if own.dtype == other.dtype and own.shape.numpy() == other.shape.numpy():
            value.const_value = other


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise TargetError(f"{value.name} has no type or shape after lowering.")
    shape = tuple(size if isinstance(size, int) else str(size.value or f"dim{axis}") for axis, size in enumerate(value.shape))
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)


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
