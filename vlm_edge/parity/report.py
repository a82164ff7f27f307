"""What a comparison found, as types: for the manifest, for JSON, for a table, for the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vlm_edge_runtime.bundle.manifest import Check, ParityRecord

from .metrics import UNBOUNDED, Distance, Step, worst
from .tolerance import EXIT_CODES, Verdict, overall


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Strict base of the report's parts."""


class CaseResult(_Part):
    """One output of one graph on one set of inputs."""

    case: str
    output: str
    distance: Distance


class GraphResult(_Part):
    """One graph against the reference. `tolerance` None: quantised, reported but not judged by these numbers."""

    role: str
    precision: str
    verdict: Verdict
    tolerance: float | None
    distance: Distance
    cases: list[CaseResult]
    note: str = ""


class PreprocessingResult(_Part):
    """What the reference's processor and ours make of the same pictures and prompts."""

    verdict: Verdict
    tolerance: float
    distance: Distance
    examples: int
    tokens_differ: int
    note: str = ""


class ForcedResult(_Part):
    """Both sides read one prompt and the reference's own answer, token by token.

    `scatter`: pairs (reference logit, logit) of the likeliest tokens of every step.
    """

    example: int
    words: list[str]
    steps: list[Step]
    scatter: list[tuple[float, float]]


class LogitsResult(_Part):
    """All teacher-forced steps together."""

    verdict: Verdict
    distance: Distance
    tolerance: float | None
    mean_kl: float
    mean_kl_tolerance: float
    max_kl: float
    agreement: float
    near_ties: int
    decided_flips: int
    steps: int
    examples: list[ForcedResult]
    note: str = ""


class TextResult(_Part):
    """Both sides answer freely, greedily. `diverged_at`: the first token that differs, None where all are equal."""

    example: int
    verdict: Verdict
    reference: str
    text: str
    diverged_at: int | None
    margin: float | None
    note: str = ""


class EmbeddingResult(_Part):
    """Vectors of a dual encoder, for pictures or for texts, or the similarities between both."""

    what: str
    verdict: Verdict
    distance: Distance
    tolerance: float
    near_ties: int = 0
    decided_flips: int = 0
    rows: int = 0
    scatter: list[tuple[float, float]] = []
    note: str = ""


class AccuracyResult(_Part):
    """The same questions to both sides, in shares of right answers. `lost`: right in the reference only; `gained`: here only."""

    verdict: Verdict
    measure: str
    examples: int
    reference: float
    accuracy: float
    lost: int
    gained: int
    tolerance_points: float
    note: str = ""

    @property
    def drop_points(self) -> float:
        """Accuracy lost, in percentage points (negative: gained)."""
        return 100.0 * (self.reference - self.accuracy)


class Row(_Part):
    """One line of the table."""

    what: str
    subject: str
    verdict: Verdict
    numbers: str
    note: str


class BuildReport(_Part):
    """All comparisons of the portable graphs, or of one build, with the reference."""

    name: str
    reference: str
    precision: str
    graphs: list[GraphResult]
    preprocessing: PreprocessingResult | None = None
    logits: LogitsResult | None = None
    texts: list[TextResult] = []
    embeddings: list[EmbeddingResult] = []
    accuracy: AccuracyResult | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        parts = [self.preprocessing, self.logits, self.accuracy, *self.graphs, *self.texts, *self.embeddings]
        return overall(part.verdict for part in parts if part is not None)

    def record(self, created: str) -> ParityRecord:
        """What goes into the manifest."""
        return ParityRecord(verdict=self.verdict, reference=self.reference, created=created, checks=list(self.checks()))

    def checks(self) -> list[Check]:
        """Each comparison as the manifest's flat form."""
        found: list[Check] = []
        if (pre := self.preprocessing) is not None:
            metric = {**_numbers(pre.distance), "tokens_differ": float(pre.tokens_differ)}
            found.append(_check(pre.verdict, "preprocessing", metric, {"relative": pre.tolerance}, pre.examples, pre.note))
        for graph in self.graphs:
            allowed = {} if graph.tolerance is None else {"relative": graph.tolerance}
            found.append(_check(graph.verdict, graph.role, _numbers(graph.distance), allowed, len(graph.cases), graph.note))
        if (logits := self.logits) is not None:
            metric = {
                **_numbers(logits.distance),
                "mean_kl": logits.mean_kl,
                "max_kl": logits.max_kl,
                "agreement": logits.agreement,
                "near_ties": float(logits.near_ties),
                "decided_flips": float(logits.decided_flips),
            }
            allowed = {"mean_kl": logits.mean_kl_tolerance}
            if logits.tolerance is not None:
                allowed["relative"] = logits.tolerance
            found.append(_check(logits.verdict, "logits", metric, allowed, logits.steps, logits.note))
        if self.texts:
            same = sum(text.diverged_at is None for text in self.texts)
            verdict = overall(text.verdict for text in self.texts)
            note = next((text.note for text in self.texts if text.verdict == verdict and text.note), "")
            found.append(_check(verdict, "greedy text", {"identical": float(same)}, {}, len(self.texts), note))
        for embedding in self.embeddings:
            metric = {
                **_numbers(embedding.distance),
                "near_ties": float(embedding.near_ties),
                "decided_flips": float(embedding.decided_flips),
            }
            found.append(
                _check(
                    embedding.verdict, embedding.what, metric, {"tolerance": embedding.tolerance}, embedding.rows, embedding.note
                )
            )
        if (accuracy := self.accuracy) is not None:
            metric = {"reference": accuracy.reference, "accuracy": accuracy.accuracy, "drop_points": accuracy.drop_points}
            allowed = {"drop_points": accuracy.tolerance_points}
            found.append(_check(accuracy.verdict, accuracy.measure, metric, allowed, accuracy.examples, accuracy.note))
        return found


