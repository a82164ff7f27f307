"""The bench of peers, running other programs: logs that can be followed, failures in one line, a source package unpacked."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import types

import pytest

from benchmarks.peers import llama_build, openvino_genai, worker
from benchmarks.peers.run import ROOT, PeerError, run


def test_what_a_program_says_is_in_the_log_while_it_runs(tmp_path):
    log = tmp_path / "logs" / "one.log"
    script = f"import pathlib, sys; print('first', flush=True); print(pathlib.Path({str(log)!r}).read_text().count('first\\n'))"
    said = run([sys.executable, "-c", script + "; print('last', file=sys.stderr)"], log, "a program")
    assert said.split() == ["first", "1", "last"]  # it read its own first line there
    assert log.read_text().endswith("\nexit 0\n")


def test_a_program_that_fails_or_never_ends_is_one_line(tmp_path):
    log = tmp_path / "one.log"
    with pytest.raises(PeerError, match=r"^a program: ValueError: no$"):
        run([sys.executable, "-c", "print('so far'); raise ValueError('no')"], log, "a program")
    assert "so far" in log.read_text() and "exit 1" in log.read_text()
    with pytest.raises(PeerError, match="a program: still running after 1 s"):
        run([sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(60)"], log, "a program", 1)
    assert "so far" in log.read_text()


def test_a_source_package_replaces_what_was_half_unpacked(tmp_path):
    package = tmp_path / "package-1.0"
    (package / "vendor").mkdir(parents=True)
    (package / "vendor" / "file.c").write_text("int x;")
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        archive.add(package, "package-1.0")
    half = tmp_path / "source" / "other"
    half.mkdir(parents=True)
    llama_build.unpack(tmp_path / "package.tar.gz", tmp_path / "source")
    assert (tmp_path / "source" / "vendor" / "file.c").read_text() == "int x;" and not half.exists()
    assert not (tmp_path / "source.part").exists()


def test_a_clock_notes_tokens_for_a_library_that_calls_its_own_class():
    class Base:
        """A library's streamer."""

        def put(self, value):
            raise AssertionError("the clock stands before it")

    class Other:
        """Another library's, which asks `write` whether to go on."""

    clock = worker.clock_of(Base)()
    clock.put(1), clock.put(2), clock.end()
    assert isinstance(clock, Base) and len(clock.calls) == 2 and 0 <= clock.calls[0] <= clock.calls[1]
    other = worker.clock_of(Other, write=lambda clock, token: clock.tick() or "go on")()
    assert other.write(1) == "go on" and len(other.calls) == 1


def node(layer, primitive):
    facts = {"layerType": types.SimpleNamespace(value=layer), "primitiveType": types.SimpleNamespace(value=primitive)}
    return types.SimpleNamespace(get_rt_info=lambda: facts)


@pytest.mark.parametrize(
    ("primitives", "expected"),
    [
        (["brgemm_avx512_bf16"] * 3 + ["brgemm_avx512_f32"], "bf16"),
        (["brgemm_avx512_f32"] * 2, "fp32"),
        (["brgemm_avx512_i8"] * 2, "int8"),
        (["something_else"], None),
        ([], None),
    ],
)
def test_openvino_s_arithmetic_is_that_of_most_of_its_products_with_a_faked_model(primitives, expected):
    nodes = [node("FullyConnected", each) for each in primitives] + [node("ScaledDotProductAttention", "avx512_bf16")]
    model = types.SimpleNamespace(get_ordered_ops=lambda: [*nodes, node("Reshape", "unknown_f32")])
    compiled = types.SimpleNamespace(get_runtime_model=lambda: model)
    assert openvino_genai.executed(compiled) == (expected, "bf16")
    assert openvino_genai.executed(types.SimpleNamespace(get_compiled_model=lambda: compiled)) == (expected, "bf16")


def test_a_pipeline_that_keeps_prefixes_never_sees_the_same_prompt_again():
    text = "<image> " + " ".join(f"word{number}" for number in range(20))
    asked = [openvino_genai.reordered(text, call) for call in range(40)]
    assert asked[0] == text and len(set(asked)) == 40
    assert all(sorted(each.replace("<image>", "").split()) == sorted(text.split()[1:]) for each in asked)
    assert all(each.index("<image>") > 0 and each[0] == " " for each in asked[1:])  # the image is behind other words


START = """
import json, pathlib, sys
from benchmarks.peers import worker

class Counted:
    def __init__(self, job):
        self.said = [pathlib.Path(job["data"]).read_text()]

    def picture(self):  # a decoder alone: it takes no images
        self.said.append("picture")

    def text(self, prompt, new_tokens):
        self.said.append(f"text {prompt} {new_tokens}")

    def facts(self):
        return {"files": self.said}

worker.main(Counted, None, ())
"""


def test_a_start_goes_to_the_first_token_and_names_what_was_read(tmp_path):
    """In a process of its own: what Python opens is told to the end of it."""
    (tmp_path / "data").write_text("data")
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"texts": {"short": ["one", "two"]}, "data": str(tmp_path / "data")}))
    done = subprocess.run([sys.executable, "-c", START, "start", str(job)], capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.strip().removeprefix(worker.MARK))
    assert found["files"] == ["data", "picture", "text one 1"]
    assert str((tmp_path / "data").resolve()) in found["mapped"]
    assert any(name.endswith("worker.py") for name in found["mapped"])  # what was imported, too
    assert not any(name.startswith("/proc") for name in found["mapped"])


def test_mapped_files_hold_the_interpreter_s_libraries():
    found = worker.mapped_files()
    assert found == sorted(set(found)) and (not found or any(".so" in name for name in found))
