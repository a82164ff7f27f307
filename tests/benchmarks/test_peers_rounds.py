"""The bench of peers, around the measuring: turns, the journal, quietness, environments, shapes, and small real runs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import click
import click.testing
import pytest
from safetensors import safe_open

from benchmarks.peers import __main__ as command
from benchmarks.peers import environments, limits, models, rounds, scenario, shape, starts, worker
from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.journal import Journal
from benchmarks.peers.prepare import prepared

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny-smolvlm"


def test_contenders_take_turns_and_each_round_begins_with_another():
    turns = list(rounds.in_turn(CONTENDERS[:3], 3))
    assert [number for number, _ in turns] == [0] * 3 + [1] * 3 + [2] * 3
    first = [next(one.key for number, one in turns if number == each) for each in range(3)]
    assert len(set(first)) == 3
    assert all(len({one.key for number, one in turns if number == each}) == 3 for each in range(3))
    assert len(list(rounds.in_turn(CONTENDERS[:1], 2))) == 2 and not list(rounds.in_turn((), 2))


@pytest.mark.parametrize("size", [2, 3, 4, 7, 12])
def test_each_follows_each_other_one_equally_often(size):
    count = size if size % 2 == 0 else 2 * size
    turns = list(rounds.in_turn(CONTENDERS[:size], count))
    orders = [[one.key for number, one in turns if number == each] for each in range(count)]
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(pairs) == size * (size - 1) and set(pairs.values()) == {count // size}


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(rounds, "used_cores", lambda: 1.5)
    assert "others use 1.50 of 2 cores" in str(rounds.busy(2))
    done = click.testing.CliRunner().invoke(command.main, ["--model", str(TINY), "--only", "ours-int4"])
    assert done.exit_code == 1 and "--busy" in done.output and "others use" in done.output
    monkeypatch.setattr(rounds, "used_cores", lambda: 0.1)
    assert rounds.busy(2) is None


def test_an_uninstallable_peer_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    wanted = tmp_path / "peer.txt"
    wanted.write_text("nobody-has-ever-written-this==1.0\n")
    with pytest.raises(environments.PeerError, match=r"peer cannot be installed: ERROR: .*nobody-has-ever-written-this"):
        environments.install("peer", wanted, tmp_path / "env", tmp_path / "log.txt")
    assert not (tmp_path / "env" / "installed.txt").exists()


def test_a_peer_that_breaks_does_not_stop_the_others_with_limits_faked(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds.limits, "Meter", lambda threads: types.SimpleNamespace(measure=lambda: limits.Limits(1, 2, 3)))
    those = [Contender("a", "A", "nobody", "x"), Contender("b", "B", "nobody_else", "x")]
    jobs = {}
    for one in those:
        jobs[one.key] = tmp_path / f"{one.key}.json"
        jobs[one.key].write_text(json.dumps({"threads": 1}))
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    told: list[str] = []
    pythons = {one.peer: sys.executable for one in those}
    failed, left = rounds.run_rounds(those, 2, 1, pythons, jobs, tmp_path, journal, told.append)
    assert failed.keys() == {"a", "b"} and "No module named" in failed["a"]
    assert left == 0 and len([line for line in told if line.startswith("round")]) == 2  # each is tried once
    assert journal.errors().keys() == {"a", "b"} and not journal.of("a") and not journal.has(0, "a")


class Measured:
    """In place of processes: how long each would take, by a clock that stands still otherwise. A reading tells its number."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.ran, self.events = 1000.0, seconds, [], []
        monkeypatch.setattr(rounds.time, "time", lambda: self.now)
        monkeypatch.setattr(rounds, "measured", self.measured)
        monkeypatch.setattr(rounds.limits, "Meter", lambda threads: self)
        monkeypatch.setattr(rounds.starts, "process", self.start)
        monkeypatch.setattr(rounds.starts, "cache", lambda job: self.events.append(f"cache {job.stem}"))

    def measure(self):
        self.events.append("limits")
        return rounds.limits.Limits(float(self.events.count("limits")), 2.0, 3.0, 4.0)

    def start(self, python, contender, what, job, log):
        self.events.append(f"{what} {contender.key}")
        return {"files": ["one"], "mapped": ["two"]}

    def measured(self, python, contender, job, log):
        self.ran.append(contender.key)
        self.events.append(contender.key)
        self.now += self.seconds[contender.key]
        return {"wall_s": self.seconds[contender.key], "files": ["three"], "ttft_s": 1.0, "artefact": "x"}


