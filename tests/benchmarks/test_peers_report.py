"""The bench of peers, on recorded rows: medians, ratios, shares of the limits, goals, and what the page says."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks.peers import report
from benchmarks.peers.contenders import CONTENDERS, chosen
from benchmarks.peers.environments import first_line
from benchmarks.peers.goals import GOALS, METRICS, Goal, fastest, judge, ratio_of
from benchmarks.peers.limits import Limits, best
from benchmarks.peers.paired import figures, hardest, ratios
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


def beside(before, after=LIMIT):
    """Readings before and after a process."""
    return [asdict(before), asdict(after)]


def document(taken, failed=(), seen=(LIMIT,)):
    """Each contender's rows are its rounds, in order, unless they say otherwise."""
    those = [BY_KEY[key] for key in (*taken, *dict(failed))]
    numbered = {key: [{"round": number, **each} for number, each in enumerate(own)] for key, own in taken.items()}
    return report.document(numbered, those, dict(failed), seen, SHAPE, JOB, HEAD)


def goal(found, beginning):
    return next(each for each in found["goals"] if each["figure"].startswith(beginning))


def test_a_ratio_is_taken_in_each_round_against_the_best_peer():
    found = document(rows())
    decode = found["contenders"]["ours-int4"]["decode_short_tps"]
    assert (decode["median"], decode["min"], decode["max"]) == (250, 240, 260)
    each = sorted([250 / 110, 240 / 125, 260 / 120])  # llama.cpp's, whose median is the best, round by round
    assert decode["of_best_peer"] == pytest.approx({"median": each[1], "min": each[0], "max": each[2], "rounds": 3})
    vision = found["contenders"]["ours-int4"]["vision_ms"]
    assert vision["of_best_peer"]["median"] == pytest.approx(800 / 500)  # less is better, so the peer's stands above
    assert found["contenders"]["ort-genai-int4"]["vision_ms"]["of_best_peer"] == {"median": 1, "min": 1, "max": 1, "rounds": 3}
    assert "of_best_peer" not in found["contenders"]["ours-int4"]["turn_s"]  # no peer has one
    assert "the same round" in found["definitions"]["of_best_peer"]


def test_a_machine_that_changes_its_speed_changes_neither_ratio_nor_share():
    """Three rounds at full, half and a third of the speed: figures vary threefold, what is said of them does not."""
    speeds = (1.0, 0.5, 1 / 3)
    limits = [Limits(*(getattr(LIMIT, name) * speed for name in ("read", "int8", "fp32", "bf16"))) for speed in speeds]
    near = [beside(limit, limit) for limit in limits]
    ours = [row(decode_short_tps=240 * v, vision_ms=700 / v, limits=n) for v, n in zip(speeds, near, strict=True)]
    peer = [row(decode_short_tps=120 * v, vision_ms=1050 / v, limits=n) for v, n in zip(speeds, near, strict=True)]
    found = document({"ours-int4": ours, "llama.cpp-q4_0": peer}, seen=limits)["contenders"]["ours-int4"]
    for metric, ratio in (("decode_short_tps", 2.0), ("vision_ms", 1.5)):
        assert found[metric]["max"] == pytest.approx(3 * found[metric]["min"])
        assert found[metric]["of_best_peer"] == pytest.approx({"median": ratio, "min": ratio, "max": ratio, "rounds": 3})
        assert found[metric]["share"]["min"] == pytest.approx(found[metric]["share"]["max"])
    # The peer was measured in the fast rounds alone: medians would say 1, since ours has slow rounds among its own.
    found = document({"ours-int4": ours, "llama.cpp-q4_0": peer[:1]})["contenders"]["ours-int4"]["decode_short_tps"]
    assert found["of_best_peer"] == pytest.approx({"median": 2, "min": 2, "max": 2, "rounds": 1}) and found["median"] == 120


def test_rounds_that_were_not_shared_give_no_ratio():
    found = document({"ours-int4": [row()], "llama.cpp-q4_0": [row(round=1)]})
    assert "of_best_peer" not in found["contenders"]["ours-int4"]["decode_short_tps"]
    assert goal(found, "vision")["ratio"] is None and goal(found, "vision")["met"] is None
    late = row(at="2026-11-21T20:05:00+00:00")
    assert "ended at most 300 s apart" in report.markdown(document({"ours-int4": [row()], "llama.cpp-q4_0": [late]}))


