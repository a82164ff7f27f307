"""What the reference says of a whole model, ready to be compared with any number of builds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vlm_edge_runtime.bundle.manifest import DualEncoderContract, GenerativeContract
from vlm_edge_runtime.errors import DeviceError, ParityError

from .accuracy import answers as right_answers
from .accuracy import judge_accuracy, retrievals
from .embeddings import compare_pixels, compare_similarities, compare_vectors
from .examples import Example, built_in_pairs
from .model import compare_logits, compare_preprocessing, compare_texts
from .report import BuildReport, EmbeddingResult
from .request import Request, step
from .subject import Answer, Encoder, Floats, Generator, Prepared
from .tolerance import Tolerance


class Expected(Protocol):
    """What the reference says, ready to be compared with any number of builds."""

    def judge(self, request: Request, name: str, tolerance: Tolerance, report: BuildReport, *, preprocessing: bool) -> None: ...


@dataclass(slots=True)
class Answers:
    """A generating reference's work, done once."""

    side: Generator
    prepared: list[Prepared]
    answers: list[Answer]
    logits: list[Floats]
    space: _Space | None
    right: list[bool] = field(default_factory=list)

    def judge(self, request: Request, name: str, tolerance: Tolerance, report: BuildReport, *, preprocessing: bool) -> None:
        """Fills in everything about the whole model."""
        from .bundle_side import BundleGenerator

        decides = request.dataset is not None and tolerance.quantised
        with step(request.steps, f"{name}: whole model") as said:
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
                if self.space is not None:
                    report.embeddings = self.space.compare(side, request, tolerance, accuracy_decides=False)
                if request.dataset is not None:
                    found = right_answers(guarded, request.dataset, request.max_new_tokens)
                    report.accuracy = judge_accuracy(found, self.right, "task accuracy", allowed_points=request.accuracy_points)
            finally:
                side.close()
            said.append(report.verdict)


@dataclass(slots=True)
class _Space:
    """Unit vectors of pictures and texts [n, dim], the texts themselves, and how the two are compared."""

    contract: DualEncoderContract
    prompts: list[str]
    images: Floats
    texts: Floats

    @classmethod
    def of(cls, contract: DualEncoderContract, side: Encoder, pictures: Sequence[Any], prompts: list[str]) -> _Space:
        return cls(contract, prompts, side.embed_images(pictures), side.embed_texts(prompts))

    def compare(self, side: Encoder, request: Request, tolerance: Tolerance, *, accuracy_decides: bool) -> list[EmbeddingResult]:
        """Both kinds of vectors, and the scores of every picture with every text."""
        images, texts = side.embed_images(_pictures(request)), side.embed_texts(self.prompts)
        return [
            compare_vectors("image embeddings", images, self.images, tolerance),
            compare_vectors("text embeddings", texts, self.texts, tolerance),
            compare_similarities(
                (images, texts), (self.images, self.texts), self.contract, tolerance, accuracy_decides=accuracy_decides
            ),
        ]


@dataclass(slots=True)
class Vectors:
    """A dual encoder's vectors, made once."""

    side: Encoder
    space: _Space
    right: list[bool] = field(default_factory=list)

    def judge(self, request: Request, name: str, tolerance: Tolerance, report: BuildReport, *, preprocessing: bool) -> None:
        """Fills in everything about the whole model."""
        from .bundle_side import BundleEncoder

        decides = request.dataset is not None and tolerance.quantised
        with step(request.steps, f"{name}: whole model") as said:
            side = BundleEncoder(request.path, name)
            try:
                if preprocessing:
                    report.preprocessing = compare_pixels(side, self.side, _pictures(request))
                report.embeddings = self.space.compare(side, request, tolerance, accuracy_decides=decides)
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


def expect_answers(request: Request, side: Any) -> Answers:
    """What a Generator answers, and (an Encoder, too, where the contract compares images with texts) its vectors."""
    with step(request.steps, "the reference's answers") as said:
        prepared = [side.prepare(example) for example in request.examples]
        answers = [side.greedy(example, request.max_new_tokens) for example in request.examples]
        empty = next((i for i, answer in enumerate(answers) if not answer.tokens), None)
        if empty is not None:
            raise ParityError(f"The reference gave no token at all for example {empty + 1}: there is nothing to compare along.")
        logits = [side.forced(one, answer.tokens) for one, answer in zip(request.examples, answers, strict=True)]
        right = right_answers(side, request.dataset, request.max_new_tokens) if request.dataset is not None else []
        contract = request.manifest.contract
        contrast = contract.contrast if isinstance(contract, GenerativeContract) else None
        texts = [one.prompt for one in built_in_pairs()]
        space = _Space.of(contrast, side, _pictures(request), texts) if contrast is not None else None
        said.append(f"{sum(len(answer.tokens) for answer in answers)} tokens")
    return Answers(side, prepared, answers, logits, space, right)


def expect_vectors(request: Request, side: Encoder) -> Vectors:
    """The vectors of a dual encoder."""
    contract = request.manifest.contract
    assert isinstance(contract, DualEncoderContract)  # what made it a dual encoder's comparison
    with step(request.steps, "the reference's vectors"):
        space = _Space.of(contract, side, _pictures(request), [one.prompt for one in request.examples])
        right = retrievals(side, request.dataset) if request.dataset is not None else []
    return Vectors(side, space, right)


def _pictures(request: Request) -> list[Any]:
    return [image for one in request.examples for image in one.images]
