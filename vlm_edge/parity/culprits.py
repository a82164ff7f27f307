"""`bisect_bundle`: for everything that a report calls FAIL, the first place where the numbers go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_edge_runtime.bundle.reader import PORTABLE, Bundle, open_bundle, read_manifest

from .bisect import Culprit, first_divergence
from .graphs import PortableReference, is_lowered, lower_row, single_step
from .report import BuildReport, ParityReport
from .subject import GraphCase
from .tolerance import tolerance

if TYPE_CHECKING:
    from .reference import TorchReference


def bisect_bundle(
    bundle: str | Path, reference: str | Path | None, report: ParityReport, *, trust_remote_code: bool = False
) -> list[Culprit]:
    """The culprit of each graph that failed.

    A portable graph is compared with the modules of the original (which needs `reference`), a build's graph with its portable
    one. Where preprocessing failed, the options that differ are named. Where a build failed as a whole and no graph of it
    did, all its graphs are searched. Nothing for what passed. Raises ParityError when a graph cannot be searched.
    """
    path = Path(bundle)
    failed = [build for build in report.builds if build.verdict == "FAIL"]
    needs_original = any(build.name == PORTABLE or _preprocessing_failed(build) for build in failed)
    original: TorchReference | None = None
    if reference is not None and needs_original:
        from .merged_tokens import merged_counts
        from .reference import TorchReference

        merged = merged_counts(read_manifest(path))
        original = TorchReference(str(reference), trust_remote_code=trust_remote_code, merged=merged)
    try:
        found: list[Culprit] = []
        for build in failed:
            opened = open_bundle(path, build=build.name)
            if original is not None and _preprocessing_failed(build):
                found += _preprocessing(opened, original, build)
            for role in _suspects(build, opened):
                culprit = _portable(opened, role, original) if opened.build is None else _built(opened, role)
                if culprit is not None:
                    found.append(culprit)
        return found
    finally:
        if original is not None:
            original.close()


def _preprocessing_failed(build: BuildReport) -> bool:
    return build.preprocessing is not None and build.preprocessing.verdict == "FAIL"


def _suspects(build: BuildReport, bundle: Bundle) -> list[str]:
    """The graphs that failed; all, where the whole model failed and neither a graph nor preprocessing explains it."""
    failed = [graph.role for graph in build.graphs if graph.verdict == "FAIL"]
    if failed or _preprocessing_failed(build):
        return failed
    return list(bundle.build.graphs if bundle.build is not None else bundle.graphs)


def _portable(bundle: Bundle, role: str, original: TorchReference | None) -> Culprit | None:
    if original is None:
        return None
    from .modules import first_wrong_module

    return first_wrong_module(original, role, bundle.graph_path(role), tolerance("fp32").bisect)


def _built(bundle: Bundle, role: str) -> Culprit | None:
    """A build's graph against its portable one, on a step of one token where it is a lowered decoder (the shapes agree)."""
    portable = open_bundle(bundle.path)
    entry = bundle.graphs[role]
    if entry.format == "plan":
        return None  # no nodes to look into: a build with ONNX Runtime's kernels tells whether the weights are to blame
    cases = list(PortableReference(portable).graph_cases(role))
    case: GraphCase = single_step(cases) if is_lowered(entry) else cases[0]
    lowered: dict[str, Any] | None = lower_row(case, 0, entry) if is_lowered(entry) else None
    return first_divergence(
        portable.graph_path(role),
        bundle.graph_path(role),
        case.feeds,
        tolerance(entry.precision).bisect,
        suspect_feeds=lowered,
        build=bundle.build_name,
        graph=role,
    )


def _image_options(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    """The image processor's options as the runtime reads them: the entry of processor_config.json goes first."""
    if bundle.has_file("processor_config.json"):
        nested = bundle.read_json("processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return "processor_config.json", nested
    return "preprocessor_config.json", bundle.read_json("preprocessor_config.json")


def _preprocessing(bundle: Bundle, original: TorchReference, build: BuildReport) -> list[Culprit]:
    """The options that the runtime goes by and that are not those of the checkpoint, with the file they stand in."""
    assert build.preprocessing is not None  # its verdict chose this
    file, ours = _image_options(bundle)
    theirs = original.checkpoint.image_processor
    # An option that is not saved has its default on both sides; the type's suffix names an implementation (Fast, Pil).
    differ = sorted(key for key in ours if key in theirs and key != "image_processor_type" and ours[key] != theirs[key])
    said = "; ".join(f"{key} is {ours[key]} instead of {theirs[key]}" for key in differ)
    reason = f"Found: {said}." if said else build.preprocessing.note
    return [
        Culprit(
            build=build.name,
            graph="preprocessing",
            node=file,
            op=str(ours.get("image_processor_type", "image processor")),
            module="",
            output="pixel_values",
            before=type(build.preprocessing.distance)(),
            after=build.preprocessing.distance,
            tolerance=build.preprocessing.tolerance,
            reason=reason,
        )
    ]
