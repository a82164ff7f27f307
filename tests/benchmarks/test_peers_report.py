"""The bench of peers, on recorded rows: medians, ratios, shares of the limits, goals, and what the page says."""

from __future__ import annotations

import json

import pytest

from benchmarks.peers import report
from benchmarks.peers.contenders import CONTENDERS, chosen
from benchmarks.peers.environments import first_line
from benchmarks.peers.goals import GOALS, METRICS, Goal, fastest, judge, ratio_of
from benchmarks.peers.limits import Limits, best
from benchmarks.peers.shape import Shape
from benchmarks.peers.worker import arithmetic

SHAPE = Shape(30, 576, 9, 3, 64, 1536, 49280, vision_products=176.0e9, vision_attention=38.7e9)
LIMIT = Limits(read=32e9, int8=400e9, fp32=200e9, bf16=300e9)
INT8 = arithmetic("int8", "fp32", "int8", "fp32", "the test")
JOB = {"model": "256m", "tiles": 1, "lengths": {"short": 96, "long": 968, "longest": 1100}, "new_tokens": 64}
JOB |= {"image_tokens": 64, "other_tokens": 32}
HEAD = {
    "title": "T",
    "date": "2026-11-21T20:35:00+00:00",
    "command": "c",
    "commit": "abc",
    "machine": "m",
    "rounds": 3,
    "warning": None,
}
BY_KEY = {one.key: one for one in CONTENDERS}


def row(**changed):
    """One process of one contender."""
    known = {
        "vision_ms": 1000.0,
        "prefill_short_tps": 480.0,
        "prefill_longest_tps": 440.0,
        "ttft_s": 1.2,
        "decode_short_tps": 100.0,
    }
    known |= {"decode_long_tps": 80.0, "rss_mb": 400.0, "rss_long_mb": 450.0, "size_mb": 200.0, "cold_s": 2.0, "note": "n"}
    known |= {"token_bytes": 80e6, "kv_bytes": 2, "versions": {"p": "1"}, "other_cpu": 0.01, "steal": 0.0, "whole": True}
    known |= {"arithmetic": INT8, "disk_mb": 0.0, "at": "2026-11-21T20:00:00+00:00", "piece": "one", "commit": "abc"}
    return {**known, **changed}


def rows():
    """Three rounds of ours and of two peers."""
    ours = [
        row(decode_short_tps=value, vision_ms=500.0, turn_s=0.05, cold_s=0.9, rss_mb=300.0) for value in (250.0, 240.0, 260.0)
    ]
    llama = [row(decode_short_tps=value) for value in (110.0, 125.0, 120.0)]
    genai = [row(vision_ms=800.0, decode_short_tps=90.0, kv_bytes=4) for _ in range(3)]
    return {"ours-int4": ours, "llama.cpp-q4_0": llama, "ort-genai-int4": genai}


def document(taken, failed=()):
    those = [BY_KEY[key] for key in (*taken, *dict(failed))]
    return report.document(taken, those, dict(failed), [LIMIT], SHAPE, JOB, HEAD)


def goal(found, beginning):
    return next(each for each in found["goals"] if each["figure"].startswith(beginning))


def test_ratios_are_taken_of_medians_against_the_best_peer():
    found = document(rows())
    decode = found["contenders"]["ours-int4"]["decode_short_tps"]
    assert (decode["median"], decode["min"], decode["max"]) == (250, 240, 260)
    assert decode["of_best_peer"] == pytest.approx(250 / 120)  # llama.cpp's median, not its best
    vision = found["contenders"]["ours-int4"]["vision_ms"]
    assert vision["of_best_peer"] == pytest.approx(800 / 500)  # less is better, so the peer's stands above
    assert found["contenders"]["ort-genai-int4"]["vision_ms"]["of_best_peer"] == 1
    assert "of_best_peer" not in found["contenders"]["ours-int4"]["turn_s"]  # no peer has one


def test_a_decoded_token_is_held_against_the_bytes_it_reads():
    found = document(rows())["contenders"]
    cache = 2 * 30 * 3 * 64 * 128 * 2
    assert found["ours-int4"]["decode_short_tps"]["share"] == pytest.approx(250 * (80e6 + cache) / 32e9)
    wide = 2 * 30 * 3 * 64 * 128 * 4
    assert found["ort-genai-int4"]["decode_short_tps"]["share"] == pytest.approx(90 * (80e6 + wide) / 32e9)
    longer = 2 * 30 * 3 * 64 * 1000 * 2
    assert found["ours-int4"]["decode_long_tps"]["share"] == pytest.approx(80 * (80e6 + longer) / 32e9)