def at(minutes, **changed):
    return row(at=f"2026-11-21T{20 + minutes // 60}:{minutes % 60:02}:00+00:00", **changed)


def test_rounds_of_one_number_that_lie_hours_apart_are_no_pair():
    """Ours was built anew and measured again two hours later, when the machine was twice as fast; but for the last round."""
    ours = [at(120, decode_short_tps=400.0), at(121, decode_short_tps=400.0), at(62, decode_short_tps=220.0)]
    llama = [at(0, decode_short_tps=100.0), at(1, decode_short_tps=100.0), at(32, decode_short_tps=110.0)]
    found = document({"ours-int4": ours, "llama.cpp-q4_0": llama})
    decode = found["contenders"]["ours-int4"]["decode_short_tps"]
    assert decode["of_best_peer"] == pytest.approx({"median": 2, "min": 2, "max": 2, "rounds": 1})
    assert goal(found, "decode at 128")["ratio"]["median"] == pytest.approx(2) and found["apart_s"] == 1800
    assert found["too_far_apart"] == 2
    assert "**2 pairs of the same round that ended more than 30 minutes apart are left out" in report.markdown(found)
    ours[2] = at(63)  # a minute too far: nothing is left to be compared
    found = document({"ours-int4": ours, "llama.cpp-q4_0": llama})
    assert "of_best_peer" not in found["contenders"]["ours-int4"]["decode_short_tps"] and found["too_far_apart"] == 3
    assert goal(found, "vision")["ratio"] is None and goal(found, "vision")["met"] is None
    near = document(rows())
    assert near["too_far_apart"] == 0 and "left out of the ratios" not in report.markdown(near)


def test_the_best_peer_is_the_one_over_which_ours_is_the_least_better():
    """The machine slowed down: llama.cpp was measured in the fast rounds too, OpenVINO in the slow one alone."""
    ours = [row(round=number, decode_short_tps=value) for number, value in enumerate((300.0, 300.0, 100.0))]
    llama = [row(round=number, decode_short_tps=value) for number, value in enumerate((120.0, 120.0, 40.0))]
    taken = {"ours-int4": ours, "llama.cpp-q4_0": llama, "openvino-int4": [row(round=2, decode_short_tps=80.0)]}
    found = document(taken)
    decode = goal(found, "decode at 128")
    assert decode["best_peer"] == BY_KEY["openvino-int4"].label and decode["best_peer_value"] == 80  # llama.cpp's median is 120
    assert decode["ratio"]["median"] == pytest.approx(1.25) and decode["met"] is False  # 2.5 over llama.cpp
    assert found["contenders"]["openvino-int4"]["decode_short_tps"]["of_best_peer"]["median"] == 1
    assert found["contenders"]["llama.cpp-q4_0"]["decode_short_tps"]["of_best_peer"]["median"] == pytest.approx(0.5)
    # A better peer that shares no round with ours: rather no ratio than one over a slower peer.
    taken["openvino-int4"] = [row(round=5, decode_short_tps=200.0)]
    decode = goal(document(taken), "decode at 128")
    assert decode["best_peer"] == BY_KEY["openvino-int4"].label and decode["ratio"] is None and decode["met"] is None


def test_without_ours_the_best_peer_is_the_one_with_the_best_median():
    metric = next(one for one in METRICS if one.key == "ttft_s")
    peers = {"a": [row(round=0, ttft_s=2.0)], "b": [row(round=0, ttft_s=1.0)]}
    assert hardest(metric, peers, {"a": {"ttft_s": 2.0}, "b": {"ttft_s": 1.0}}) == "b"
    assert hardest(metric, {}, {}) is None and ratios(metric, peers["a"], []) is None


def test_the_page_says_what_a_short_reading_of_the_limits_flatters():
    found = document(rows())
    assert "each reading lasts 0.3 s" in found["definitions"]["limits"]
    assert "a share of the bandwidth would be some 4 % of itself smaller" in report.markdown(found)


