"""The journal of the bench of peers: runs that go on, rows that no longer count, lines that were never finished."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.peers.journal import Journal, fingerprint
from benchmarks.peers.limits import Limits


def test_a_journal_goes_on_only_with_the_same_settings(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"runs": 2}, resume=False)
    journal.add(0, "limits", {"read": 1.0, "int8": 2.0, "fp32": 3.0})
    journal.add(0, "ours-int4", {"ttft_s": 1.0})
    again = Journal(path, {"runs": 2}, resume=True)
    assert again.has(0, "ours-int4") and not again.has(1, "ours-int4")
    assert again.limits()[0].int8 == 2.0
    other = Journal(path, {"runs": 3}, resume=True)
    assert not other.rows
    other.add(0, "ours-int4", {"ttft_s": 2.0})
    assert len(Journal(path, {"runs": 2}, resume=True).rows) == 2  # nobody's rows are lost
    Journal(path, {"runs": 2}, resume=False)
    assert not path.read_text()


def test_files_that_are_made_anew_are_measured_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"old")
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    journal.add(0, "ours-int4", {"measured": [str(file)], "artefact": fingerprint([str(file)])})
    assert journal.has(0, "ours-int4")
    file.write_bytes(b"newer")
    assert not journal.has(0, "ours-int4")


def test_rows_of_other_files_are_left_out(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before = fingerprint([str(tmp_path)])
    file.write_bytes(b"other")
    after = fingerprint([str(tmp_path)])
    assert before != after
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    journal.add(0, "a", {"artefact": before})
    journal.add(1, "a", {"artefact": before})
    journal.add(0, "b", {"artefact": before})
    journal.add(0, "a", {"artefact": after})
    assert [row["artefact"] for row in journal.of("a")] == [after] and journal.of("b")
    assert journal.has(0, "a") and not journal.has(1, "a")  # round 1 is measured again


def test_rows_of_other_prompts_are_left_out(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    journal.add(0, "a", {"ttft_s": 1.0})  # an older journal does not know its prompts
    journal.scenario = "one"
    journal.add(0, "b", {"ttft_s": 1.0})
    assert journal.has(0, "a") and journal.has(0, "b") and journal.others() == 0
    journal.scenario = "two"
    assert journal.has(0, "a") and not journal.has(0, "b") and not journal.of("b") and journal.others() == 1


def test_lines_that_were_never_finished_are_left_out_with_a_note(tmp_path):
    path = tmp_path / "journal.jsonl"
    for number in range(2):
        Journal(path, {}, resume=bool(number)).add(number, "a", {"ttft_s": 1.0})
    path.write_text(path.read_text()[:-20])  # interrupted while writing
    again = Journal(path, {}, resume=True)
    assert [row["round"] for row in again.of("a")] == [0] and not again.has(1, "a")
    assert len(again.notes) == 1 and "line 2 of" in again.notes[0] and "is left out" in again.notes[0]
    again.add(1, "a", {"ttft_s": 2.0})
    last = Journal(path, {}, resume=True)
    assert [row["ttft_s"] for row in last.of("a")] == [1.0, 2.0] and len(last.notes) == 1
    path.write_text('[1]\n{"key": "a"}\n')
    assert Journal(path, {}, resume=True).rows == [] and len(Journal(path, {}, resume=True).notes) == 2


def test_limits_are_those_of_rounds_and_those_beside_processes(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    assert journal.limits() == []
    journal.add(0, "limits", {"read": 1.0, "int8": 2.0, "fp32": 3.0})
    journal.add(0, "a", {"limits": [asdict(Limits(4.0, 5.0, 6.0)), asdict(Limits(7.0, 8.0, 9.0, 10.0))]})
    assert journal.limits() == [Limits(1.0, 2.0, 3.0), Limits(4.0, 5.0, 6.0), Limits(7.0, 8.0, 9.0, 10.0)]
