"""`compare`: a bundle's graphs and answers against the original's, with a verdict that is stored."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm_edge.progress import Progress, Silent
from vlm_edge_runtime.bundle.manifest import Contract, DualEncoderContract, GenerativeContract, Manifest
from vlm_edge_runtime.bundle.reader import PORTABLE, Bundle, open_bundle, read_manifest
from vlm_edge_runtime.bundle.writer import now, update_manifest
from vlm_edge_runtime.errors import BundleError, DeviceError, ParityError, TargetError

from .accuracy import answers as right_answers
from .accuracy import judge_accuracy, retrievals
from .dataset import Dataset
from .embeddings import compare_pixels, compare_similarities, compare_vectors
from .examples import Example, built_in, built_in_pairs, views
from .graphs import PortableReference, compare_graph
from .model import compare_logits, compare_preprocessing, compare_texts
from .report import BuildReport, ParityReport
from .subject import Answer, Encoder, Floats, Generator, GraphReference, Prepared
from .tolerance import ACCURACY_POINTS, Tolerance, loosest

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
    ("portable" is one), by default all there are. `examples`: pictures with prompts, by default a small drawn set.
    `dataset`: questions (or captions) with known answers; with it, task accuracy decides about quantised builds, and more
    than `accuracy_points` lost is FAIL. `store` records the verdicts in the manifest; `progress` hears of each step.

    Raises ParityError when there is nothing to compare, BundleError, TargetError (an unknown build), and what loading the
    checkpoint raises (ExportError, UnsupportedModelError). A difference is never an error but a verdict.
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
    request = _Request(path, manifest, chosen, dataset, max_new_tokens, accuracy_points, steps)
    with _step(steps, "load the reference") as said:
        side, graphs, close = _reference(path, manifest, reference, dual, trust_remote_code)
        note = _other_weights(manifest, side) if reference is not None else ""
        said.append(side.name)
    try:
        if examples is None and not dual:
            request.examples, left_out = _answerable(side, request.examples)
            note = " ".join(filter(None, [note, left_out]))
        expected = _expect_vectors(request, side) if dual else _expect_answers(request, side)
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


@dataclass(slots=True)
class _Request:
    """What `compare` was asked for."""

    path: Path
    manifest: Manifest
    examples: list[Example]
    dataset: Dataset | None
    max_new_tokens: int
    accuracy_points: float
    steps: Progress


class _Expected(Protocol):
    """What the reference says, ready to be compared with any number of builds."""

    def judge(self, request: _Request, name: str, tolerance: Tolerance, report: BuildReport, *, preprocessing: bool) -> None: ...


@dataclass(slots=True)
class _Answers:
    """A generating reference's work, done once."""

    side: Generator
    prepared: list[Prepared]
    answers: list[Answer]
    logits: list[Floats]
    right: list[bool] = field(default_factory=list)

    def judge(self, request: _Request, name: str, tolerance: Tolerance, report: BuildReport, *, preprocessing: bool) -> None:
        """Fills in everything about the whole model."""
        from .bundle_side import BundleGenerator

        decides = request.dataset is not None and tolerance.quantised
        with _step(request.steps, f"{name}: whole model") as said:
            side = BundleGenerator(request.path, name)
            try:
                if preprocessing:
                    report.preprocessing = compare_preprocessing([side.prepare(one) for one in request.examples], self.prepared)
                guarded = _Guarded(side)
                report.logits = compare_logits(
                    guarded, request.examples, self.answers, self.logits, tolerance, accuracy_decides=decides
                )
                free = [guarded.greedy(one, request.max_new_tokens) for one in request.examples]
                report.texts = compare_texts(free, self.answers, self.logits, tolerance, accuracy_decides=decides)
                if request.dataset is not None:
                    found = right_answers(guarded, request.dataset, request.max_new_tokens)
                    report.accuracy = judge_accuracy(found, self.right, "task accuracy", allowed_points=request.accuracy_points)
            finally:
                side.close()
            said.append(report.verdict)


@dataclass(slots=True)
class _Vectors:
    """A dual encoder's vectors, made once."""

    side: Encoder
    images: Floats
    texts: Floats
    right: list[bool] = field(default_factory=list)

    def judge(self, request: _Request, name: str, tolerance: Tolerance, report: BuildReport, *, preprocessing: bool) -> None:
        """Fills in everything about the whole model."""
        from .bundle_side import BundleEncoder

        contract = request.manifest.contract
        assert isinstance(contract, DualEncoderContract)  # what chose this class
        decides = request.dataset is not None and tolerance.quantised
        with _step(request.steps, f"{name}: whole model") as said:
            side = BundleEncoder(request.path, name)
            try:
                pictures = [image for one in request.examples for image in one.images]
                if preprocessing:
                    report.preprocessing = compare_pixels(side, self.side, pictures)
                images, texts = side.embed_images(pictures), side.embed_texts([one.prompt for one in request.examples])
                report.embeddings = [
                    compare_vectors("image embeddings", images, self.images, tolerance),
                    compare_vectors("text embeddings", texts, self.texts, tolerance),
                    compare_similarities(
                        (images, texts), (self.images, self.texts), contract, tolerance, accuracy_decides=decides
                    ),
                ]
                if request.dataset is not None:
                    report.accuracy = judge_accuracy(
                        retrievals(side, request.dataset), self.right, "retrieval", allowed_points=request.accuracy_points
                    )
            finally:
                side.close()
            said.append(report.verdict)