class ExampleView(_Part):
    """One built-in or given example, as the page shows it: the prompt and small pictures as data URLs."""

    prompt: str
    pictures: list[str]


class ParityReport(_Part):
    """Everything `compare` found. `reference`: the checkpoint's name, or `portable graphs` where there was no PyTorch.

    `note`: what a reader of a bad verdict should know first (the bundle was made from other weights).
    """

    bundle: str
    model_type: str
    reference: str
    created: str
    builds: list[BuildReport]
    examples: list[ExampleView] = []
    note: str = ""
    versions: dict[str, str] = {}

    @property
    def verdict(self) -> Verdict:
        """The worst of all builds."""
        return overall(build.verdict for build in self.builds)

    @property
    def exit_code(self) -> int:
        """0 PASS, 1 FAIL, 2 AMBIGUOUS."""
        return EXIT_CODES[self.verdict]

    def rows(self) -> list[Row]:
        """One line per comparison, for a table."""
        about = [Row(what="reference", subject="weights", verdict=self.verdict, numbers="", note=self.note)] if self.note else []
        return about + [
            Row(what=build.name, subject=check.subject, verdict=check.verdict, numbers=summary(check), note=check.note)
            for build in self.builds
            for check in build.checks()
        ]

    def to_builtins(self) -> dict[str, Any]:
        """As dicts and lists, with the verdicts that are computed."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        value["verdict"], value["exit_code"] = self.verdict, self.exit_code
        for plain, build in zip(value["builds"], self.builds, strict=True):
            plain["verdict"] = build.verdict
        return value

    def to_json(self) -> str:
        """`to_builtins` as JSON text."""
        return msgspec.json.format(msgspec.json.encode(self.to_builtins()), indent=2).decode()

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page: no script, no font and no picture comes from elsewhere."""
        from .html import render

        Path(path).write_text(render(self), encoding="utf-8")


def short(value: float) -> str:
    """A number for people; UNBOUNDED is ∞."""
    if value >= UNBOUNDED:
        return "∞"
    return f"{value:.3g}"


def summary(check: Check) -> str:
    """The numbers of a check in one line."""
    metric = check.metric
    if "drop_points" in metric:
        return f"{metric['reference']:.1%} → {metric['accuracy']:.1%}"
    if "identical" in metric:
        return f"{metric['identical']:.0f} of {check.cases} texts identical"
    parts = []
    if "mean_kl" in metric:
        parts += [f"KL {short(metric['mean_kl'])}", f"top-1 {metric['agreement']:.1%} of {check.cases}"]
    parts += [f"max {short(metric['max_abs'])}", f"rel {short(metric['relative'])}", f"cos {metric['cosine']:.6f}"]
    return ", ".join(parts)


def _check(verdict: Verdict, subject: str, metric: dict[str, float], tolerance: dict[str, float], cases: int, note: str) -> Check:
    return Check(verdict=verdict, subject=subject, metric=metric, tolerance=tolerance, cases=cases, note=note)


def _numbers(found: Distance) -> dict[str, float]:
    return {"max_abs": found.max_abs, "relative": found.relative, "cosine": found.cosine}


def graph_result(role: str, precision: str, tolerance: float | None, cases: list[CaseResult], note: str = "") -> GraphResult:
    """Judges one graph: within the tolerance, or (quantised) at least comparable. No case at all is AMBIGUOUS."""
    total = worst(case.distance for case in cases)
    bad = [case for case in cases if (case.distance.note if tolerance is None else not case.distance.within(tolerance))]
    verdict: Verdict = "FAIL" if bad else "PASS" if cases else "AMBIGUOUS"
    if bad:
        first = bad[0]
        why = first.distance.note or f"relative difference {short(first.distance.relative)}"
        note = f"{first.output} on '{first.case}': {why}; {len(bad)} of {len(cases)} comparisons"
    elif not cases:
        note = note or "nothing could be compared"
    elif tolerance is None:
        note = note or "quantised: the whole model decides"
    return GraphResult(
        role=role, precision=precision, verdict=verdict, tolerance=tolerance, distance=total, cases=cases, note=note
    )
