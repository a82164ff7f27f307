"""`compare`: a bundle's graphs and answers against the original's, with a verdict that is stored."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_edge.progress import Progress, Silent
from vlm_edge_runtime.bundle.manifest import Contract, DualEncoderContract, GenerativeContract, Manifest
from vlm_edge_runtime.bundle.reader import PORTABLE, Bundle, open_bundle, read_manifest
from vlm_edge_runtime.bundle.writer import now, update_manifest
from vlm_edge_runtime.errors import BundleError, ParityError, TargetError

from .dataset import Dataset
from .examples import Example, built_in, built_in_pairs, views
from .expected import expect_answers, expect_vectors
from .graphs import PortableReference, compare_graph
from .report import BuildReport, ParityReport
from .request import Request, step
from .subject import Encoder, Generator, GraphReference
from .tolerance import ACCURACY_POINTS, Tolerance, loosest

_HERE = "ort-cpu"
"""The backend of builds that any machine can run."""
_VERSIONED = ("vlm-edge", "torch", "transformers", "onnxruntime", "numpy")


def compare(
    bundle: str | Path,
    reference: str | Path | None,
    *,
    builds: Sequence[str] | None = None,
    examples: Sequence[Example] | None = None,
    dataset: Dataset | None = None,
    max_new_tokens: int = 32,
    accuracy_points: float = ACCURACY_POINTS,
    store: bool = True,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Compares the portable graphs and builds of a bundle with the checkpoint `reference` (a folder or hub id) in PyTorch.

    Without a `reference` builds are compared with the portable graphs, and nothing imports PyTorch. `builds`: which
    ("portable" is one), by default all for the CPU; one for a GPU runs on that GPU, and as a whole model only (its graphs were
    compared when they were built). `examples`: pictures with prompts, by default a small drawn set.
    `dataset`: questions (or captions) with known answers; with it, task accuracy decides about quantised builds, and more
    than `accuracy_points` lost is FAIL. `store` records the verdicts in the manifest; `progress` hears of each step.

    Raises ParityError when there is nothing to compare, BundleError, TargetError (an unknown build), DeviceError (a build that
    cannot run here), and what loading the checkpoint raises (ExportError, UnsupportedModelError). A difference is never an
    error but a verdict.
    """
    path, steps = Path(bundle), progress or Silent()
    manifest = read_manifest(path)
    names = _chosen(path, manifest, builds, with_portable=reference is not None)
    if max_new_tokens < 1:
        raise ParityError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed to compare an answer.")
    dual = isinstance(manifest.contract, DualEncoderContract)
    chosen = list(examples) if examples is not None else (built_in_pairs() if dual else _fitting(manifest.contract))
    if not chosen:
        raise ParityError("There are no examples: give at least one picture with a prompt.")
    request = Request(path, manifest, chosen, dataset, max_new_tokens, accuracy_points, steps)
    with step(steps, "load the reference") as said:
        side, graphs, close = _reference(path, manifest, reference, dual, trust_remote_code)
        note = " ".join(filter(None, [_other_weights(manifest, side) if reference is not None else "", _left(manifest, names)]))
        said.append(side.name)
    try:
        if examples is None and not dual:
            request.examples, left_out = _answerable(side, request.examples)
            note = " ".join(filter(None, [note, left_out]))
        expected = expect_vectors(request, side) if dual else expect_answers(request, side)
        reports = []
        for name in names:
            with _opened(request, name) as (opened, tolerance):
                report = _compare_graphs(request, opened, graphs, shared=PORTABLE not in names)
                expected.judge(request, name, tolerance, report, preprocessing=reference is not None)
                reports.append(report)
    finally:
        close()
    found = ParityReport(
        bundle=path.name,
        model_type=manifest.model_type,
        reference=side.name,
        created=now(),
        builds=reports,
        examples=views(request.examples),
        note=note,
        versions=_versions(torch=reference is not None),
    )
    if store:
        _store(path, found)
    return found


def _fitting(contract: Contract) -> list[Example]:
    """The drawn examples that a model can take: as many pictures in one prompt as it may have."""
    image = contract.modality("image") if isinstance(contract, GenerativeContract) else None
    if image is None:
        raise ParityError("The bundle reads no pictures, and the drawn examples have nothing else: give examples of your own.")
    return [one for one in built_in() if image.most is None or len(one.images) <= image.most]


def _answerable(side: Generator, examples: Sequence[Example]) -> tuple[list[Example], str]:
    """The drawn examples that the reference takes, and what was left out. Raises ParityError when it takes none."""
    kept, said = [], ""
    for one in examples:
        try:
            side.prepare(one)
            kept.append(one)
        except ParityError as error:
            said = said or f"Left out: {len(one.images)} pictures in one prompt, which the reference does not take ({error})."
            refused = error
    if not kept:
        raise refused
    return kept, said


