"""Every system the project sets out to carry: exported, built at three precisions, compared with PyTorch on 8 prompts × 2 images.

The result of each is what `vlm-edge families` and README.md say of it (`make coverage` writes it down).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from vlm_edge.families import coverage
from vlm_edge.parity import Pair, ParityReport, Question, compare
from vlm_edge.parity.examples import Example, built_in
from vlm_edge.parity.report import BuildReport
from vlm_edge_runtime.bundle.manifest import DualEncoderContract
from vlm_edge_runtime.bundle.reader import read_manifest

PROMPTS = (
    "What is in the picture?",
    "Describe this image.",
    "How many shapes are there?",
    "Is there a red circle?",
    "a photo of",
    "Question: what is left of the blue square? Answer:",
    "what colour is it",
    "Compare both halves, please!",
)
TEXTS = ("a red circle", "a photo of the sea", "noise", "stripes", "two cats", "a house", "blue", "a dog by a tree")
"""What pictures are compared with where the model embeds."""
NEW_TOKENS, QUESTIONS, POOL = 12, 128, 64
QUICK = {"llava-llama", "clip"}
"""In every run of the tests; the others take a while each."""

_SYSTEMS = [(one, name) for one in coverage.systems() for name in one.checkpoints]


@pytest.mark.parametrize(
    ("system", "name"),
    [
        pytest.param(system, name, id=f"{system.name}-{name}", marks=() if name in QUICK else pytest.mark.slow)
        for system, name in _SYSTEMS
    ],
)
def test_system(system: coverage.System, name: str, built_bundle, tiny_checkpoint, keep) -> None:
    bundle, trained = built_bundle(name), name == system.trained
    report = compare(
        bundle,
        tiny_checkpoint(name),
        examples=_examples(system, bundle),
        dataset=_dataset(system, bundle) if trained else None,
        max_new_tokens=NEW_TOKENS,
        store=False,
    )
    result = _result(bundle, report, trained)
    keep(name, result)
    assert set(result.builds) == set(coverage.BUILDS)
    for build in coverage.BUILDS[:2]:  # the same arithmetic: equal, or undecided at a near tie of PyTorch's
        assert result.builds[build].verdict != "FAIL", _why(report, build)
    for build in coverage.BUILDS[2:]:
        found = next(one for one in report.builds if one.name == build)
        assert all(graph.verdict != "FAIL" for graph in found.graphs), _why(report, build)
        if trained:
            assert result.builds[build].verdict != "FAIL", _why(report, build)
    _as_committed(name, result)


def _as_committed(name: str, result: coverage.CheckpointResult) -> None:
    """The committed table says the same; figures may differ in their noise, verdicts in float32 may not."""
    committed = coverage.results().get(name)
    assert committed is not None, f"{name} is not in coverage.json: run `make coverage`"
    for build in coverage.BUILDS[:2]:
        assert committed.builds[build].verdict == result.builds[build].verdict, f"{name} {build}: run `make coverage`"


def _examples(system: coverage.System, bundle: Path) -> list[Example]:
    """8 prompts × 2 pictures, of unlike sizes; the last has both pictures where the system takes two."""
    pictures = [built_in()[0].images[0], built_in()[1].images[0]]
    if _embeds(bundle):
        return [Example((pictures[number % 2],), text) for number, text in enumerate(TEXTS)]
    prompts = system.prompts or list(PROMPTS)
    found = [Example((picture,), prompt) for prompt, picture in itertools.product(prompts, pictures)]
    return [*found[:-1], Example(tuple(pictures), prompts[-1])] if system.images > 1 and len(found) > 2 else found


def _embeds(bundle: Path) -> bool:
    return isinstance(read_manifest(bundle).contract, DualEncoderContract)


def _dataset(system: coverage.System, bundle: Path) -> list[Question] | list[Pair]:
    """Held-out scenes with their captions and questions; captions alone for what reads no prompt (it was trained to describe)."""
    from benchmarks.train import scenes

    if _embeds(bundle):
        return [Pair(image, text) for image, text in scenes.held_out_captions(POOL, seed=0)]
    describes = system.prompts == [""]
    found = scenes.held_out_examples(QUESTIONS * (1 + describes), model="smolvlm" if system.model_type == "smolvlm" else "llava")
    if describes:  # captions and questions come in turn
        return [Question((example.image,), "", example.answer) for example in found[::2]]
    return [Question((example.image,), example.prompt, example.answer) for example in found]


def _result(bundle: Path, report: ParityReport, trained: bool) -> coverage.CheckpointResult:
    record = read_manifest(bundle).parity
    assert record is not None, "the export was checked"
    return coverage.CheckpointResult(
        weights="trained" if trained else "random",
        graphs={check.subject: _rounded(check.metric["scaled"]) for check in record.checks},
        graph_tolerance=max(check.tolerance["scaled"] for check in record.checks),
        builds={one.name: _build(one) for one in report.builds},
    )


def _build(report: BuildReport) -> coverage.BuildResult:
    result = coverage.BuildResult(verdict=report.verdict)
    if (logits := report.logits) is not None:
        result.tolerance, result.kl = logits.tolerance, _rounded(logits.mean_kl)
        result.logits = _rounded(logits.distance.relative)
        result.texts = len(report.texts)
        result.identical = sum(text.diverged_at is None for text in report.texts)
        result.note = logits.note
    if report.embeddings:
        result.cosine = _rounded(min(one.distance.cosine for one in report.embeddings if one.what.endswith("embeddings")), 6)
    if (accuracy := report.accuracy) is not None:
        result.reference_accuracy, result.accuracy = accuracy.reference, accuracy.accuracy
    return result


def _rounded(value: float, digits: int = 2) -> float:
    return float(f"{value:.{digits}g}")


def _why(report: ParityReport, build: str) -> str:
    return "\n".join(f"{row.verdict} {row.subject}: {row.numbers} {row.note}" for row in report.rows() if row.what == build)
