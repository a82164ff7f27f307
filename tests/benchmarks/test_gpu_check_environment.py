"""Wheels in pieces, their checksums, the environment they go into; and the plan: what is done, left out and cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.gpu_check.command import main, run, take
from benchmarks.gpu_check.environment import SUMS, EnvironmentFault, join, prepare
from benchmarks.gpu_check.pack import cut
from benchmarks.gpu_check.plan import Step, chosen, on_this_machine, plan
from benchmarks.gpu_check.report import markdown

ROOT = Path(__file__).resolve().parents[2]


def _wheel(folder: Path, name: str, version: str = "1.0", filler: int = 0) -> Path:
    """A real wheel with one module."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n# {'x' * filler}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture(name="carried")
def _carried(tmp_path) -> Path:
    """Two wheels, one of them in pieces, as they lie on the machine with the GPU."""
    wheels = [_wheel(tmp_path / "made", "vlm_edge_small"), _wheel(tmp_path / "made", "vlm_edge_large", filler=25_000)]
    folders = cut(wheels, tmp_path / "cut", 10_000)
    assert len(folders) >= 3
    carried = tmp_path / "carried"
    carried.mkdir()
    for folder in folders:
        files = list(folder.iterdir())
        assert sum(file.stat().st_size for file in files) <= 10_000
        for file in files:
            (carried / file.name).write_bytes(file.read_bytes())
    return carried


def test_pieces_are_joined_and_checked(carried, tmp_path) -> None:
    found = join(carried, tmp_path / "joined")
    assert {wheel.name.split("-")[0] for wheel in found} == {"vlm_edge_small", "vlm_edge_large"}
    for wheel in found:
        assert zipfile.ZipFile(wheel).testzip() is None
    last = max(carried.glob("*.part*"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-1] + b"?")
    with pytest.raises(EnvironmentFault, match=r"vlm_edge_large.* has SHA-256"):
        join(carried, tmp_path / "joined")
    last.unlink()
    with pytest.raises(EnvironmentFault, match="vlm_edge_large"):  # the end is missing: a wrong checksum
        join(carried, tmp_path / "joined")
    min(carried.glob("*.part*")).unlink()
    with pytest.raises(EnvironmentFault, match=r"part 000 of vlm_edge_large.* is missing"):
        join(carried, tmp_path / "joined")
    for piece in carried.glob("*.part*"):
        piece.unlink()
    with pytest.raises(EnvironmentFault, match=r"has no vlm_edge_large.*carry all pieces"):
        join(carried, tmp_path / "joined")
    (carried / SUMS).unlink()
    with pytest.raises(EnvironmentFault, match="has no checksum for vlm_edge_small"):
        join(carried, tmp_path / "joined")


def test_wheels_go_into_an_environment_of_their_own(carried, tmp_path) -> None:
    python, installed = prepare(carried, tmp_path / "work")
    assert python != sys.executable and len(installed) == 2
    code = "import vlm_edge_small, vlm_edge_large, sys; print(vlm_edge_large.VERSION, sys.prefix)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0", str(tmp_path / "work" / "venv")]
    assert subprocess.run([sys.executable, "-c", "import vlm_edge_small"], capture_output=True).returncode != 0
    assert subprocess.run([python, "-c", "import numpy, vlm_edge_small"]).returncode == 0  # what is here is seen there
    assert prepare(None, tmp_path / "other") == (sys.executable, [])