def _reference(
    path: Path, manifest: Manifest, reference: str | Path | None, dual: bool, trust_remote_code: bool
) -> tuple[Any, GraphReference, Callable[[], None]]:
    """The reference: a Generator or (`dual`) an Encoder; what knows its graphs; and how it is closed."""
    if reference is not None:
        from .merged_tokens import merged_counts
        from .reference import TorchReference

        original = TorchReference(str(reference), trust_remote_code=trust_remote_code, merged=merged_counts(manifest))
        if original.model_type != manifest.model_type:
            original.close()
            raise ParityError(
                f"{reference} is a '{original.model_type}', {path} was made from a '{manifest.model_type}' "
                f"({manifest.source.name}): name the checkpoint that the bundle was exported from."
            )
        return original, original, original.close if dual else _reading(path, original)
    from .bundle_side import BundleEncoder, BundleGenerator

    side: Generator | Encoder = BundleEncoder(path, PORTABLE) if dual else BundleGenerator(path, PORTABLE)
    portable = PortableReference(open_bundle(path))
    side.name = portable.name
    return side, portable, side.close


def _reading(path: Path, original: Any) -> Callable[[], None]:
    """Lets the original call its processor as the bundle reads; returns how both are closed."""
    from .bundle_side import BundleGenerator

    portable = BundleGenerator(path, PORTABLE)
    original.reads_like(portable.prepare)

    def close() -> None:
        portable.close()
        original.close()

    return close


def _other_weights(manifest: Manifest, original: Any) -> str:
    found = original.checkpoint.source
    if found.revision == manifest.source.revision:
        return ""
    return (
        f"The reference's weights ({found.name}, {found.revision[:12]}) are not those the bundle was exported from "
        f"({manifest.source.name}, {manifest.source.revision[:12]})."
    )


@contextmanager
def _opened(request: Request, name: str) -> Iterator[tuple[Bundle, Tolerance]]:
    bundle = open_bundle(request.path, build=name)
    yield bundle, loosest(entry.precision for entry in bundle.graphs.values())


def _compare_graphs(request: Request, bundle: Bundle, reference: GraphReference, *, shared: bool) -> BuildReport:
    """`shared`: also the graphs that a build takes from the portable ones (else those are compared once, there)."""
    roles = [role for role in bundle.graphs if shared or bundle.build is None or role in bundle.build.graphs]
    if bundle.build is not None and isinstance(reference, PortableReference):
        roles = [role for role in roles if role in bundle.build.graphs]
    if bundle.build is not None and bundle.build.backend != _HERE:
        roles = []
    results = []
    for role in roles:
        with step(request.steps, f"{bundle.build_name}: {role}") as said:
            results.append(compare_graph(bundle, role, reference))
            said.append(results[-1].verdict)
    words = {role: entry.precision for role, entry in bundle.graphs.items()}
    same = set(words.values())
    precision = same.pop() if len(same) == 1 else ", ".join(f"{role} {word}" for role, word in words.items())
    return BuildReport(name=bundle.build_name, reference=reference.name, precision=precision, graphs=results)


def _chosen(path: Path, manifest: Manifest, builds: Sequence[str] | None, *, with_portable: bool) -> list[str]:
    known = [PORTABLE, *manifest.builds]
    for name in builds or ():
        if name not in known:
            raise TargetError(f"{path} has no build '{name}'; it has: {', '.join(known)}.")
    here = [PORTABLE, *(name for name, build in manifest.builds.items() if build.backend == _HERE)]
    names = list(dict.fromkeys(builds)) if builds else here
    if not with_portable:
        names = [name for name in names if name != PORTABLE]
        if not names:
            raise ParityError(
                f"{path}: without a reference the portable graphs are the yardstick, and there is no build "
                f"{'for the CPU ' if manifest.builds else ''}to compare with them. Name the checkpoint (--reference), "
                f"{'name a build (--build)' if manifest.builds else 'or make a build (`vlm-edge build`)'}."
            )
    return names


def _left(manifest: Manifest, names: Sequence[str]) -> str:
    """The builds for other devices, where none was named: they are compared where they run."""
    left = [name for name, build in manifest.builds.items() if name not in names and build.backend != _HERE]
    return f"Not compared: {', '.join(left)}, built for a GPU; name it (--build) on a machine that has one." if left else ""


def _store(path: Path, report: ParityReport) -> None:
    def record(manifest: Manifest) -> None:
        for build in report.builds:
            if build.name == PORTABLE:
                manifest.parity = build.record(report.created)
            elif build.name in manifest.builds:
                manifest.builds[build.name].parity = build.record(report.created)

    try:
        update_manifest(path, record)
    except OSError as error:
        raise BundleError(
            f"The verdicts could not be written into {path}: {error.strerror or error}. Pass --no-store?"
        ) from error


def _versions(*, torch: bool) -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        if name in ("torch", "transformers") and not torch:
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
