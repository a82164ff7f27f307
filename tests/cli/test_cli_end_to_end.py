"""The real command on trained bundles: answers, exit codes, JSON, and what bad input gets."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_edge_runtime import _native

ROOT = Path(__file__).resolve().parents[2]


def vlm_edge(*args: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlm_edge", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, input=stdin)


def refused(*args: object) -> str:
    """The message of a command that must end with an error."""
    done = vlm_edge(*args)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    return done.stderr.partition("error: ")[2]


def test_run_streams_the_right_answer(trained_bundle, scene):
    picture, answer = scene
    done = vlm_edge("run", trained_bundle("tiny-llava"), "--image", picture, "--prompt", "describe the image.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer


def test_the_prompt_comes_from_standard_input(trained_bundle, scene):
    picture, answer = scene
    done = vlm_edge("run", trained_bundle("tiny-llava"), "-i", picture, "-p", "-", "--json", stdin="describe the image.\n")
    result = json.loads(done.stdout)
    assert result["text"].strip() == answer
    assert result["finish_reason"] == "stop"
    assert result["stats"]["prompt_tokens"] > 16


def test_beams_from_the_command_line(trained_bundle, scene):
    picture, answer = scene
    rules = ["--num-beams", "3", "--length-penalty", "0.5", "--no-repeat-ngram-size", "9", "--min-new-tokens", "2"]
    done = vlm_edge("run", trained_bundle("tiny-llava"), "-i", picture, "-p", "describe the image.", "--json", *rules)
    result = json.loads(done.stdout)
    assert result["text"].strip() == answer
    assert result["score"] < 0


def test_chat_keeps_its_history(trained_bundle, scene):
    picture, answer = scene
    lines = f"/image {picture}\ndescribe the image.\nis there a digit?\n/quit\n"
    done = vlm_edge("run", trained_bundle("tiny-llava"), "--chat", "--stats", stdin=lines)
    assert done.returncode == 0, done.stderr
    first, second = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert first == answer
    assert second in ("yes", "no")
    reused = next(line.split()[-1] for line in done.stderr.splitlines() if "reused_tokens" in line)
    assert int(reused) > 16


def test_labels_rank_a_picture(trained_bundle, scene):
    picture, answer = scene
    labels = f"{answer},a red circle,the digit 7"
    done = vlm_edge("run", trained_bundle("tiny-clip"), "-i", picture, "--labels", labels, "--template", "{}", "--json")
    assert done.returncode == 0, done.stderr
    ranked = json.loads(done.stdout)[str(picture)]
    assert ranked[0]["label"] == answer
    assert abs(sum(row["score"] for row in ranked) - 1) < 1e-5


def test_inspect_shows_graphs_memory_and_verdicts(trained_bundle):
    done = vlm_edge("inspect", trained_bundle("tiny-llava"), "--context-length", 256, "--verify")
    assert done.returncode == 0, done.stderr
    for word in ("projector", "vision_encoder", "decoder", "int4", "KV cache", "PASS", "all checked"):
        assert word in done.stdout
    plan = json.loads(vlm_edge("inspect", trained_bundle("tiny-llava"), "--context-length", 256, "--json").stdout)["memory"]
    assert plan["cpu-int4"]["kv_cache"] == 2 * 4 * 2 * 256 * 32 * 2  # both × layers × heads × tokens × width × float16
    assert plan["cpu-int4"]["weights"] < plan["portable"]["weights"] / 2


def test_what_runs_each_graph_is_said(trained_bundle, tmp_path):
    bundle = shutil.copytree(trained_bundle("tiny-llava"), tmp_path / "tiny-llava.vlm")
    made = vlm_edge("build", bundle, "--target", "cpu-int4", "--precision", "int4", "--block-size", 16, "--name", "fine")
    assert made.returncode == 0, made.stderr
    why = "no native kernel for 4-bit weights in blocks of 16"
    assert f"decoder runs with ONNX Runtime: {why}" in " ".join(made.stdout.split())
    shown = vlm_edge("inspect", bundle)
    assert f"decoder runs with ONNX Runtime: {why}" in " ".join(shown.stdout.split())
    runs = json.loads(vlm_edge("inspect", bundle, "--json").stdout)["runs"]
    best = _native.kernels()[0]
    assert runs["cpu-int4"]["decoder"] == {"runtime": "native", "kernels": best, "why": ""}
    assert f"native ({best})" in shown.stdout
    assert runs["portable"]["decoder"] == {"runtime": "ONNX Runtime", "kernels": "", "why": ""}
    assert runs["fine"]["decoder"] == {"runtime": "ONNX Runtime", "kernels": "", "why": why}


def test_bench_measures_every_build_in_its_own_process(trained_bundle):
    options = ("--runs", 1, "--new-tokens", 4, "--json")
    done = vlm_edge("bench", trained_bundle("tiny-llava"), "--build", "portable", "--build", "cpu-int4", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert set(results) == {"portable", "cpu-int4"}
    for row in results.values():
        assert row["ttft_ms"] > 0
        assert row["decode_tps"] > 0
        assert row["peak_rss_mb"] > 10
        assert {"vision_encoder", "projector", "decoder"} <= set(row["graph_ms"])


def test_bench_of_a_dual_encoder(trained_bundle):
    done = vlm_edge("bench", trained_bundle("tiny-clip"), "--runs", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]["cpu-int4"]["image_ms"] > 0


def test_the_exit_code_of_parity_is_its_verdict(trained_bundle, tmp_path):
    bundle = tmp_path / "tiny-clip.vlm"
    shutil.copytree(trained_bundle("tiny-clip"), bundle)
    page = tmp_path / "page.html"
    done = vlm_edge("parity", bundle, "--reference", ROOT / "tests/checkpoints/tiny-clip", "--html", page, "--json")
    report = json.loads(done.stdout)["report"]
    assert done.returncode == report["exit_code"] == {"PASS": 0, "FAIL": 1, "AMBIGUOUS": 2}[report["verdict"]]
    assert report["verdict"] == "PASS"
    assert page.read_text().lstrip().lower().startswith("<!doctype html")
    assert json.loads((bundle / "manifest.json").read_text())["builds"]["cpu-int4"]["parity"]["verdict"] == "PASS"


# --- bad input ---


def test_an_image_that_is_none(trained_bundle, tmp_path):
    (tmp_path / "notes.png").write_text("this is text")
    message = refused("run", trained_bundle("tiny-llava"), "-i", tmp_path / "notes.png", "-p", "describe the image.")
    assert "notes.png" in message


def test_a_truncated_image(trained_bundle, scene, tmp_path):
    cut = tmp_path / "cut.png"
    whole = scene[0].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    assert "cut.png" in refused("run", trained_bundle("tiny-llava"), "-i", cut, "-p", "describe the image.")


def test_a_prompt_longer_than_the_context(trained_bundle, scene):
    message = refused("run", trained_bundle("tiny-llava"), "-i", scene[0], "-p", "red " * 2000)
    assert "the context has 1024" in message


@pytest.mark.parametrize(("prompt", "images"), [("<image> <image> compare.", 1), ("<image> describe.", 2)])
def test_images_and_placeholders_must_match(trained_bundle, scene, prompt, images):
    message = refused("run", trained_bundle("tiny-llava"), *["-i", scene[0]] * images, "-p", prompt, "--raw")
    assert "1" in message
    assert "2" in message


def test_a_damaged_bundle(trained_bundle, scene, tmp_path):
    bundle = tmp_path / "damaged.vlm"
    shutil.copytree(trained_bundle("tiny-llava"), bundle)
    graph = bundle / "builds/cpu-int4/decoder.plan"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    assert "SHA-256" in refused("run", bundle, "-i", scene[0], "-p", "describe the image.")


def test_an_unknown_model_type_names_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lava", "architectures": ["LavaForConditionalGeneration"]}')
    message = refused("export", tmp_path, tmp_path / "out.vlm")
    assert "lava" in message
    assert "llava" in message
    assert not (tmp_path / "out.vlm").exists()


def test_ctrl_c_in_the_middle_of_an_export_leaves_nothing(tmp_path):
    out = tmp_path / "interrupted.vlm"
    command = [sys.executable, "-m", "vlm_edge", "export", "tests/checkpoints/tiny-llava", str(out)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)  # the temporary folder appears when tracing begins
    assert running.poll() is None, running.communicate()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert "Interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_between_two_turns_ends_quietly(trained_bundle, scene):
    command = [sys.executable, "-m", "vlm_edge", "run", str(trained_bundle("tiny-llava")), "-i", str(scene[0]), "--chat"]
    running = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write("describe the image.\n")
    running.stdin.flush()
    running.stdout.readline()  # it is up and has answered once
    time.sleep(1)  # and waits for the next line; during an answer Ctrl-C would end that answer only
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
