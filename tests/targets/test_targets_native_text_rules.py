"""Which rules of masks, tokens and table rows become steps: those that the steps have, and none that is only nearly one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_edge.targets.native import encoder_texts
from vlm_edge.targets.native.encoder import EncoderCompiler
from vlm_edge.targets.native.errors import NotExpressible
from vlm_edge.targets.native.plan_file import GraphKind, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.samples import run_graph, session
from vlm_edge_runtime.errors import DeviceError

WIDTH, ROWS, LENGTH = 4, 50_000, 9
END = 49_407
"""The end of a text, as CLIP numbers it."""


def graph(body: str, out: str, length: str = str(LENGTH), **tables: np.ndarray) -> ir.Model:
    """A graph over `ids` and `mask` [texts, length]; `rows`: what a table of 50,000 has for the ids."""
    text = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (int64[texts, {length}] ids, int64[texts, {length}] mask) => (float[{out}] y)
    <int64 zero = {{0}}, int64 one = {{1}}, int64[1] two = {{2}}, int64 hundred = {{100}}, int64 end = {{{END}}},
     int64[1] first = {{1}}, int64[2] heads = {{1, 2}}, bool yes = {{1}}, float seen = {{0}}, float hidden = {{-3e38}}> {{
        rows = Gather(table, ids)
        {body}
    }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    generator = np.random.default_rng(0)
    for name, array in {"table": generator.standard_normal((ROWS, WIDTH)).astype(np.float32), **tables}.items():
        stored = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape), type=None)
        stored.dtype = ir.DataType.FLOAT
        for node in model.graph:
            for place, value in enumerate(node.inputs):
                if value is not None and value.name == name:
                    node.replace_input_with(place, stored)
        model.graph.register_initializer(stored)
    return model


def picking(body: str) -> ir.Model:
    """`at`: of each text, the row that is taken."""
    batch = "n = Shape<start=0, end=1>(ids) m = Squeeze(n) r = Range(zero, m, one) left = Unsqueeze(r, first)"
    taken = "right = Unsqueeze(at, first) index = Concat<axis=1>(left, right) y = GatherND(rows, index)"
    return graph(f"{batch} {body} {taken}", f"texts, {WIDTH}")


def masking(body: str) -> ir.Model:
    """`keep`: of each text, the keys that are seen."""
    attention = "y = com.microsoft.MultiHeadAttention<num_heads=1>(rows, rows, rows, , , more)"
    spread = "wide = Unsqueeze(keep, heads) four = Shape(wide) n = Shape<start=0, end=1>(ids) l = Shape<start=1, end=2>(ids)"
    shape = "shape = Concat<axis=0>(n, first, l, l) all = Expand(wide, shape) more = Where(all, seen, hidden)"
    return graph(f"{body} {spread} {shape} {attention}", f"texts, {LENGTH}, {WIDTH}")


def naming(body: str, rows: int) -> ir.Model:
    """`at`: of each token, the row of a table of so many."""
    small = np.random.default_rng(1).standard_normal((rows, WIDTH)).astype(np.float32)
    return graph(f"{body} more = Gather(small, at) y = Add(rows, more)", f"texts, {LENGTH}, {WIDTH}", small=small)


RULES = {
    "largest": picking("at = ArgMax<axis=1, keepdims=0>(ids)"),
    "equal": picking("hit = Equal(ids, end) low = Cast<to=6>(hit) at = ArgMax<axis=1, keepdims=0>(low)"),
    "last": picking("sum = ReduceSum<keepdims=0>(mask, first) at = Sub(sum, one)"),
    "valid": masking("keep = Cast<to=9>(mask)"),
    "not padding": masking("no = Equal(ids, zero) keep = Not(no)"),
    "row": naming("at = Identity(mask)", 2),
}
NEARLY = {
    "largest below": picking("some = Min(ids, hundred) at = ArgMax<axis=1, keepdims=0>(some)"),
    "at least": picking("hit = GreaterOrEqual(ids, end) low = Cast<to=6>(hit) at = ArgMax<axis=1, keepdims=0>(low)"),
    "last equal": picking("h = Equal(ids, end) low = Cast<to=6>(h) at = ArgMax<axis=1, keepdims=0, select_last_index=1>(low)"),
    "index of the last": picking("low = Cast<to=6>(mask) at = ArgMax<axis=1, keepdims=0, select_last_index=1>(low)"),
    "count of ones": picking("h = Equal(ids, one) k = Cast<to=7>(h) sum = ReduceSum<keepdims=0>(k, first) at = Sub(sum, one)"),
    "valid but one token": masking("a = Cast<to=9>(mask) no = Equal(ids, end) b = Not(no) keep = And(a, b)"),
    "valid or one token": masking("a = Cast<to=9>(mask) b = Equal(ids, end) keep = Or(a, b)"),
    "ones": masking("keep = Equal(ids, one)"),
    "one row": naming("at = Min(ids, zero)", 1),
    "two rows": naming("at = Min(ids, one)", 2),
}


def feeds_of(texts: int = 6, length: int = LENGTH) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    ids = generator.integers(0, 3, (texts, length))
    ids[generator.random(ids.shape) < 0.2] = END
    mask = generator.integers(0, 2, (texts, length))
    mask[:, 0] = 1
    return {"ids": ids, "mask": mask}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_has_a_step_is_known(name, tmp_path):
    model, feeds = RULES[name], feeds_of()
    feeds["ids"][:, 0] = END  # every token sees one that is no padding
    write(EncoderCompiler(model).compile(), tmp_path / "one.plan")
    ir.save(model, tmp_path / "one.onnx")
    wanted = run_graph(session(tmp_path / "one.onnx"), feeds)["y"]
    np.testing.assert_allclose(run_graph(PlanSession(tmp_path / "one.plan"), feeds)["y"], wanted, atol=1e-5)


@pytest.mark.parametrize("name", NEARLY)
def test_a_rule_that_is_nearly_one_is_refused(name):
    with pytest.raises(NotExpressible, match=r"unknown rule|by numbers that no input has"):
        EncoderCompiler(NEARLY[name]).compile()


def test_a_mask_is_looked_at_once_for_all_layers(monkeypatch):
    model, seen, rule = RULES["valid"].clone(), [], encoder_texts._rule
    last = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    given = [*[last.outputs[0]] * 3, *last.inputs[3:]]
    again = ir.Node("com.microsoft", "MultiHeadAttention", given, list(last.attributes.values()))
    again.outputs[0].shape, again.outputs[0].dtype = last.outputs[0].shape, ir.DataType.FLOAT
    model.graph.append(again)
    model.graph.outputs[0] = again.outputs[0]
    monkeypatch.setattr(encoder_texts, "_rule", lambda *given: seen.append(given) or rule(*given))
    plan = EncoderCompiler(model).compile()
    assert sum(step.kind == GraphKind.ATTENTION for step in plan.steps) == 2 and len(seen) == 1


def test_a_length_that_is_made_even_is_refused():
    """Of odd lengths it would be one more."""
    odd = "n = Shape<start=1, end=2>(ids) odd = Mod(n, two) none = Sub(first, first) pad = Slice(small, none, odd, first)"
    body = f"{odd} keys = Concat<axis=1>(rows, pad) y = com.microsoft.MultiHeadAttention<num_heads=1>(rows, keys, keys)"
    model = graph(body, f"texts, length, {WIDTH}", "length", small=np.ones((1, 1, WIDTH), np.float32))
    EncoderCompiler(model, length=7).compile()
    with pytest.raises(NotExpressible, match="the length"):
        EncoderCompiler(model).compile()


@pytest.mark.parametrize("empty", ["ids", "mask"])
def test_a_size_of_0_is_no_size_of_others(empty, tmp_path):
    body = "more = Gather(small, mask) y = Add(rows, more)"
    model = graph(body, f"texts, length, {WIDTH}", "length", small=np.ones((2, WIDTH), np.float32))
    write(EncoderCompiler(model).compile(), tmp_path / "one.plan")
    plan, feeds = PlanSession(tmp_path / "one.plan"), feeds_of()
    for other in (5, 14):  # 14: what sizes in the file are for
        sizes = {"ids": other, "mask": other, empty: 0}
        with pytest.raises(DeviceError, match="has size"):
            run_graph(plan, {name: np.zeros((2, size), np.int64) for name, size in sizes.items()})
    with pytest.raises(DeviceError, match="a length of 0"):
        run_graph(plan, {name: np.zeros((2, 0), np.int64) for name in feeds})
    assert run_graph(plan, feeds)["y"].shape == (6, LENGTH, WIDTH)
