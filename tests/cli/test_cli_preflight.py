"""`vlm-edge preflight` and `vlm-edge targets`: what they print, as tables and as JSON, and their exit codes."""

import json

import pytest
from click.testing import CliRunner

from vlm_edge.cli.main import group


@pytest.fixture(scope="module")
def bundle(portable_bundle):
    return str(portable_bundle("smolvlm"))


def run(*args: str):
    return CliRunner().invoke(group, list(args), standalone_mode=False)  # as `main` calls it: a command may return its exit code


def test_a_build_that_fits(bundle):
    done = run("preflight", bundle, "--target", "jetson-orin-nano-jp62", "--context", "64")
    assert done.exception is None and done.return_value == 0, done.output
    for words in ("every node can be built", "context 64, batch 1", "decoder.c64", "KV cache", "compiling, on the device"):
        assert words in done.output


def test_as_json(bundle):
    done = run("preflight", bundle, "--target", "rtx-4090", "--context", "64", "--batch", "2", "--json")
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["memory"]["fits"] and found["memory"]["context"] == 64
    memory = found["memory"]
    assert memory["total"] == memory["weights"] + memory["kv_cache"] + memory["activations"]
    assert {graph["role"] for graph in memory["graphs"]} == {"vision_encoder", "projector", "embed_tokens", "decoder"}


def test_what_does_not_fit_is_said_with_the_way_out(bundle, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text('name = "small"\nextends = "rtx-40"\n[device]\nmemory_gib = 0.002\nreserved_gib = 0.0\n')
    done = run("preflight", bundle, "--target", str(file), "--context", "256")
    assert done.return_value == 1
    assert "it does not fit. Nothing smaller" in done.output
    build = run("build", bundle, "--target", str(file))
    assert "of memory beside the system" in str(build.exception)


def test_a_cpu_target_has_nothing_to_check(bundle):
    assert "describes no GPU" in str(run("preflight", bundle, "--target", "cpu-int4").exception)


def test_targets_as_tables_and_alone():
    listed = run("targets").output
    for words in ("jetson-orin-nano-jp62", "rtx-4090", ">=10.3,<10.4", "by TensorRT-RTX", "cpu-arm64"):
        assert words in listed
    alone = run("targets", "rtx-4090").output
    assert "24 GiB" in alone and "context buckets 1024, 4096" in alone and "rtx-3090" not in alone
    known = json.loads(run("targets", "--json").stdout)
    assert {"cuda-desktop", "h100-h200"} <= {target["name"] for target in known}
    assert json.loads(run("targets", "h200", "--json").stdout)["device"]["memory_gib"] == 140.4