def test_a_share_is_of_the_better_of_the_two_readings_beside_that_process():
    half = Limits(read=16e9, int8=200e9, fp32=100e9, bf16=150e9)
    faster = Limits(read=64e9, int8=800e9, fp32=400e9, bf16=600e9)
    read = 80e6 + 2 * 30 * 3 * 64 * 128 * 2
    own = [row(decode_short_tps=200.0, limits=near) for near in (beside(half), beside(LIMIT, half), beside(LIMIT))]
    found = document({"ours-int4": own}, seen=[faster])  # what was seen elsewhere does not count
    share = found["contenders"]["ours-int4"]["decode_short_tps"]["share"]
    assert share == pytest.approx({"median": 200 * read / 32e9, "min": 200 * read / 32e9, "max": 200 * read / 32e9, "rounds": 3})
    mixed = Limits(read=16e9, int8=800e9, fp32=200e9)  # of each limit the better one
    products = document({"ours-int4": [row(vision_ms=1000.0, limits=beside(mixed))]})["contenders"]["ours-int4"]["vision_ms"]
    assert products["share"]["median"] == pytest.approx(176 / 800 + 38.7 / 200)
    page = report.markdown(found)
    assert "beside each process the limits were read twice" in page and "directly before and after that process" in page


def test_an_older_journal_without_readings_says_that_it_is_the_old_way():
    faster = Limits(read=64e9, int8=800e9, fp32=400e9)
    found = document({"ours-int4": [row(), row()]}, seen=[LIMIT, faster])
    read = 80e6 + 2 * 30 * 3 * 64 * 128 * 2
    assert found["contenders"]["ours-int4"]["decode_short_tps"]["share"]["median"] == pytest.approx(100 * read / 64e9)
    assert "2 of 2 processes have no readings of the limits beside them" in report.markdown(found)


def test_nothing_measured_is_a_page_too():
    found = document({}, [("ours-int4", "cannot be prepared")], seen=())
    page = report.markdown(found)
    assert found["limits"] == {} and "Limits, with all threads: not measured." in page and "cannot be prepared" in page
    unknown = document({"ours-int4": [row()]}, seen=())["contenders"]["ours-int4"]
    assert "share" not in unknown["decode_short_tps"] and unknown["decode_short_tps"]["median"] == 100


def test_one_round_beyond_the_limit_counts_but_a_median_beyond_it_is_no_share():
    slow = Limits(read=5e9, int8=400e9, fp32=200e9)
    own = [row(limits=beside(limit, limit)) for limit in (LIMIT, LIMIT, slow)]
    share = document({"ours-int4": own})["contenders"]["ours-int4"]["decode_short_tps"]["share"]
    assert share["median"] < 0.4 and share["max"] > 1.5
    own = [row(limits=beside(limit, limit)) for limit in (LIMIT, slow, slow)]
    entry = document({"ours-int4": own})["contenders"]["ours-int4"]
    assert "share" not in entry["decode_short_tps"] and "decode_short_tps" in entry["beyond"]


def test_a_decoded_token_is_held_against_the_bytes_it_reads():
    found = document(rows())["contenders"]
    cache = 2 * 30 * 3 * 64 * 128 * 2
    assert found["ours-int4"]["decode_short_tps"]["share"]["median"] == pytest.approx(250 * (80e6 + cache) / 32e9)
    wide = 2 * 30 * 3 * 64 * 128 * 4
    assert found["ort-genai-int4"]["decode_short_tps"]["share"]["median"] == pytest.approx(90 * (80e6 + wide) / 32e9)
    longer = 2 * 30 * 3 * 64 * 1000 * 2
    assert found["ours-int4"]["decode_long_tps"]["share"]["median"] == pytest.approx(80 * (80e6 + longer) / 32e9)


def test_a_prompt_and_a_tile_are_held_against_the_multipliers():
    found = document(rows())["contenders"]["ours-int4"]
    layers = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert SHAPE.layer_weights == layers == 106_168_320
    least = (2 * layers * 96 + 2 * 576 * 49280) / 400e9 + 2 * 96 * 97 * 576 * 30 / 200e9
    assert found["prefill_short_tps"]["share"]["median"] == pytest.approx(least / (96 / 480))
    slow = {"ours-int4": [row(vision_ms=2000.0)]}
    share = document(slow)["contenders"]["ours-int4"]["vision_ms"]["share"]["median"]
    assert share == pytest.approx((176e9 / 400e9 + 38.7e9 / 200e9) / 2)


