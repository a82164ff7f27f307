"""What rows are bound to, on both engines: what holds how long, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from toy_bench import PROMPTS, TOYS, close
from toy_decoder import Toy
from toy_reference import Source, random_source

from vlm_edge_runtime.engines import SamplingParams


def test_an_emptied_row_can_be_bound_anew(bench) -> None:
    state = bench.filled()
    state.decode(3)
    state.truncate(0, 0)
    other = random_source(bench.toy, 14, len(PROMPTS[0]), seed=17)  # a longer one than any before
    bench.fill(state, 0, PROMPTS[0], other)
    produced = state.decode(4)
    assert produced[0].tokens == bench.reference.greedy(PROMPTS[0], other, 4)
    assert [row.tokens for row in produced[1:]] == [bench.expected(row, 7)[3:] for row in (1, 2)]
    if not bench.toy.recurrent:
        return
    state.truncate(1, 0)  # back to the state it was bound to
    bench.prefill(state, 1, PROMPTS[1], bench.source(1).prompt)
    close(state.logits(1), bench.reference.run(PROMPTS[1], bench.source(1))["logits"])


def test_binding_that_does_not_fit_is_refused(make) -> None:
    bench = make(TOYS["recurrent and cached"])
    state = bench.decoder.allocate(2, 16)
    bound = bench.source(0).bound
    wide = bound["cross_key_values.1.value"]
    cases = [
        ({}, "'encoder_attention_mask'.* missing"),
        ({name: array for name, array in bound.items() if name != "state.0"}, "'state.0' is missing: all of a row's inputs"),
        (bound | {"extra": wide}, "no input 'extra' to bind; it takes .*'cross_key_values.0.key'"),
        (
            bound | {"cross_key_values.1.value": wide[:, :3]},
            r"cross_key_values.1.value has size 3 in dimension 1 \(source\), expected 4",
        ),
        (bound | {"cross_key_values.1.value": wide[:, :, :5]}, r"has size 5 in dimension 2 \(16\), expected 16"),
        (bound | {"cross_key_values.1.value": wide[None]}, r"has 4 dimensions, expected 3: \[4, source, 16\]"),
        (bound | {"state.0": np.zeros(31, np.float32)}, "state.0 has size 31"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            state.bind(0, given)
    with pytest.raises(TypeError, match="encoder_attention_mask is float32, expected int64"):
        state.bind(0, bound | {"encoder_attention_mask": bound["encoder_attention_mask"].astype(np.float32)})
    with pytest.raises(ValueError, match="row 2 is outside the batch of 2"):
        state.bind(2, bound)
    with pytest.raises(ValueError, match="row 0 is not bound"):
        bench.prefill(state, 0, PROMPTS[0], None)
    assert state.lengths == [0, 0]
    state.bind(0, bound)
    state.bind(0, bound)
    bench.prefill(state, 0, PROMPTS[0], bench.source(0).prompt)
    with pytest.raises(ValueError, match="row 0 has 5 entries: truncate it to 0"):
        state.bind(0, bound)


def test_values_per_token_that_do_not_fit_are_refused(make) -> None:
    bench = make(TOYS["masks and features per token"])
    state = bench.decoder.allocate(1, 16)
    source = bench.source(0)
    bench.bind(state, 0, source)
    prompt = source.prompt
    cases = [
        ({"block_ids": np.zeros(5, np.int64)}, "no per-token input 'block_ids'; it takes .*'deepstack.0'"),
        (prompt | {"deepstack.0": prompt["deepstack.0"][:4]}, r"deepstack.0 has size 4 in dimension 0 \(5\), expected 5"),
        (
            prompt | {"cross_attention_mask": np.ones((5, 7), np.int64)},
            r"cross_attention_mask has size 7 .*\(source\), expected 4",
        ),
        (prompt | {"deepstack.0": prompt["deepstack.0"][0]}, r"deepstack.0 has 1 dimensions, expected 2: \[5, 32\]"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            bench.prefill(state, 0, PROMPTS[0], given)
    with pytest.raises(TypeError, match=r"deepstack\.0 is float64, expected float32"):
        bench.prefill(state, 0, PROMPTS[0], prompt | {"deepstack.0": prompt["deepstack.0"].astype(np.float64)})
    assert state.lengths == [0]
    bench.prefill(state, 0, PROMPTS[0], prompt)
    for given, message in [
        ({"deepstack.1": source.later["deepstack.0"]}, "no per-token input 'deepstack.1'"),
        ({"deepstack.0": prompt["deepstack.0"]}, r"deepstack.0 has 2 dimensions, expected 1: \[32\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            state.start(0, SamplingParams(), np.zeros(0, np.int64), 5, given)
    with pytest.raises(ValueError, match="no per-token input 'x'; it takes none"):
        plain = make(Toy())
        plain.prefill(plain.decoder.allocate(1, 8), 0, [1], {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="no input 'x' to bind; it takes none"):
        plain.decoder.allocate(1, 8).bind(0, {"x": np.zeros(1, np.float32)})


def test_sources_of_unlike_length_need_a_mask(make) -> None:
    bench = make(Toy(cross=True, source_mask=False))
    state = bench.decoder.allocate(2, 32)
    long, short = bench.source(0), bench.source(1)
    state.bind(0, long.bound)
    with pytest.raises(ValueError, match="row 1 has size 8 in 'source', another row has 4: they cannot run together"):
        state.bind(1, short.bound)
    bench.fill(state, 1, PROMPTS[0], long)
    state.truncate(1, 0)
    state.truncate(0, 0)
    # Row 1's work is over: it does not stand in the way, and loses what it was bound to.
    state.bind(0, long.bound)
    bench.prefill(state, 0, PROMPTS[0], None)
    state.truncate(0, 0)
    bench.fill(state, 1, PROMPTS[1], short)
    assert state.decode(4)[1].tokens == bench.reference.greedy(PROMPTS[1], short, 4)
    with pytest.raises(ValueError, match="row 0 is not bound"):
        bench.prefill(state, 0, PROMPTS[0], None)


def test_binding_holds_until_the_next_one(make) -> None:
    bench = make(TOYS["cross-attention"])
    state = bench.filled()
    for row in range(3):
        state.truncate(row, 0)
    other = random_source(bench.toy, 3, 0, seed=9)
    bench.fill(state, 0, PROMPTS[0], other)
    for row in (1, 2):  # bound before, to sources both longer and shorter than row 0's
        bench.prefill(state, row, PROMPTS[row], None)
        bench.start(state, row, PROMPTS[row], bench.source(row))
    expected = [bench.reference.greedy(PROMPTS[0], other, 4), bench.expected(1, 4), bench.expected(2, 4)]
    assert [row.tokens for row in state.decode(4)] == expected


def test_an_array_that_all_rows_share(make) -> None:
    bench = make(TOYS["no cache at all"])
    state = bench.decoder.allocate(2, 32)
    source = bench.source(0)
    shifted = source.bound | {"shift": source.bound["shift"] + 1}
    state.bind(0, source.bound)
    with pytest.raises(ValueError, match="row 1 has other values of 'shift' than another row, which is one array for all rows"):
        state.bind(1, shifted)
    bench.prefill(state, 0, PROMPTS[0], None)
    with pytest.raises(ValueError, match="other values of 'shift'"):
        state.bind(1, shifted)
    state.truncate(0, 0)
    state.bind(1, shifted)  # row 0's work is over
    bench.prefill(state, 1, PROMPTS[0], None)
    close(state.logits(1), bench.reference.run(PROMPTS[0], Source(shifted))["logits"])
    with pytest.raises(ValueError, match="row 0 is not bound"):
        bench.prefill(state, 0, PROMPTS[0], None)


def test_images_per_token_must_be_said(make) -> None:
    bench = make(TOYS["images per token"])
    state = bench.decoder.allocate(2, 32)
    source = bench.source(1)
    bench.bind(state, 0, source)
    with pytest.raises(ValueError, match=r"'image_attention_mask'.* must be given: nothing else says how large 'images' is"):
        bench.prefill(state, 0, PROMPTS[1], None)
    bench.prefill(state, 0, PROMPTS[1], source.prompt)
    values = {name: np.ones((1, 4), np.int64) for name in source.prompt}
    with pytest.raises(ValueError, match=r"cross_attention_mask has size 4 in dimension 1 \(source\), expected 8"):
        bench.prefill(state, 0, [1], values)
    with pytest.raises(ValueError, match=r"image_attention_mask has size 5 in dimension 0 \(images\), expected 4"):
        state.start(0, SamplingParams(), np.zeros(0, np.int64), 2, {"image_attention_mask": np.ones(5, np.int64)})
    state.truncate(0, 0)
    bench.bind(state, 0, bench.source(0))
    bench.prefill(state, 0, PROMPTS[0], bench.source(0).prompt)
    close(state.logits(0), bench.reference.run(PROMPTS[0], bench.source(0))["logits"])