def test_a_run_of_limited_time_goes_on_where_it_stopped_with_processes_faked(tmp_path, monkeypatch):
    those = [Contender(key, key, "nobody", key) for key in ("a", "b")]
    jobs = {one.key: tmp_path / f"{one.key}.json" for one in those}
    world = Measured(monkeypatch, {"a": 100.0, "b": 50.0})

    def piece(count, seconds):
        journal = Journal(tmp_path / "journal.jsonl", {}, True, {"commit": "abc"})
        found = rounds.run_rounds(those, count, 1, {"nobody": "python"}, jobs, tmp_path, journal, print, world.now + seconds)
        return journal, found

    _, (failed, left) = piece(2, 120.0)
    assert world.ran == ["a"] and left == 3 and not failed  # b was never timed, and is given more than what was left
    _, (_, left) = piece(2, 170.0)
    assert world.ran == ["a", "b", "b"] and left == 1  # a would last too long, b would not
    journal, (_, left) = piece(2, 10.0)  # the first is begun in any case
    assert world.ran == ["a", "b", "b", "a"] and left == 0
    assert [row["round"] for row in journal.of("a")] == [0, 1] and len({row["commit"] for row in journal.of("a")}) == 1
    assert len(journal.limits()) == 8 and journal.limits()[0].bf16 == 4.0  # before and after each process


def test_a_later_round_waits_for_what_is_left_of_an_earlier_one_with_processes_faked(tmp_path, monkeypatch):
    those = [Contender(key, key, "nobody", key) for key in ("a", "b")]
    jobs = {one.key: tmp_path / f"{one.key}.json" for one in those}
    world = Measured(monkeypatch, {"a": 10.0, "b": 50.0})
    journal = Journal(tmp_path / "journal.jsonl", {}, False)
    rest = (1, {"nobody": "python"}, jobs, tmp_path, journal, print)
    _, left = rounds.run_rounds(those, 3, *rest, world.now + 80.0)
    assert world.ran == ["a"] and left == 5  # b was never timed; a has time for two more, which b would be far from
    _, left = rounds.run_rounds(those, 3, *rest, world.now + 75.0)
    assert world.ran == ["a", "b", "a"] and left == 3  # of the second round b has no time, a has; the third is not begun
    _, left = rounds.run_rounds(those, 3, *rest, world.now + 75.0)
    assert world.ran == ["a", "b", "a", "b", "a"] and left == 1


def test_the_limits_are_read_directly_beside_each_process_and_first_starts_are_nobody_s_with_processes_faked(
    tmp_path, monkeypatch
):
    those = [Contender(key, key, "nobody", key) for key in ("a", "b")]
    jobs = {one.key: tmp_path / f"{one.key}.json" for one in those}
    world = Measured(monkeypatch, {"a": 1.0, "b": 1.0})
    journal = Journal(tmp_path / "journal.jsonl", {}, False)
    rounds.run_rounds(those, 2, 1, {"nobody": "python"}, jobs, tmp_path, journal, print)
    first = ["start a", "cache a", "limits", "a", "limits", "start b", "cache b", "limits", "b", "limits"]
    assert world.events == [*first, "cache b", "limits", "b", "limits", "cache a", "limits", "a", "limits"]
    assert [each["read"] for each in journal.of("b")[0]["limits"]] == [3.0, 4.0]
    assert jobs["a"].with_suffix(".reads").read_text() == "three"  # what is no longer there is forgotten


