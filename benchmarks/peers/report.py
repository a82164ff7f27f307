"""From the journal's rows to a document (JSON), and from that to Markdown. What is compared with what: paired.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .contenders import Contender
from .goals import GOALS, METRICS, OURS, Metric, Verdict, is_peer, judge, words
from .limits import READING, Limits, best
from .paired import (
    APART_S,
    OLD_SHARE,
    RATIO,
    SHARE,
    Spread,
    apart_s,
    counted,
    far,
    figures,
    hardest,
    limit_of,
    ratios,
    readings,
    spread,
    start_mb,
    waited,
)
from .rounds import QUIET_SHARE
from .shape import Shape

Row = Mapping[str, Any]


MOST = 1.02
"""A share beyond this is no share: that contender is not bound by what was taken for its limit. None is printed then."""
LIMITS = {"read_gb_s": "read", "int8_gop_s": "int8", "bf16_gflop_s": "bf16", "fp32_gflop_s": "fp32"}


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


def shares_of(metric: Metric, rows: Sequence[Row], shape: Shape, otherwise: Limits | None, job: Row) -> Spread | None:
    """The rounds' shares; `otherwise`: the limits for rows of an older journal. None where a round has no share."""
    found: list[float] = []
    for row in counted(rows, metric.key).values():
        limit = limit_of(row, otherwise)
        share = None if limit is None else share_of(metric, row[metric.key], row, shape, limit, job)
        if share is None:
            return None
        found.append(share)
    return spread(found)