class _Guarded:
    """A build that gives NaN refuses to decode; that is an answer about the build, not the end of the comparison."""

    def __init__(self, side: Generator) -> None:
        self.name = side.name
        self._side = side

    def forced(self, example: Example, answer: Sequence[int]) -> Floats:
        try:
            return self._side.forced(example, answer)
        except DeviceError:
            return np.full((len(answer), 1), np.nan, np.float32)

    def greedy(self, example: Example, max_new_tokens: int) -> Answer:
        try:
            return self._side.greedy(example, max_new_tokens)
        except DeviceError as error:
            return Answer([], f"[{error}]")

    def prepare(self, example: Example) -> Prepared:
        return self._side.prepare(example)

    def words(self, tokens: Sequence[int]) -> list[str]:
        return self._side.words(tokens)

    def close(self) -> None:
        self._side.close()


def _expect_answers(request: _Request, side: Generator) -> _Answers:
    with _step(request.steps, "the reference's answers") as said:
        prepared = [side.prepare(example) for example in request.examples]
        answers = [side.greedy(example, request.max_new_tokens) for example in request.examples]
        empty = next((i for i, answer in enumerate(answers) if not answer.tokens), None)
        if empty is not None:
            raise ParityError(f"The reference gave no token at all for example {empty + 1}: there is nothing to compare along.")
        logits = [side.forced(one, answer.tokens) for one, answer in zip(request.examples, answers, strict=True)]
        right = right_answers(side, request.dataset, request.max_new_tokens) if request.dataset is not None else []
        said.append(f"{sum(len(answer.tokens) for answer in answers)} tokens")
    return _Answers(side, prepared, answers, logits, right)


def _expect_vectors(request: _Request, side: Encoder) -> _Vectors:
    with _step(request.steps, "the reference's vectors"):
        images = side.embed_images([image for one in request.examples for image in one.images])
        texts = side.embed_texts([one.prompt for one in request.examples])
        right = retrievals(side, request.dataset) if request.dataset is not None else []
    return _Vectors(side, images, texts, right)


def _reference(
    path: Path, manifest: Manifest, reference: str | Path | None, dual: bool, trust_remote_code: bool
) -> tuple[Any, GraphReference, Callable[[], None]]:
    """The reference: a Generator or (`dual`) an Encoder; what knows its graphs; and how it is closed."""
    if reference is not None:
        from .reference import TorchReference

        original = TorchReference(str(reference), trust_remote_code=trust_remote_code)
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
def _opened(request: _Request, name: str) -> Iterator[tuple[Bundle, Tolerance]]:
    bundle = open_bundle(request.path, build=name)
    yield bundle, loosest(entry.precision for entry in bundle.graphs.values())


def _compare_graphs(request: _Request, bundle: Bundle, reference: GraphReference, *, shared: bool) -> BuildReport:
    """`shared`: also the graphs that a build takes from the portable ones (else those are compared once, there)."""
    roles = [role for role in bundle.graphs if shared or bundle.build is None or role in bundle.build.graphs]
    if bundle.build is not None and isinstance(reference, PortableReference):
        roles = [role for role in roles if role in bundle.build.graphs]
    results = []
    for role in roles:
        with _step(request.steps, f"{bundle.build_name}: {role}") as said:
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
    names = list(dict.fromkeys(builds)) if builds else known
    if not with_portable:
        names = [name for name in names if name != PORTABLE]
        if not names:
            raise ParityError(
                f"{path}: without a reference the portable graphs are the yardstick, and there is no build to compare with them. "
                "Name the checkpoint (--reference), or make a build (`vlm-edge build`)."
            )
    return names


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


@contextmanager
def _step(steps: Progress, name: str) -> Iterator[list[str]]:
    """Reports a step's start and its end, good or bad; what is appended to the list becomes its detail."""
    said: list[str] = []
    steps.start(name)
    try:
        yield said
    except BaseException as error:
        steps.failed(name, str(error) or type(error).__name__)
        raise
    steps.done(name, ", ".join(said))
