"""Plans of graphs and calls that nobody means well with: refused, or answered without what lies in memory that nobody wrote."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm_edge.targets.native.panels import integers, vector
from vlm_edge.targets.native.plan_file import Buffer, BufferKind, GraphKind, Plan, Ref, Step, Value, write
from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

IMAGES = 3


def opened(path: Path, steps: list[Step], inputs: list[Value], outputs: list[Value]) -> _native.Session:
    write(Plan(inputs, outputs, 0, 0, 0, steps, graph=True), path)
    return _native.Session(str(path), path.stem, threads=2, spin=False, plan=True)


def test_numbers_that_no_step_writes_are_zeros(tmp_path):
    x = np.random.default_rng(0).standard_normal((IMAGES, 4, 10)).astype(np.float32)
    source, out = Ref(Buffer(BufferKind.INPUT, 10, 0, 4)), Ref(Buffer(BufferKind.OUTPUT, 10, 0, 4))
    places = integers(np.asarray([10, 0, 20, 30], np.int32))
    step = Step(GraphKind.COPY, 10, False, [source], [out], [places], [10])
    session = opened(tmp_path / "one.plan", [step], [Value("x", 1, ("images", 4, 10))], [Value("y", 1, ("images", 4, 10))])
    found = np.full_like(x, 7)
    _native.graph_run(session, {"x": x}, {"y": found})
    np.testing.assert_array_equal(found[:, 1:3], x[:, [0, 3]])
    assert not found[:, [0, 3]].any()


def lengths(out: Buffer, *steps: Step, longest: int = 30, sizes: tuple[int, ...] = (0, 1, 0, 1)) -> list[Step]:
    """Steps of a plan whose file is for a length of 9: the buffers' rows are (fixed, for each unit of length)."""
    table = integers(np.asarray(sizes, np.int32))
    return [Step(GraphKind.LENGTH, 1, False, [], [Ref(out)], weights=[table], arguments=[9, longest]), *steps]


VALUES = Value("x", 1, ("images", "length", 10)), Value("y", 1, ("images", "length", 10))


def test_a_step_that_writes_nothing_makes_no_output(tmp_path):
    source, out = Buffer(BufferKind.INPUT, 10, 0, 9), Buffer(BufferKind.OUTPUT, 10, 0, 9)
    between = Buffer(BufferKind.FLOATS, 10, rows=9)
    doubled = Step(GraphKind.UNARY, 10, False, [Ref(source)], [Ref(between)], reals=[2.0, 1.0])
    with pytest.raises(DeviceError, match="an output is never written"):
        opened(tmp_path / "one.plan", lengths(out, doubled, sizes=(0, 1) * 3), [VALUES[0]], [VALUES[1]])


def test_a_length_that_was_refused_leaves_nothing_behind(tmp_path):
    """The table has rows for 15: a call with more finds the plan damaged, and so does every such call after it."""
    source, out = Buffer(BufferKind.INPUT, 10, 0, 9), Buffer(BufferKind.OUTPUT, 10, 0, 9)
    table = np.random.default_rng(0).standard_normal((15, 10)).astype(np.float32)
    step = Step(GraphKind.ADD, 10, False, [Ref(source)], [Ref(out)], [vector(table)])
    session = opened(tmp_path / "one.plan", lengths(out, step), [VALUES[0]], [VALUES[1]])
    for length in (9, 20, 20, 0, 31, 0, 15, 20, 0):
        x = np.ones((IMAGES, length, 10), np.float32)
        found = np.zeros_like(x)
        if length in (9, 15):
            _native.graph_run(session, {"x": x}, {"y": found})
            np.testing.assert_array_equal(found, x + table[:length])
        else:
            with pytest.raises(DeviceError, match="damaged: for a length of 20" if length == 20 else "expected 1 to 30"):
                _native.graph_run(session, {"x": x}, {"y": found})


def test_more_pieces_than_are_counted_are_refused(tmp_path):
    heads = 1 << 16
    source, out = Ref(Buffer(BufferKind.INPUT, heads, 0, 1)), Ref(Buffer(BufferKind.OUTPUT, heads, 0, 1))
    step = Step(GraphKind.ATTENTION, heads, False, [source, source, source], [out], [], [heads, 1], [1.0])
    session = opened(tmp_path / "one.plan", [step], [Value("x", 1, ("images", 1, heads))], [Value("y", 1, ("images", 1, heads))])
    x = np.ones((16, 1, heads), np.float32)
    with pytest.raises(DeviceError, match="1048576 pieces of work for 16 images at once, expected fewer than 1048576"):
        _native.graph_run(session, {"x": x}, {"y": np.empty_like(x)})
    found = np.empty_like(x[:2])
    _native.graph_run(session, {"x": x[:2]}, {"y": found})
    np.testing.assert_array_equal(found, x[:2])


def test_images_with_large_arenas_go_a_few_at_a_time(tmp_path):
    """200 MiB for each of 40 images: nobody reserves 8 GB to compute 40 numbers."""
    resource = pytest.importorskip("resource")
    source, out = Ref(Buffer(BufferKind.INPUT, 1, 0, 1)), Ref(Buffer(BufferKind.OUTPUT, 1, 0, 1))
    wide = Ref(Buffer(BufferKind.FLOATS, 50 << 20, rows=1))
    steps = [
        Step(GraphKind.UNARY, 1, False, [source], [wide], reals=[2.0, 1.0]),
        Step(GraphKind.UNARY, 1, False, [wide], [out], reals=[2.0, 1.0]),
    ]
    session = opened(tmp_path / "one.plan", steps, [Value("x", 1, ("images", 1, 1))], [Value("y", 1, ("images", 1, 1))])
    x = np.arange(40, dtype=np.float32).reshape(40, 1, 1)
    found = np.zeros_like(x)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages and "VLM_EDGE_SANITIZED" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    try:
        _native.graph_run(session, {"x": x}, {"y": found})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    np.testing.assert_array_equal(found, 4 * x)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there")
def test_paths_of_any_bytes_are_checked(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.plan")
    path.write_bytes(b"no plan")
    for given in (path, str(path), os.fsencode(path)):
        with pytest.raises(DeviceError, match="is not a plan") as refused:
            _native.check_plan(given)
        assert str(path) in str(refused.value)
