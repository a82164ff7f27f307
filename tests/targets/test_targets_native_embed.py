"""Embeddings as tables: the rows that the graph gives, in floats and in 8 bits, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.targets.native.embed import embedding_plan, graph_rows
from vlm_edge.targets.native.errors import NotExpressible
from vlm_edge.targets.native.plan_file import write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.samples import session
from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import DeviceError

NAMES = ["tiny-llava", "tiny-paligemma", "tiny-idefics"]
"""A table, one whose rows are scaled, and one with the rows of added tokens apart."""


def graph(path: Path) -> Path:
    return open_bundle(path).graph_path("embed_tokens")


def planned(path: Path, out: Path, precision: str) -> PlanSession:
    plan, _ = embedding_plan(ir.load(graph(path)), precision, graph_rows(str(graph(path))))
    write(plan, out)
    return PlanSession(out)


def every_token(path: Path) -> np.ndarray:
    ids = np.arange(len(rows_of(path)))
    np.random.default_rng(0).shuffle(ids)
    return ids[: len(ids) // 2 * 2].reshape(2, -1)


def rows_of(path: Path) -> np.ndarray:
    """The stored tables of a graph, one after another, as its scale leaves them."""
    model = ir.load(graph(path))
    tables = [np.asarray(one.const_value.numpy()) for one in model.graph.initializers.values() if len(one.shape) == 2]
    tables.sort(key=len, reverse=True)
    factors = [
        one.const_value.numpy()
        for one in model.graph.initializers.values()
        if one.dtype == ir.DataType.FLOAT and one.const_value.size == 1
    ]
    return np.concatenate(tables) * (factors[0] if factors else np.float32(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_rows_that_the_graph_gives(portable_bundle, name, tmp_path):
    path = portable_bundle(name)
    ids, table = every_token(path), rows_of(path)
    (found,) = planned(path, tmp_path / "embed_tokens.plan", "fp32").run(None, {"input_ids": ids})
    (wanted,) = session(graph(path)).run(None, {"input_ids": ids})
    assert np.array_equal(found, wanted)
    assert np.array_equal(found, table[ids])


@pytest.mark.parametrize("name", NAMES)
def test_halves_and_bytes_keep_their_distance(portable_bundle, name, tmp_path):
    path = portable_bundle(name)
    ids, table = every_token(path), rows_of(path)
    (halves,) = planned(path, tmp_path / "half.plan", "fp16").run(None, {"input_ids": ids})
    assert np.array_equal(halves, table.astype(np.float16).astype(np.float32)[ids])
    (codes,) = planned(path, tmp_path / "byte.plan", "int8").run(None, {"input_ids": ids})
    most = np.abs(table[ids]).max(axis=-1, keepdims=True) / 254
    assert (np.abs(codes - table[ids]) <= most * (1 + 1e-5)).all()
    assert not np.array_equal(codes, table[ids]), "a difference of nothing would mean that nothing was stored in 8 bits"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_of_any_width_and_zeros(precision, width, tmp_path):
    table = np.random.default_rng(0).standard_normal((50, width)).astype(np.float32)
    table[3] = 0
    session_ = toy(table, tmp_path / "toy.plan", precision)
    (found,) = session_.run(None, {"input_ids": np.array([[0, 3, 49]])})
    assert np.allclose(found[0], table[[0, 3, 49]], atol=np.abs(table).max() / 200)
    assert not found[0, 1].any()


def toy(table: np.ndarray, out: Path, precision: str, run=None) -> PlanSession:
    plan, _ = embedding_plan(toy_model(table), precision, run or (lambda ids: table[ids]))
    write(plan, out)
    return PlanSession(out)


def toy_model(table: np.ndarray) -> ir.Model:
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    stored = ir.Value(
        name="table", shape=ir.Shape(table.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(table)
    )
    node = ir.node("Gather", [stored, ids])
    out = node.outputs[0]
    out.name, out.shape = "inputs_embeds", ir.Shape(["batch", "sequence", table.shape[1]])
    out.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(ir.Graph([ids], [out], nodes=[node], initializers=[stored], opset_imports={"": 23}), ir_version=10)


def test_rows_beyond_half_precision_stay_floats(tmp_path):
    table = np.array([[1e30, 1.0], [2.0, 3.0]], np.float32)
    plan, changes = embedding_plan(toy_model(table), "fp16", lambda ids: table[ids])
    assert "fp16" in changes.notes[0]
    write(plan, tmp_path / "toy.plan")
    (found,) = PlanSession(tmp_path / "toy.plan").run(None, {"input_ids": np.array([[0, 1]])})
    assert np.array_equal(found[0], table)


def test_what_is_no_table_is_said(portable_bundle):
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    with pytest.raises(NotExpressible, match="more than their token"):
        embedding_plan(toy_model(table), "fp16", lambda ids: table[ids] + table[ids].mean(axis=1, keepdims=True))
    with pytest.raises(NotExpressible, match="int4"):
        embedding_plan(toy_model(table), "int4", lambda ids: table[ids])
    with pytest.raises(NotExpressible, match="0 … 49"):
        embedding_plan(toy_model(table), "fp16", lambda ids: table[:40][ids])
    encoder = ir.load(open_bundle(portable_bundle("tiny-llava")).graph_path("vision_encoder"))
    with pytest.raises(NotExpressible, match="int64"):
        embedding_plan(encoder, "fp16", lambda ids: table[ids])


@pytest.mark.parametrize("token", [-1, 50, 2**40])
def test_a_token_without_a_row_is_refused(tmp_path, token):
    table = np.ones((50, 8), np.float32)
    session_ = toy(table, tmp_path / "toy.plan", "int8")
    with pytest.raises(DeviceError, match=f"token {token} is outside its table of 50 rows"):
        session_.run(None, {"input_ids": np.array([[1, token]])})


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    table = np.ones((50, 8), np.float32)
    toy(table, tmp_path / "toy.plan", "fp16")
    native = _native.Session(str(tmp_path / "toy.plan"), "embed_tokens", plan=True)
    tokens = np.zeros((2, 3), np.int64)
    for shape in ((2, 3, 7), (2, 2, 8), (1, 3, 8)):
        with pytest.raises(ValueError, match="each of which has 8 numbers"):
            _native.rows_run(native, tokens, np.empty(shape, np.float32))
    with pytest.raises((TypeError, ValueError)):
        _native.rows_run(native, tokens.astype(np.int32), np.empty((2, 3, 8), np.float32))
    with pytest.raises(TypeError, match="session of a graph"):
        _native.graph_run(native, {"input_ids": tokens}, {"inputs_embeds": np.empty((2, 3, 8), np.float32)})


def test_a_file_that_was_cut_after_it_was_opened_is_an_error(tmp_path):
    if sys.platform == "win32":
        pytest.skip("Windows lets nobody cut a mapped file")
    table = np.ones((5000, 64), np.float32)
    session_ = toy(table, tmp_path / "toy.plan", "fp16")
    with (tmp_path / "toy.plan").open("r+b") as file:
        file.truncate(100_000)
    session_.run(None, {"input_ids": np.array([[1]])})
    with pytest.raises(DeviceError, match="row 4999 of its file cannot be read"):
        session_.run(None, {"input_ids": np.array([[4999]])})


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux says what is resident")
def test_the_table_does_not_become_resident(tmp_path):
    table = np.ones((1 << 17, 64), np.float32)  # 32 MB
    session_ = toy(table, tmp_path / "toy.plan", "fp32")
    session_.run(None, {"input_ids": np.random.default_rng(0).integers(0, len(table), (1, 1000))})
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("toy.plan"))
    resident = next(line for line in lines[start:] if line.startswith("Rss:"))
    assert int(resident.split()[1]) <= 256, "no more than the pages around the signature"


@pytest.mark.parametrize("part", ["signature", "table", "kind"])
def test_damaged_tables_are_refused(tmp_path, part):
    toy(np.ones((500, 64), np.float32), tmp_path / "toy.plan", "int8")
    data = bytearray((tmp_path / "toy.plan").read_bytes())
    if part == "signature":
        data[16 + 4 + 4 + 4 + len("input_ids")] = 1  # the tokens' type
    elif part == "table":
        del data[-4096:]
    else:
        data[16] = 3
    (tmp_path / "toy.plan").unlink()
    (tmp_path / "toy.plan").write_bytes(bytes(data))
    with pytest.raises(DeviceError, match="damaged"):
        PlanSession(tmp_path / "toy.plan")


def test_no_single_wrong_byte_makes_it_read_beyond_its_memory(tmp_path):
    """Refused, or it runs (a wrong number in it may only give wrong numbers): `make asan` watches."""
    path = tmp_path / "toy.plan"
    toy(np.ones((50, 8), np.float32), path, "int8")
    data = path.read_bytes()
    size = int.from_bytes(data[12:16], "little")
    generator = np.random.default_rng(0)
    opened = 0
    for place in generator.integers(16, 16 + size, 200):
        changed = bytearray(data)
        changed[place] = int(generator.integers(0, 256))
        path.unlink()  # what is mapped is never written to
        path.write_bytes(bytes(changed))
        try:
            PlanSession(path).run(None, {"input_ids": np.array([[0, 49]])})
            opened += 1
        except (DeviceError, ValueError, KeyError):
            continue
    assert opened < 200