def document(
    rows: Mapping[str, Sequence[Row]],
    contenders: Sequence[Contender],
    failed: Mapping[str, str],
    seen: Sequence[Limits],
    shape: Shape,
    job: Row,
    head: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is known, as JSON takes it. `job`: lengths, new_tokens, tiles, image_tokens, other_tokens, model; `seen`:

    all readings of the limits.
    """
    taken, otherwise = figures(rows), best(seen)
    middle = {key: {name: figure.median for name, figure in own.items()} for key, own in taken.items()}
    entries: dict[str, Any] = {}
    chosen = {metric.key: hardest(metric, rows, middle) for metric in METRICS}
    peers = {name: key for name, key in chosen.items() if key is not None}
    held = {(OURS, key) for key in middle if is_peer(key)}  # whose ratios are looked at
    apart = 0.0
    for one in contenders:
        own = rows.get(one.key, ())
        entry: dict[str, Any] = {"label": one.label, "ours": one.ours}
        if one.key in failed:
            entry["failed"] = failed[one.key]
        if own:
            for metric in METRICS:
                if metric.key not in taken[one.key]:
                    continue
                figure: dict[str, Any] = asdict(taken[one.key][metric.key])
                share = shares_of(metric, own, shape, otherwise, job)
                if share is not None and share.median > MOST:
                    entry.setdefault("beyond", []).append(metric.key)
                elif share is not None:
                    figure["share"] = asdict(share)
                peer = peers.get(metric.key)
                ratio = None if peer is None else ratios(metric, own, rows[peer])
                if peer is not None and (peer, one.key) not in held:  # of two peers once
                    held.add((one.key, peer))
                if peer is not None and ratio is not None:
                    figure["of_best_peer"] = asdict(ratio)
                    apart = max(apart, apart_s(metric, own, rows[peer]))
                entry[metric.key] = figure
            entry |= _facts(own)
        entries[one.key] = entry
    cache = (
        shape.cache_bytes(job["image_tokens"] + job["other_tokens"], rows[OURS][-1]["kv_bytes"]) / 1e6 if rows.get(OURS) else 0.0
    )
    mine = {name: entries.get(OURS, {}).get(name, {}) for name in middle.get(OURS, {})}
    against, part = (
        {name: figure[what]["median"] for name, figure in mine.items() if what in figure} for what in ("of_best_peer", "share")
    )
    goals = [
        judge(goal, middle, peers, against, part, cache)
        for goal in GOALS
        if job["model"] in goal.models and goal.tiles == job["tiles"]
    ]
    processes = [row for own in rows.values() for row in own]
    return {
        **head,
        "job": dict(job),
        "definitions": {
            "of_best_peer": RATIO,
            "share": f"{SHARE}; {OLD_SHARE}",
            "limits": READING,
            "goals": "judged by these medians",
        },
        "processes": len(processes),
        "without_readings": sum(not readings(row) for row in processes),
        "apart_s": apart,
        "too_far_apart": sum(len(far(rows.get(first, ()), rows.get(second, ()))) for first, second in held),
        "limits": {
            name: {
                "best": getattr(otherwise, one) / 1e9,
                "least": min(getattr(each, one) for each in seen) / 1e9,
                "times": len(seen),
            }
            for name, one in LIMITS.items()
            if otherwise is not None
        },
        "contenders": entries,
        "goals": [_goal(verdict, job, entries) for verdict in goals],
    }


def _facts(own: Sequence[Row]) -> dict[str, Any]:
    """What is known of a contender beside its figures."""
    last = own[-1]
    kept = ("round", "at", "piece", "commit", "wall_s", "other_cpu", "limits")
    return {
        "rounds": len(own),
        "disturbed": sum(disturbed(row) for row in own),
        "disk_mb": max(start_mb(row) for row in own),
        "cold_waited": sum(waited(row) for row in own if "cold_s" in row),
        "arithmetic": last.get("arithmetic"),
        **{name: last[name] for name in ("versions", "note", "token_bytes", "kv_bytes")},
        "measured": [{name: row.get(name) for name in kept} for row in own],
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
        "ratio": _part(entries, metric, "of_best_peer"),
        "share": _part(entries, metric, "share"),
        "form": metric.form,
        "goal": goal,
        "met": verdict.met,
        "stretch": stretch,
        "stretch_met": verdict.stretch,
    }


def _part(entries: Mapping[str, Any], metric: Metric, what: str) -> dict[str, float] | None:
    found: dict[str, float] | None = entries.get(OURS, {}).get(metric.key, {}).get(what)
    return found


def said(met: bool | None) -> str:
    """A verdict in words."""
    return "not measured" if met is None else "met" if met else "not met"


def span(figure: Mapping[str, float], form: str, times: float = 1.0) -> str:
    """median (least–most); the median alone where all are printed alike."""
    text, low, high = (format(times * figure[name], form) for name in ("median", "min", "max"))
    return text if low == high else f"{text} ({low}–{high})"


def cell(figure: Mapping[str, Any] | None, metric: Metric) -> str:
    """median (least–most) ×ratio (least–most), share (least–most)."""
    if figure is None:
        return "–"
    text = span(figure, metric.form)
    if "of_best_peer" in figure:
        text += f" ×{span(figure['of_best_peer'], '.2f')}"
    if "share" in figure:
        text += f", {span(figure['share'], '.0f', 100)} %"
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
        f"- {_pairs(found)}",
        "",
        "Each cell: median over the rounds (least–most), × how many times better than the best peer, % of what the machine "
        f"allows that contender. ×: {RATIO} (least–most). %: {SHARE} (least–most); goals are judged by these. What the machine "
        "allows: when decoding, the bytes of its weights and cache for a token at the read bandwidth; for a prompt and for "
        "vision, its matrix products and its attention, each at the peak of the arithmetic that it uses (below). No % where that "
        f"is not known, or where it would be more than {100 * MOST:.0f}; a single round may be beyond, where the machine was "
        f"faster during the process than beside it. Of the limits: {READING}. "
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
    ratio = "–" if goal["ratio"] is None else span(goal["ratio"], ".2f")
    share = "–" if goal["share"] is None else span(goal["share"], ".0f", 100)
    stretch = "" if not goal["stretch"] else said(goal["stretch_met"])
    parts = [goal["figure"], show(goal["ours"], goal["form"]), peer, ratio, share]
    return "| " + " | ".join([*parts, goal["goal"], said(goal["met"]), goal["stretch"], stretch]) + " |"


def _about(entry: Mapping[str, Any]) -> str:
    if "rounds" not in entry:
        return str(entry.get("failed", "not run"))
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    text = f"{versions}; {entry['note']}; {entry['token_bytes'] / 1e6:.1f} MB of weights a token. {_arithmetic(entry)}"
    if entry["disturbed"]:
        text += f" **Something else ran during {entry['disturbed']} of its {entry['rounds']} rounds.**"
    if entry["cold_waited"]:
        count = entry["cold_waited"]
        kept = "those are not counted" if count < entry["rounds"] else "all did, so they count"
        text += (
            f" **{count} of its {entry['rounds']} cold starts waited for up to {entry['disk_mb']:.0f} MB from the disk: {kept}.**"
        )
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
        limit = limits.get(name, {"best": 0.0})
        if limit["best"] > 0:
            digits = ".1f" if name == "read_gb_s" else ".0f"
            found.append(text.format(format(limit["best"], digits)) + f" (least of {limit['times']}: {limit['least']:{digits}})")
    return ", ".join(found) or "not measured"


def _pairs(found: Mapping[str, Any]) -> str:
    """How near in time are the figures that are held against each other."""
    text = f"The two processes of a ratio ended at most {found['apart_s']:.0f} s apart; "
    if found["too_far_apart"]:
        text += (
            f"**{found['too_far_apart']} pairs of the same round that ended more than {APART_S / 60:.0f} minutes apart are left "
            "out of the ratios**; "
        )
    old, count = found["without_readings"], found["processes"]
    if not old:
        return f"{text}beside each process the limits were read twice, before and after."
    return f"{text}**{old} of {count} processes have no readings of the limits beside them: {OLD_SHARE}.**"


def _pieces(found: Mapping[str, Any]) -> str:
    """Whether the rounds are one run, and if not, of when and of which commits they are."""
    taken = [row for entry in found["contenders"].values() for row in entry.get("measured", ())]
    pieces, commits = ({row[name] for row in taken if row[name]} for name in ("piece", "commit"))
    if len(pieces) <= 1:
        return "interleaved."
    times = sorted(row["at"] for row in taken if row["at"])
    text = f"interleaved, in {len(pieces)} pieces between {times[0]} and {times[-1]}"
    return f"{text}." if len(commits) <= 1 else f"{text}; commits: {', '.join(sorted(commits))}."
