"""`export`: a checkpoint becomes a bundle of portable graphs, each compared with PyTorch before anything is kept."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel

from vlm_edge.families.base import GraphPlan
from vlm_edge.families.token_merging import merging
from vlm_edge.progress import Progress, Silent
from vlm_edge_runtime.bundle.manifest import Check, GraphEntry, Manifest, ParityRecord
from vlm_edge_runtime.bundle.writer import BundleWriter, now
from vlm_edge_runtime.errors import BundleError, ExportError

from .check import check as check_graph
from .checkpoint import Checkpoint, evaluating, identify, load
from .interrupt import interruptible
from .trace import quiet, trace
from .weights import WeightFile

PORTABLE = "portable"
_VERSIONED = ("vlm-edge", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


def export(
    source: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    check: bool = True,
    progress: Progress | None = None,
    processor: Any = None,
    merge_visual_tokens: str | None = None,
) -> Manifest:
    """Splits a checkpoint into its graphs, traces each to ONNX (opset 23), checks each against PyTorch, writes the bundle `out`.

    `source`: a local folder, a hub id, or a model object; `processor` (a processor, or a folder with one) goes with a model
    object. `revision`: branch, tag or commit of a hub id. `trust_remote_code` runs Python that comes with the checkpoint.
    `check=False` writes graphs that nobody compared, and the manifest says so by having no parity record.
    `merge_visual_tokens`: a share of each image's tokens to merge away (`50%`) or a number to keep (`64`), see
    families/token_merging.py; the answers are then no longer the checkpoint's own.

    Raises UnsupportedModelError before anything is loaded when the model type is unknown or its configuration cannot be
    carried, ExportError when the checkpoint is missing or damaged, a graph cannot be traced or differs from PyTorch, or the
    disk is full, and BundleError when `out` exists. Whatever is raised, KeyboardInterrupt included, nothing is left behind and a
    model object is as it was.
    """
    steps = progress or Silent()
    if Path(out).exists() and not overwrite:
        raise BundleError(f"{out} exists already; choose another name or pass overwrite=True (--overwrite) to replace it.")
    with _step(steps, "load") as said:
        config, entry, family = identify(source, revision, trust_remote_code)
        checkpoint = load(
            source,
            entry.auto_class or family.auto_class,
            config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            processor=processor,
        )
        said.text = f"{checkpoint.source.architecture}, family {entry.family}"
    model = checkpoint.model
    try:
        with evaluating(model), BundleWriter(out, overwrite=overwrite) as writer:
            with _step(steps, "split") as said, quiet():
                split = merging(family.split(checkpoint, entry), merge_visual_tokens)
                said.text = ", ".join(plan.role for plan in split.graphs)
            folder = writer.path / PORTABLE
            folder.mkdir()
            entries: dict[str, GraphEntry] = {}
            reading: set[str] = set()
            with WeightFile(folder) as weights:
                for plan in split.graphs:
                    with _step(steps, f"trace {plan.role}") as said:
                        graph = trace(plan, model)
                        parameters = _parameters(graph)
                        if weights.save(graph, f"{plan.role}.onnx"):
                            reading.add(plan.role)
                        nodes = sum(1 for _ in graph.graph.all_nodes())
                        said.text = f"{nodes} nodes, {parameters:,} parameters"
                        entries[plan.role] = _entry(writer, plan, nodes, parameters)
                        del graph
            checks = _check_all(split.graphs, model, folder, steps) if check else []
            with _step(steps, "write"):
                files = _write_files(checkpoint, writer)
                data = writer.ref(f"{PORTABLE}/{weights.path.name}")
                if not reading:
                    weights.path.unlink()
                for role in reading:
                    entries[role].data.append(data)
                manifest = Manifest(
                    name=Path(out).name.removesuffix(".vlm"),
                    model_type=entry.model_type,
                    source=checkpoint.source,
                    versions={name: importlib.metadata.version(name) for name in _VERSIONED if _installed(name)},
                    created=now(),
                    contract=split.contract,
                    files=[writer.ref(name) for name in files],
                    graphs=entries,
                    parity=_record(checks),
                )
                writer.commit(manifest)
    except OSError as error:
        raise ExportError(
            f"Writing {out} failed: {error.strerror or error}. Nothing was kept; free space or choose another place."
        ) from error
    return manifest


def _parameters(graph: ir.Model) -> int:
    """Numbers in the graph's weights; whole numbers in it are shapes and axes."""
    tensors = [value.const_value for value in graph.graph.initializers.values()]
    return sum(tensor.size for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point())