def test_what_a_contender_reads_is_read_before_it(tmp_path):
    job = tmp_path / "a.json"
    assert not starts.known(job)
    starts.cache(job)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name in ("file", "folder/one", "folder/inner/two"):
        (tmp_path / name).write_text(name)
    starts.keep(job, [str(tmp_path / "file"), str(tmp_path / "folder"), str(tmp_path / "gone")])
    assert starts.known(job) and {file.name for file in starts._files(job)} == {"file", "one", "two"}
    starts.cache(job)
    (tmp_path / "file").unlink()
    starts.keep(job, [str(tmp_path / "folder" / "one")])
    assert (tmp_path / "a.reads").read_text().splitlines() == [str(tmp_path / "folder" / "one"), str(tmp_path / "folder")]


def write_jobs(monkeypatch, folder, **changed):
    """Jobs of ours and of llama.cpp, as `--prepare-only` leaves them; `changed` in the newer one."""
    monkeypatch.setattr(models, "PEERS", folder)
    model = models.model_named(str(TINY))
    job = {"tiles": 1, "runs": 2, "threads": 2, "quick": False, "texts": {"short": [{"ids": [1, 2]}]}}
    paths = [
        scenario.write_job(each, *whose, model)
        for each, whose in (({**job}, ("llama_cpp", "q4_0")), ({**job, **changed}, ("ours", "cpu-int4")))
    ]
    os.utime(paths[0], (1, 1))
    return model, {"tiles": 1, "runs": 2, "threads": 2, "quick": False}


def test_jobs_of_other_prompts_are_not_measured_beside_each_other(tmp_path, monkeypatch):
    those = [one for one in CONTENDERS if one.key in ("ours-int4", "llama.cpp-q4_0")]
    monkeypatch.setattr(environments, "ready", lambda peer: "python")
    model, wanted = write_jobs(monkeypatch, tmp_path)
    assert prepared(model, those, wanted, run=True).jobs.keys() == {"ours-int4", "llama.cpp-q4_0"}
    model, wanted = write_jobs(monkeypatch, tmp_path, texts={"short": [{"ids": [1, 3]}]})
    with pytest.raises(click.ClickException, match=r"^llama.cpp Q4_0: prepared for other prompts than the newest job; run"):
        prepared(model, those, wanted, run=True)
    newest = prepared(model, those, wanted, run=False).job
    assert newest["texts"]["short"][0]["ids"] == [1, 3]  # the tables are of the newest prompts


def test_a_meter_reads_the_limits_of_this_machine():
    try:
        meter = limits.Meter(1)
    except RuntimeError as error:
        pytest.skip(str(error))
    seen = meter.measure(0.02)
    assert 1e8 < seen.read < 1e12 and 1e9 < seen.fp32 < seen.int8 < 1e13
    assert seen.bf16 == 0 or seen.fp32 < seen.bf16 < seen.int8


def test_options_that_cannot_be_are_refused():
    run = click.testing.CliRunner().invoke
    assert "no contender begins with" in run(command.main, ["--only", "vllm"]).output
    assert "neither 256m nor 2b" in run(command.main, ["--model", "/nowhere"]).output
    assert "does not split pictures" in run(command.main, ["--model", "2b", "--tiles", "17"]).output