def test_a_prompt_and_a_tile_are_held_against_the_multipliers():
    found = document(rows())["contenders"]["ours-int4"]
    layers = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert SHAPE.layer_weights == layers == 106_168_320
    least = (2 * layers * 96 + 2 * 576 * 49280) / 400e9 + 2 * 96 * 97 * 576 * 30 / 200e9
    assert found["prefill_short_tps"]["share"] == pytest.approx(least / (96 / 480))
    slow = {"ours-int4": [row(vision_ms=2000.0)]}
    share = document(slow)["contenders"]["ours-int4"]["vision_ms"]["share"]
    assert share == pytest.approx((176e9 / 400e9 + 38.7e9 / 200e9) / 2)


def test_the_multipliers_limit_is_that_of_the_arithmetic_in_use():
    wide = arithmetic("bf16", "bf16", "bf16", "bf16", "the compiled model")
    found = document({"openvino-int4": [row(arithmetic=wide)]})
    assert found["contenders"]["openvino-int4"]["vision_ms"]["share"] == pytest.approx(176e9 / 300e9 + 38.7e9 / 300e9)
    page = report.markdown(found)
    assert "Multiplies in bf16 (attention bf16), the picture in bf16 (attention bf16): the compiled model." in page
    assert "300 GFLOP/s in bfloat16" in page


@pytest.mark.parametrize("kinds", [None, arithmetic(None, "fp32", None, "fp32", "nobody knows")])
def test_arithmetic_that_nobody_knows_has_no_share(kinds):
    found = document(
        {"transformers-bf16": [row(arithmetic=kinds)] if kinds else [{k: v for k, v in row().items() if k != "arithmetic"}]}
    )
    entry = found["contenders"]["transformers-bf16"]
    assert "share" not in entry["vision_ms"] and "share" not in entry["prefill_short_tps"]
    assert "share" in entry["decode_short_tps"]  # bytes are bytes
    assert "unknown" in report.markdown(found) or "was not asked" in report.markdown(found)


def test_arithmetic_whose_peak_is_not_measured_has_no_share():
    wide = arithmetic("bf16", "bf16", "bf16", "bf16", "k")
    taken = {"openvino-int4": [row(arithmetic=wide)]}
    limit = Limits(read=32e9, int8=400e9, fp32=200e9)  # a CPU without bfloat16
    found = report.document(taken, [BY_KEY["openvino-int4"]], {}, [limit], SHAPE, JOB, HEAD)
    assert "share" not in found["contenders"]["openvino-int4"]["vision_ms"]
    assert "bfloat16" not in report.markdown(found).split("##")[0].split("Limits")[1].split("\n")[0]


def test_more_than_the_limit_is_not_printed_as_a_share():
    found = document({"ours-int4": [row(vision_ms=400.0)]})  # 159 % of what 8 bits allow
    entry = found["contenders"]["ours-int4"]
    assert "share" not in entry["vision_ms"] and entry["beyond"] == ["vision_ms"]
    assert "Beyond the limit of that arithmetic, so no % is given: vision_ms." in report.markdown(found)


def test_figures_of_several_pieces_say_so():
    taken = {"ours-int4": [row(), row(piece="two", at="2026-11-21T21:00:00+00:00", commit="def")]}
    page = report.markdown(document(taken))
    assert "in 2 pieces between 2026-11-21T20:00:00+00:00 and 2026-11-21T21:00:00+00:00; commits: abc, def." in page


def test_a_cold_start_that_waited_for_the_disk_is_said():
    page = report.markdown(document({"ours-int4": [row(), row(disk_mb=250.0)]}))
    assert "read up to 250 MB from the disk" in page


def test_goals_are_computed():
    found = document(rows())
    decode = goal(found, "decode at 128")
    assert decode["met"] is True and decode["stretch_met"] is False  # 63 % of the limit, 80 % are the stretch
    assert goal(found, "vision")["met"] is True
    assert goal(found, "prefill, 96")["met"] is False  # as fast as the peers
    assert goal(found, "peak RSS")["met"] is True and goal(found, "peak RSS")["stretch_met"] is False
    slower = rows()
    slower["llama.cpp-q4_0"] = [row(decode_short_tps=130.0)] * 3
    assert goal(document(slower), "decode at 128")["met"] is False  # 1.92 ×