def test_the_multipliers_limit_is_that_of_the_arithmetic_in_use():
    wide = arithmetic("bf16", "bf16", "bf16", "bf16", "the compiled model")
    found = document({"openvino-int4": [row(arithmetic=wide)]})
    assert found["contenders"]["openvino-int4"]["vision_ms"]["share"]["median"] == pytest.approx(176e9 / 300e9 + 38.7e9 / 300e9)
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
    limit = Limits(read=32e9, int8=400e9, fp32=200e9)  # a CPU without bfloat16
    found = document({"openvino-int4": [row(arithmetic=wide)]}, seen=[limit])
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


def test_a_cold_start_that_waited_for_the_disk_is_left_out_and_said():
    found = document({"ours-int4": [row(cold_s=9.0, cold_disk_mb=250.0), row(), row(cold_s=2.2, cold_disk_mb=9.0)]})
    assert found["contenders"]["ours-int4"]["cold_s"]["median"] == pytest.approx(2.1)
    slow = document({"openvino-int4": [row(cold_s=20.0, cold_disk_mb=50.0)]})["contenders"]["openvino-int4"]
    assert slow["cold_waited"] == 0  # 0.25 s at 200 MB/s
    assert found["contenders"]["ours-int4"]["ttft_s"]["rounds"] == 3  # by then everything had been read
    assert "1 of its 3 cold starts waited for up to 250 MB from the disk: those are not counted" in report.markdown(found)
    peer = {"llama.cpp-q4_0": [row(cold_s=4.0), row(cold_s=4.0, disk_mb=99.0)]}  # an older row knows its whole process alone
    ours = {"ours-int4": [row(cold_s=9.0, cold_disk_mb=250.0), row(cold_s=1.0, cold_disk_mb=0.0, disk_mb=99.0)]}
    found = document({**ours, **peer})["contenders"]["ours-int4"]["cold_s"]
    assert found["median"] == 1 and "of_best_peer" not in found  # no round has both
    always = document({"ours-int4": [row(cold_s=9.0, cold_disk_mb=250.0)]})
    assert always["contenders"]["ours-int4"]["cold_s"]["median"] == 9 and "all did, so they count" in report.markdown(always)


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
    drifting = rows()
    drifting["llama.cpp-q4_0"] = [row(decode_short_tps=value) for value in (110.0, 130.0, 126.0)]
    assert goal(document(drifting), "decode at 128")["met"] is True  # 250 / 126 of the medians, 260 / 126 in the rounds
    drifting["llama.cpp-q4_0"] = [row(decode_short_tps=value) for value in (126.0, 125.0, 120.0)]
    assert goal(document(drifting), "decode at 128")["met"] is False  # 250 / 125 of the medians, 250 / 126 in the rounds


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
    taken = {"ours-int4": [row(round=0), row(round=1)]}
    del taken["ours-int4"][1]["ttft_s"]
    assert "ttft_s" not in figures(taken)["ours-int4"] and "vision_ms" in figures(taken)["ours-int4"]


def test_limits_are_the_best_of_readings():
    assert best([Limits(1, 5, 3, 7), Limits(2, 4, 3, 8)]) == Limits(2, 5, 3, 8)
    assert best([]) is None
    assert LIMIT.peak("bf16") == 300e9 and LIMIT.peak(None) is None and Limits(1, 2, 3).peak("bf16") is None


def test_the_best_peer_and_its_ratio():
    metric = next(one for one in METRICS if one.key == "cold_s")
    assert fastest(metric, {"ours-int4": {"cold_s": 1.0}, "a": {"cold_s": 3.0}, "b": {"cold_s": 2.0}, "c": {}}) == "b"
    assert ratio_of(metric, 1.0, 2.0) == 2
    medians, peers = {"ours-int4": {"cold_s": 1.0}, "b": {"cold_s": 2.0}}, {"cold_s": "b"}
    verdict = judge(Goal("cold_s", ("256m",), 1, ratio=2), medians, peers, {"cold_s": 2.0}, {}, 0)
    assert verdict.met and verdict.stretch is None and verdict.peer == "b"
    assert judge(Goal("cold_s", ("256m",), 1, ratio=2), medians, peers, {"cold_s": 1.9}, {}, 0).met is False  # not the medians'


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