def test_the_first_process_needs_nothing_but_the_standard_library(tmp_path) -> None:
    """On the machine with the GPU, click and msgspec may exist among the wheels alone."""
    code = "import sys, benchmarks.gpu_check.__main__; print({'click', 'msgspec', 'numpy', 'onnx_ir'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_it_goes_on_in_the_environment_of_the_wheels(carried, tmp_path) -> None:
    arguments = ["--wheels", carried, "--work", tmp_path / "work", "--kit", tmp_path / "no-kit", "--cpu"]
    command = [sys.executable, "-m", "benchmarks.gpu_check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "gpu_check.pack" in done.stderr  # said by click, in the new environment
    assert (tmp_path / "work" / "environment" / "venv" / "bin" / "python").exists()


def test_the_plan_fits_its_patterns_and_machines(tmp_path) -> None:
    steps = plan(tmp_path, tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) and names[0] == "machine"
    for step in steps:
        assert set(step.needs) <= set(names[: names.index(step.name)])
        json.dumps(step.options)
    picked = [step.name for step in chosen(steps, ["tiny-llava cuda-int4: parity"])]
    assert picked == ["machine", "tiny-llava cuda-int4: build", "tiny-llava cuda-int4: parity"]
    by_name = {step.name: step for step in steps}
    rtx, full = by_name["tiny-llava tensorrt-rtx: build"], by_name["tiny-llava tensorrt: build"]
    both = {"tensorrt": "10.16", "tensorrt-rtx-cu13": "1.7.1"}
    assert rtx.without({"sm": 89, "packages": both}) is None
    assert rtx.without({"sm": 90, "packages": both}) == "there is no tensorrt-rtx target for SM 9.0"
    assert full.without({"sm": 90, "packages": both}) is None
    assert full.without({"sm": 90, "packages": {}}) == "tensorrt is not installed here"
    assert on_this_machine(rtx, {"sm": 120})["target"] == "rtx-50" and on_this_machine(rtx, {"sm": 120})["sm"] == 120


def test_targets_of_the_plan_exist() -> None:
    from benchmarks.gpu_check.plan import FULL, RTX
    from vlm_edge.targets import load_target

    for sm, name in (RTX | FULL).items():
        assert sm in load_target(name).device.sm


def test_what_fails_is_recorded_and_the_run_goes_on(tmp_path) -> None:
    step = Step("machine", "machine", {"device": "nowhere"}, 60, "")
    failed = run(step, step.options, sys.executable, 60)
    assert failed["state"] == "failed" and "nowhere" in failed["message"]
    cut_off = run(replace(step, options={"device": "cpu"}), {"device": "cpu"}, sys.executable, 0.2)
    assert cut_off["state"] == "failed" and "ran past its limit of 0 s" in cut_off["message"]
    needy = Step("next", "machine", {}, 60, "", needs=("machine",))
    assert take(needy, [failed], {}, sys.executable, 60)["message"] == "'machine' did not succeed"
    assert "the time is used up" in take(step, [], {}, sys.executable, 1)["message"]
    excused = replace(step, without=lambda facts: "no such thing here")
    assert take(excused, [], {}, sys.executable, 60) == {
        "name": "machine",
        "work": "machine",
        "state": "left out",
        "seconds": 0,
        "message": "no such thing here",
    }


def test_a_dry_run_and_a_missing_kit(tmp_path) -> None:
    shown = CliRunner().invoke(main, ["--dry-run", "--minutes", "8", "--kit", str(tmp_path)])
    assert shown.exit_code == 0 and "torch.compile" in shown.output and "what 8 minutes do not hold is left out" in shown.output
    refused = CliRunner().invoke(main, ["--kit", str(tmp_path / "none"), "--work", str(tmp_path / "w")])
    assert refused.exit_code == 2 and "gpu_check.pack" in refused.output


def test_percentages_follow_from_made_up_numbers() -> None:
    """1.7 GB of weights and cache in 1 ms of a bandwidth of 3.4 TB/s is half of it."""
    from benchmarks.gpu_check.models import SHAPES

    shape = SHAPES["smolvlm-256m"]
    machine = {"gpu": "made up", "nvidia_smi": "", "sm": 90, "packages": {}, "read_bandwidth": 3.4e12, "matrix_rate": 1e15}
    result = {"prompt_tokens": 1000, "new_tokens": 10, "ttft_s": 0.02, "preprocess_s": 0.0, "vision_s": 0.01, "prefill_s": 0.01}
    step = {"name": "smolvlm-256m ort-cuda cuda-fp16: round 1", "work": "ours", "state": "ok", "seconds": 1.0}
    bytes_read = 1_700_000_000 - 1000 * shape.kv_bytes_per_token
    rows = [
        {"name": "machine", "work": "machine", "state": "ok", "seconds": 1.0, "result": machine},
        {**step, "result": {**result, "tpot_s": 0.001}},
        {**step, "name": "smolvlm-256m ort-cuda cuda-fp16: round 2", "result": {**result, "tpot_s": 0.001}},
        {"name": "x", "work": "ours", "state": "failed", "seconds": 2.0, "message": "a | b"},
    ]
    document = {"mode": "gpu", "date": "today", "command": "c", "commit": "d", "steps": rows}
    page = markdown(document, {"smolvlm-256m": {"cuda-fp16": bytes_read}})
    rate = round(100 * 2 * shape.decoder_parameters * 1000 / 0.01 / 1e15)
    assert f"| ort-cuda cuda-fp16 | 2 | 20.0 | 0.0 | 10.0 | 10.0 | 1.00 | 1000 | 50 | {rate} |" in page
    assert "No GPU was used" not in page and "| x | failed | 2.0 | a / b |" in page


def test_the_results_folder_says_what_there_is() -> None:
    folder = ROOT / "benchmarks" / "results" / "gpu"
    figures = list(folder.glob("*.json"))
    assert figures or "There are none yet." in (folder / "README.md").read_text()


def test_every_part_can_be_packed_by_itself() -> None:
    from benchmarks.gpu_check.models import SHAPES
    from benchmarks.gpu_check.pack import CARRIED
    from benchmarks.gpu_check.pack import main as pack

    (option,) = [one for one in pack.params if one.name == "parts"]
    assert set(CARRIED) <= set(SHAPES) and {"wheels", "trained", *SHAPES} == set(option.type.choices)