def test_a_goal_without_a_peer_is_not_measured_but_may_be_missed():
    ours_alone = {"ours-int4": rows()["ours-int4"]}
    found = document(ours_alone)
    assert goal(found, "decode at 128")["met"] is None and goal(found, "decode at 128")["best_peer"] is None
    ours_alone["ours-int4"] = [row(decode_short_tps=50.0)]
    assert goal(document(ours_alone), "decode at 128")["met"] is False  # 13 % of the limit already says so
    page = report.markdown(found)
    assert "not measured" in page


def test_the_goal_of_the_split_picture_is_another_run_s():
    assert {one.tiles for one in GOALS if one.metric == "ttft_s"} == {1, 17}
    assert not [each for each in document(rows())["goals"] if "17 tiles" in each["figure"]]


def test_a_peer_that_failed_is_said_and_never_estimated():
    found = document(rows(), [("openvino-int4", "openvino_genai cannot be installed: ERROR: No matching distribution")])
    entry = found["contenders"]["openvino-int4"]
    assert set(entry) == {"label", "ours", "failed"}
    line = next(line for line in report.markdown(found).splitlines() if line.startswith("| OpenVINO int4"))
    assert "No matching distribution" in line and not any(character.isdigit() for character in line.replace("int4", ""))


def test_the_page_says_what_was_run_and_what_disturbed_it():
    taken = rows()
    taken["llama.cpp-q4_0"][1]["other_cpu"] = 0.5
    taken["ours-int4"] = [row(vision_ms=700.0)]
    page = report.markdown({**document(taken), "warning": "Taken on a busy machine: …"})
    assert "Command: `c`" in page and "32.0 GB/s" in page and "Taken on a busy machine" in page
    assert "Something else ran during 1 of its 3 rounds" in page
    assert "| vlm-edge cpu-int4 | 700 ×1.14, 90 % |" in page  # cells: median, ratio, share


def test_a_figure_that_one_round_lacks_is_left_out():
    taken = {"ours-int4": [row(), row()]}
    del taken["ours-int4"][1]["ttft_s"]
    assert "ttft_s" not in report.medians(taken)["ours-int4"]


def test_limits_are_the_best_of_the_rounds():
    assert best([Limits(1, 5, 3, 7), Limits(2, 4, 3, 8)]) == Limits(2, 5, 3, 8)
    assert LIMIT.peak("bf16") == 300e9 and LIMIT.peak(None) is None and Limits(1, 2, 3).peak("bf16") is None


def test_the_best_peer_and_its_ratio():
    metric = next(one for one in METRICS if one.key == "cold_s")
    assert fastest(metric, {"ours-int4": {"cold_s": 1.0}, "a": {"cold_s": 3.0}, "b": {"cold_s": 2.0}, "c": {}}) == "b"
    assert ratio_of(metric, 1.0, 2.0) == 2
    verdict = judge(Goal("cold_s", ("256m",), 1, ratio=2), {"ours-int4": {"cold_s": 1.0}, "b": {"cold_s": 2.0}}, {}, 0)
    assert verdict.met and verdict.stretch is None


def test_contenders_are_chosen_by_the_beginning_of_their_key():
    assert [one.key for one in chosen("ours,llama.cpp-q4")] == ["ours-int4", "llama.cpp-q4_0", "ours-int8", "ours-fp32"]
    with pytest.raises(ValueError, match="no contender begins with 'vllm'"):
        chosen("vllm")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("Looking…\nERROR: No matching distribution found for x\nERROR: more\n", "ERROR: No matching distribution found for x"),
        ("Traceback\n  File 'a'\nKeyError: 'b|c'\n", "KeyError: 'b/c'"),
        ("just this\n", "just this"),
        ("", "exit code 3"),
    ],
)
def test_a_failure_is_one_line(output, said):
    assert first_line(output, "exit code 3") == said


def test_the_document_is_json_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.peers.plot import draw

    found = json.loads(json.dumps(document(rows(), [("openvino-int4", "no")])))
    draw(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_shows_medians_and_verdicts():
    import io

    from rich.console import Console

    from benchmarks.peers.show import show

    console = Console(file=io.StringIO(), width=160)
    show(document(rows(), [("openvino-int4", "cannot be installed: ERROR: no")]), console)
    page = console.file.getvalue()
    assert "vlm-edge cpu-int4" in page and "250.0" in page and "cannot be installed" in page
    assert "not met" in page and "≥ 2 × the best peer" in page
