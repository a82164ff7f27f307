"""From the journal's rows to a document (JSON), and from that to Markdown. All arithmetic of ratios and shares is here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .contenders import Contender
from .goals import GOALS, METRICS, OURS, Metric, Verdict, fastest, judge, ratio_of, words
from .limits import Limits, best
from .rounds import DISK_MB, QUIET_SHARE
from .shape import Shape

Row = dict[str, Any]


MOST = 1.02
"""A share beyond this is no share: that contender is not bound by what was taken for its limit. None is printed then."""
LIMITS = {"read_gb_s": "read", "int8_gop_s": "int8", "bf16_gflop_s": "bf16", "fp32_gflop_s": "fp32"}


def medians(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """contender → metric → median over the rounds; a metric that a round lacks is lacking."""
    found: dict[str, dict[str, float]] = {}
    for key, own in rows.items():
        if own:
            found[key] = {
                m.key: statistics.median(row[m.key] for row in own) for m in METRICS if all(m.key in row for row in own)
            }
    return found


def extremes(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Least and most over the rounds."""
    values = [float(row[metric]) for row in rows]
    return min(values), max(values)


def share_of(metric: Metric, value: float, row: Row, shape: Shape, limit: Limits, job: Row) -> float | None:
    """The part of what the machine allows. Decoding: bytes of weights and cache a token, at the read bandwidth. A prompt and

    vision: matrix products and attention, each at the peak of the arithmetic that the contender says it uses. None where that is
    not known or its peak not measured.
    """
    if metric.share == "decode":
        context = job["lengths"]["short" if "short" in metric.key else "long"] + job["new_tokens"] / 2
        read = row["token_bytes"] + shape.cache_bytes(context, row["kv_bytes"])
        return float(value * read / limit.read)
    if metric.share is None:
        return None
    names = ("vision", "vision_attention") if metric.share == "vision" else ("products", "attention")
    products, attention = (limit.peak(row.get("arithmetic", {}).get(name)) for name in names)
    if products is None or attention is None:
        return None
    if metric.share == "vision":
        return (shape.vision_products / products + shape.vision_attention / attention) / (value / 1e3)
    tokens = job["lengths"]["short" if "short" in metric.key else "longest"]
    least = shape.prompt_products(tokens) / products + shape.prompt_attention(tokens) / attention
    return float(least * value / tokens)