def test_a_shape_counts_the_matrices_of_a_checkpoint():
    found = shape.read(TINY, (64, 64))
    sizes = {}
    with safe_open(TINY / "model.safetensors", "np") as opened:
        for name in opened.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            sizes[name] = opened.get_slice(name).get_shape()
    matrices = [a * b for name, (a, *rest) in sizes.items() if "text_model.layers" in name for b in rest]
    assert found.layer_weights == sum(matrices)
    assert found.head_weights == sizes["lm_head.weight"][0] * sizes["lm_head.weight"][1]
    tokens = (64 // 16) ** 2
    encoder = sum(a * b for name, (a, *rest) in sizes.items() if "vision_model.encoder" in name for b in rest)
    connector = [a * b for name, (a, *rest) in sizes.items() if "connector" in name for b in rest]
    patches = 2 * tokens * 128 * 3 * 16**2
    assert found.vision_products == 2 * tokens * encoder + 2 * (tokens // 4) * sum(connector) + patches
    assert found.vision_attention == 3 * 4 * tokens**2 * 128


def test_smolvlm_256m_costs_what_the_first_measurement_counted(tmp_path):
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    text |= {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 512, "patch_size": 16}
    config = {"model_type": "smolvlm", "scale_factor": 4, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = shape.read(tmp_path, (512, 512))
    assert (found.vision_products + found.vision_attention) / 1e9 == pytest.approx(214.7, abs=0.2)
    assert found.prompt_products(96) / 1e9 == pytest.approx(20.4, abs=0.1)


def test_the_same_steps_are_taken_of_every_contender(monkeypatch):
    calls = []

    class Counted:
        def picture(self):
            calls.append("picture")
            return 0.5

        def turn(self):
            calls.append("turn")

        def vision(self):
            calls.append("vision")
            return 0.25

        def text(self, prompt, new_tokens):
            calls.append(f"text {len(prompt['ids'])} {new_tokens}")
            return [0.1 * (index + 1) for index in range(new_tokens)]

        def facts(self):
            return {"files": [TINY / "config.json"], "token_bytes": 1, "kv_bytes": 2, "whole": True, "note": ""}

    texts = {name: [{"ids": [1] * count}] for name, count in (("short", 20), ("long", 40), ("longest", 60))}
    job = {"tiles": 1, "runs": 2, "new_tokens": 4, "texts": texts}
    found = worker.measure(lambda job: Counted(), job)
    assert calls == ["picture"] + ["vision", "picture", "turn"] * 2 + ["text 20 4", "text 40 4", "text 60 1"]
    assert found["prefill_short_tps"] == pytest.approx(200) and found["decode_short_tps"] == pytest.approx(10)
    assert found["vision_ms"] == 250 and "turn_s" not in found and found["cold_s"] > 0
    calls.clear()
    split = worker.measure(lambda job: Counted(), {**job, "tiles": 17})
    assert calls == ["picture", "turn"] and split["ttft_s"] == 0.5


def test_peak_memory_is_the_process_s_own(tmp_path):
    """A parent that held much must not show in what its children report."""
    child = "from benchmarks.peers.worker import peak_rss_mb; print(peak_rss_mb())"
    hold = "import subprocess, sys; kept = bytearray(b'x') * (300 << 20)"
    parent = f"{hold}; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=environments.ROOT)
    assert 5 < float(done.stdout) < 150


@pytest.mark.slow
def test_ours_and_transformers_take_turns_on_a_trained_model(tmp_path, monkeypatch, portable_bundle):
    """The whole command with a small model: real processes, real figures, one contender that cannot be installed."""
    shutil.copytree(portable_bundle("tiny-smolvlm"), tmp_path / "peers" / TINY.name / f"{TINY.name}.vlm")
    for module in (models, scenario, environments):
        monkeypatch.setattr(module, "PEERS", tmp_path / "peers")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    out = tmp_path / "found"
    only = "ours-int4,transformers-fp32,openvino-int4"
    arguments = ["--model", str(TINY), "--only", only, "--quick", "--busy", "--threads", "2", "--out", str(out), "--no-save"]
    done = click.testing.CliRunner().invoke(command.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(out.with_suffix(".json").read_text())
    ours, eager, missing = (found["contenders"][key] for key in ("ours-int4", "transformers-fp32", "openvino-int4"))
    names = {"vision_ms", "prefill_short_tps", "prefill_longest_tps", "ttft_s", "decode_short_tps", "decode_long_tps", "turn_s"}
    names |= {"rss_mb", "rss_long_mb", "size_mb", "cold_s"}
    assert names <= ours.keys() and names <= eager.keys()
    assert "cannot be installed" in missing["failed"]
    assert ours["token_bytes"] < eager["token_bytes"] / 4  # 4-bit layers beside float32
    assert ours["rss_mb"]["median"] < eager["rss_mb"]["median"]  # no PyTorch in the process
    assert "onnxruntime" in ours["versions"] and "torch" not in ours["versions"]
    page = out.with_suffix(".md").read_text()
    assert "None are set for this model" in page and "cannot be installed" in page
    assert out.with_suffix(".png").is_file()
