"""The command line's face: help that teaches, one clear line per error, exit codes, and no PyTorch where none is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vlm_edge.cli.console import size
from vlm_edge.cli.main import COMMANDS, EXIT_ERROR, EXIT_USAGE, group

ROOT = Path(__file__).resolve().parents[2]


def vlm_edge(*args: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vlm_edge", *map(str, args)], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_the_group_lists_every_command():
    shown = CliRunner().invoke(group, ["--help"]).output
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_shows_an_example(name):
    result = CliRunner().invoke(group, [name, "--help"])
    assert result.exit_code == 0
    assert f"\n  vlm-edge {name}" in result.output


def test_help_and_listings_load_no_pytorch():
    code = (
        "import sys; from click.testing import CliRunner; from vlm_edge.cli.main import COMMANDS, group\n"
        "for name in COMMANDS: assert CliRunner().invoke(group, [name, '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(group, ['targets']).exit_code == 0\n"
        "assert CliRunner().invoke(group, ['families']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_unknown_command_is_a_usage_error_with_a_suggestion():
    done = vlm_edge("exprot")
    assert done.returncode == EXIT_USAGE
    assert "Did you mean 'export'?" in done.stderr


def test_an_error_is_one_line_and_its_own_exit_code(tmp_path):
    done = vlm_edge("inspect", tmp_path / "nothing.vlm")
    assert done.returncode == EXIT_ERROR
    assert done.stderr.startswith("error: ")
    assert "is not a bundle" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_target_is_said_before_anything_is_traced(tmp_path):
    done = vlm_edge("export", ROOT / "tests/checkpoints/tiny-clip", tmp_path / "x.vlm", "--target", "cpu-int5")
    assert done.returncode == EXIT_ERROR
    assert "cpu-int5" in done.stderr
    assert "cpu-int4" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_int8_cache_for_a_gpu_is_refused_before_anything_is_traced(tmp_path):
    done = vlm_edge("export", ROOT / "tests/checkpoints/tiny-llava", tmp_path / "x.vlm", "--target", "rtx-40", "--kv", "int8")
    assert done.returncode == EXIT_USAGE
    assert "rtx-40 is not built for one" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_targets_and_families_as_json():
    runner = CliRunner()
    names = [target["name"] for target in json.loads(runner.invoke(group, ["targets", "--json"]).output)]
    assert {"cpu-fp32", "cpu-int8", "cpu-int4"} <= set(names)
    types = {entry["model_type"] for entry in json.loads(runner.invoke(group, ["families", "--json"]).output)["model_types"]}
    assert {"llava", "smolvlm", "qwen2_vl", "clip", "siglip"} <= types


def test_a_closed_pipe_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "vlm_edge", "families", "--json"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (250_000, "250 kB"), (76_000_000, "76.0 MB")]
)
def test_sizes_for_people(count, text):
    assert size(count) == text