def document(
    rows: Mapping[str, Sequence[Row]],
    contenders: Sequence[Contender],
    failed: Mapping[str, str],
    seen: Sequence[Limits],
    shape: Shape,
    job: Row,
    head: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is known, as JSON takes it. `job`: lengths, new_tokens, tiles, image_tokens, other_tokens, model."""
    middle, limit = medians(rows), best(seen)
    entries: dict[str, Any] = {}
    shares: dict[str, dict[str, float]] = {}
    for one in contenders:
        own = rows.get(one.key, ())
        entry: dict[str, Any] = {"label": one.label, "ours": one.ours}
        if one.key in failed:
            entry["failed"] = failed[one.key]
        if own:
            shares[one.key] = {}
            for metric in METRICS:
                if metric.key not in middle[one.key]:
                    continue
                value = middle[one.key][metric.key]
                low, high = extremes(own, metric.key)
                figure: dict[str, Any] = {"median": value, "min": low, "max": high}
                share = share_of(metric, value, own[-1], shape, limit, job)
                if share is not None and share > MOST:
                    entry.setdefault("beyond", []).append(metric.key)
                elif share is not None:
                    figure["share"] = shares[one.key][metric.key] = share
                entry[metric.key] = figure
            entry |= {"rounds": len(own), "disturbed": sum(disturbed(row) for row in own)}
            entry |= {"disk_mb": max(row.get("disk_mb", 0.0) for row in own), "arithmetic": own[-1].get("arithmetic")}
            entry |= {name: own[-1][name] for name in ("versions", "note", "token_bytes", "kv_bytes")}
            entry["measured"] = [
                {name: row.get(name) for name in ("at", "piece", "commit", "wall_s", "other_cpu")} for row in own
            ]
        entries[one.key] = entry
    for metric in METRICS:
        peer = fastest(metric, middle)
        for one in contenders:
            if peer is not None and metric.key in middle.get(one.key, {}):
                other = middle[peer][metric.key]
                entries[one.key][metric.key]["of_best_peer"] = ratio_of(metric, middle[one.key][metric.key], other)
    cache = (
        shape.cache_bytes(job["image_tokens"] + job["other_tokens"], rows[OURS][-1]["kv_bytes"]) / 1e6 if rows.get(OURS) else 0.0
    )
    goals = [judge(goal, middle, shares, cache) for goal in GOALS if job["model"] in goal.models and goal.tiles == job["tiles"]]
    return {
        **head,
        "job": dict(job),
        "limits": {
            name: {"best": getattr(limit, one) / 1e9, "least": min(getattr(each, one) for each in seen) / 1e9, "times": len(seen)}
            for name, one in LIMITS.items()
        },
        "contenders": entries,
        "goals": [_goal(verdict, job, entries) for verdict in goals],
    }


def disturbed(row: Row) -> bool:
    """Whether something else ran while that row was taken."""
    return bool(row["other_cpu"] > QUIET_SHARE or row["steal"] > QUIET_SHARE)


def label(metric: Metric, job: Row) -> str:
    """A metric's name with the scenario's numbers."""
    lengths, half = job["lengths"], job["new_tokens"] // 2
    tiles = "1 tile" if job["tiles"] == 1 else f"{job['tiles']} tiles"
    values = {"short": lengths["short"], "longest": lengths["longest"], "tiles": tiles, "others": job["other_tokens"]}
    contexts = {"short_context": lengths["short"] + half, "long_context": lengths["long"] + half}
    return metric.label.format(**values, **contexts)


def _goal(verdict: Verdict, job: Row, entries: Mapping[str, Any]) -> dict[str, Any]:
    metric = next(one for one in METRICS if one.key == verdict.goal.metric)
    goal, stretch = words(verdict.goal)
    best = entries[verdict.peer] if verdict.peer else None
    return {
        "figure": label(metric, job),
        "ours": verdict.ours,
        "best_peer": None if best is None else best["label"],
        "best_peer_value": None if best is None else best[metric.key]["median"],
        "ratio": verdict.ratio,
        "share": verdict.share,
        "form": metric.form,
        "goal": goal,
        "met": verdict.met,
        "stretch": stretch,
        "stretch_met": verdict.stretch,
    }


def said(met: bool | None) -> str:
    """A verdict in words."""
    return "not measured" if met is None else "met" if met else "not met"


def cell(figure: Mapping[str, Any] | None, metric: Metric) -> str:
    """median (least-most) ×ratio, share."""
    if figure is None:
        return "–"
    text = format(figure["median"], metric.form)
    low, high = (format(figure[name], metric.form) for name in ("min", "max"))
    if low != high:
        text += f" ({low}–{high})"
    if "of_best_peer" in figure:
        text += f" ×{figure['of_best_peer']:.2f}"
    if "share" in figure:
        text += f", {100 * figure['share']:.0f} %"
    return text


def markdown(found: Mapping[str, Any]) -> str:
    """The document as a page."""
    job = found["job"]
    shown = [metric for metric in METRICS if any(metric.key in entry for entry in found["contenders"].values())]
    lines = [f"# {found['title']}: ours beside the peers, {found['date'][:10]}", "", f"Command: `{found['command']}`", ""]
    lines += [f"- Machine: {found['machine']}", f"- Commit: {found['commit']}", f"- {found['rounds']} rounds, {_pieces(found)}"]
    if found.get("warning"):
        lines += [f"- **{found['warning']}**"]
    lines += [
        f"- Limits, with all threads: {_limits(found['limits'])}.",
        "",
        "Each cell: median over the rounds (least–most), × how many times better than the best peer (above 1 is better), "
        "% of what the machine allows that contender: when decoding, the bytes of its weights and cache for a token at the "
        "read bandwidth; for a prompt and for vision, its matrix products and its attention, each at the peak of the arithmetic "
        "that it uses (below). No % where that is not known. "
        "– is what a contender does not have. Weights are random: these are speeds, not answers.",
        "",
        "| | " + " | ".join(label(metric, job) for metric in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for entry in found["contenders"].values():
        if "rounds" in entry:
            lines.append(f"| {entry['label']} | " + " | ".join(cell(entry.get(metric.key), metric) for metric in shown) + " |")
        elif "failed" in entry:
            lines.append(f"| {entry['label']} | {entry['failed']} |" + " |" * (len(shown) - 1))
    lines += ["", "## Goals", ""]
    if found["goals"]:
        lines += ["| | vlm-edge cpu-int4 | best peer | × | % of the limit | goal | | stretch | |", "|---" * 9 + "|"]
        lines += [_goal_line(goal) for goal in found["goals"]]
    else:
        lines += ["None are set for this model and picture."]
    lines += ["", "## Contenders", ""]
    for entry in found["contenders"].values():
        lines.append(f"- {entry['label']}: {_about(entry)}")
    return "\n".join(lines) + "\n"


def _goal_line(goal: Mapping[str, Any]) -> str:
    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    peer = "–" if goal["best_peer"] is None else f"{show(goal['best_peer_value'], goal['form'])} ({goal['best_peer']})"
    share = "–" if goal["share"] is None else f"{100 * goal['share']:.0f}"
    stretch = "" if not goal["stretch"] else said(goal["stretch_met"])
    parts = [goal["figure"], show(goal["ours"], goal["form"]), peer, show(goal["ratio"], ".2f"), share]
    return "| " + " | ".join([*parts, goal["goal"], said(goal["met"]), goal["stretch"], stretch]) + " |"


def _about(entry: Mapping[str, Any]) -> str:
    if "rounds" not in entry:
        return str(entry.get("failed", "not run"))
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    text = f"{versions}; {entry['note']}; {entry['token_bytes'] / 1e6:.1f} MB of weights a token. {_arithmetic(entry)}"
    if entry["disturbed"]:
        text += f" **Something else ran during {entry['disturbed']} of its {entry['rounds']} rounds.**"
    if entry["disk_mb"] > DISK_MB:
        text += f" **A process read up to {entry['disk_mb']:.0f} MB from the disk: its cold start waited for that.**"
    if entry.get("beyond"):
        names = ", ".join(next(one.key for one in METRICS if one.key == key) for key in entry["beyond"])
        text += f" Beyond the limit of that arithmetic, so no % is given: {names}."
    if "failed" in entry:
        text += f" Failed later: {entry['failed']}"
    return text


def _arithmetic(entry: Mapping[str, Any]) -> str:
    kinds = entry["arithmetic"]
    if not kinds:
        return "In what it multiplies was not asked."
    said_kinds = {name: kinds[name] or "unknown" for name in ("products", "attention", "vision", "vision_attention")}
    text = "Multiplies in {products} (attention {attention}), the picture in {vision} (attention {vision_attention})"
    return f"{text.format(**said_kinds)}: {kinds['known']}."


def _limits(limits: Mapping[str, Any]) -> str:
    words_of = {"read_gb_s": "reading {} GB/s", "int8_gop_s": "{} GOP/s in 8 bits", "bf16_gflop_s": "{} GFLOP/s in bfloat16"}
    words_of["fp32_gflop_s"] = "{} GFLOP/s in float32"
    found = []
    for name, text in words_of.items():
        limit = limits[name]
        if limit["best"] > 0:
            digits = ".1f" if name == "read_gb_s" else ".0f"
            found.append(text.format(format(limit["best"], digits)) + f" (least of {limit['times']}: {limit['least']:{digits}})")
    return ", ".join(found)


def _pieces(found: Mapping[str, Any]) -> str:
    """Whether the rounds are one run, and if not, of when and of which commits they are."""
    taken = [row for entry in found["contenders"].values() for row in entry.get("measured", ())]
    pieces, commits = ({row[name] for row in taken if row[name]} for name in ("piece", "commit"))
    if len(pieces) <= 1:
        return "interleaved."
    times = sorted(row["at"] for row in taken if row["at"])
    text = f"interleaved, in {len(pieces)} pieces between {times[0]} and {times[-1]}"
    return f"{text}." if len(commits) <= 1 else f"{text}; commits: {', '.join(sorted(commits))}."
