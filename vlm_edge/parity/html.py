"""The report as one page: everything inline, nothing fetched."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .plots import Bar, bars, scatter, steps
from .report import BuildReport, LogitsResult, ParityReport, TextResult, short, summary

TEMPLATE = "report.html.jinja"


def render(report: ParityReport) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    return environment.get_template(TEMPLATE).render(report=report, builds=[_view(report, build) for build in report.builds])


def _view(report: ParityReport, build: BuildReport) -> dict[str, Any]:
    """What the template shows of one build."""
    checks = build.checks()
    told = next((check for check in checks if check.verdict == build.verdict and build.verdict != "PASS"), None)
    return {
        "build": build,
        "checks": [(check, summary(check)) for check in checks],
        "worst": f"{told.subject}: {told.note}" if told else "",
        "graph_plot": _raw(
            bars(
                [Bar(graph.role, graph.distance.relative, graph.tolerance, graph.verdict) for graph in build.graphs],
                title=f"Relative difference of each graph of {build.name}",
            )
        ),
        "kl_plot": _raw(_kl_plot(build.logits, build.name)),
        "scatter_plot": _raw(_scatter_plot(build)),
        "texts": [_text(report, text) for text in build.texts],
        "worst_cases": [
            (graph, sorted(graph.cases, key=lambda case: -case.distance.relative)[:3]) for graph in build.graphs if graph.cases
        ],
    }


def _kl_plot(logits: LogitsResult | None, name: str) -> str:
    if logits is None:
        return ""
    series = [[step.kl for step in example.steps] for example in logits.examples]
    marks = [
        (i, j, "ambiguous" if step.near_tie else "fail")
        for i, example in enumerate(logits.examples)
        for j, step in enumerate(example.steps)
        if step.flipped
    ]
    return steps(series, marks, logits.mean_kl_tolerance, title=f"KL divergence of {name} along each answer")


def _scatter_plot(build: BuildReport) -> str:
    if build.logits is not None:
        points = [point for example in build.logits.examples for point in example.scatter]
        return scatter(points, title=f"Logits of {build.name} against the reference's")
    points = [point for embedding in build.embeddings for point in embedding.scatter]
    return scatter(points, title=f"Similarities of {build.name} against the reference's")


def _text(report: ParityReport, text: TextResult) -> dict[str, Any]:
    example = report.examples[text.example] if text.example < len(report.examples) else None
    left, right = _diff(text.reference, text.text)
    return {"result": text, "example": example, "reference": left, "found": right}


def _diff(reference: str, found: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both texts as runs of words: (the same on both sides, the words)."""
    a, b = _words(reference), _words(found)
    left: list[tuple[bool, str]] = []
    right: list[tuple[bool, str]] = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        left.append((kind == "equal", "".join(a[a0:a1])))
        right.append((kind == "equal", "".join(b[b0:b1])))
    return [run for run in left if run[1]], [run for run in right if run[1]]


def _words(text: str) -> list[str]:
    words: list[str] = []
    for piece in text.split(" "):
        words.append(piece if not words else " " + piece)
    return [word for word in words if word]


def _raw(svg: str) -> Any:
    """Plots are markup of our own; their words were escaped when they were drawn."""
    return Markup(svg)