def _entry(writer: BundleWriter, plan: GraphPlan, nodes: int, parameters: int) -> GraphEntry:
    return GraphEntry(
        role=plan.role,
        model=writer.ref(f"{PORTABLE}/{plan.role}.onnx"),
        inputs=list(plan.inputs),
        outputs=list(plan.outputs),
        nodes=nodes,
        parameters=parameters,
    )


def _check_all(plans: tuple[GraphPlan, ...], model: PreTrainedModel, folder: Path, steps: Progress) -> list[Check]:
    checks = []
    for plan in plans:
        with _step(steps, f"check {plan.role}") as said:
            checks.append(check_graph(plan, model, folder / f"{plan.role}.onnx"))
            said.text = f"{checks[-1].cases} cases, {checks[-1].metric['scaled']:.1e} of {checks[-1].tolerance['scaled']:.0e}"
    return checks


def _record(checks: list[Check]) -> ParityRecord | None:
    return (
        ParityRecord(verdict="PASS", reference="PyTorch, eager attention, float32", created=now(), checks=checks)
        if checks
        else None
    )


def _write_files(checkpoint: Checkpoint, writer: BundleWriter) -> list[str]:
    """The checkpoint's side files as JSON and Jinja text, as Hugging Face names them. Returns their names."""
    texts: dict[str, str] = {
        "config.json": checkpoint.config.to_json_string(),
        "tokenizer.json": checkpoint.tokenizer.backend_tokenizer.to_str(),
        "tokenizer_config.json": "",
        "special_tokens_map.json": _json(checkpoint.tokenizer.special_tokens_map),
    }
    checkpoint.tokenizer.save_pretrained(writer.path / ".tokenizer")
    texts["tokenizer_config.json"] = (writer.path / ".tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8")
    for file in (writer.path / ".tokenizer").iterdir():
        file.unlink()
    (writer.path / ".tokenizer").rmdir()
    if checkpoint.image_processor:
        texts["preprocessor_config.json"] = _json(checkpoint.image_processor)
    if checkpoint.video_processor:
        texts["video_preprocessor_config.json"] = _json(checkpoint.video_processor)
    texts |= {f"{name}.json": one.backend_tokenizer.to_str() for name, one in checkpoint.extra_tokenizers.items()}
    if checkpoint.generation is not None:
        texts["generation_config.json"] = checkpoint.generation.to_json_string()
    if checkpoint.processor is not None:
        # transformers 5 nests the image processor's options in here too; a bundle has them in one place only.
        kept = {key: value for key, value in checkpoint.processor.items() if key not in ("image_processor", "video_processor")}
        texts["processor_config.json"] = _json(kept)
    if checkpoint.chat_template:
        texts["chat_template.jinja"] = checkpoint.chat_template
    for name, text in texts.items():
        (writer.path / name).write_text(text, encoding="utf-8")
    return sorted(texts)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(slots=True)
class _Said:
    text: str = ""


@contextmanager
def _step(steps: Progress, name: str) -> Iterator[_Said]:
    """Reports a step's start and its end, good or bad; Ctrl-C ends it for certain."""
    said = _Said()
    try:
        with interruptible():
            steps.start(name)
            yield said
    except BaseException as error:
        steps.failed(name, str(error) or type(error).__name__)
        raise
    steps.done(name, said.text)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
