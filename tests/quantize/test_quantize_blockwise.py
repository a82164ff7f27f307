"""The arithmetic of blockwise quantisation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_edge.quantize.blockwise import BlockFormat, choose_scales, dequantize, pack, quantize, unpack


def round_trip(weight, form):
    scales, zeros = choose_scales(weight, form)
    return dequantize(quantize(weight, scales, zeros, form), scales, zeros, form, weight.shape[1]), scales


formats = st.builds(
    BlockFormat,
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
    scheme=st.sampled_from(["mse", "absmax"]),
)


@settings(max_examples=60, deadline=None)
@given(form=formats, rows=st.integers(1, 9), width=st.integers(1, 150), seed=st.integers(0, 10_000), power=st.integers(-20, 20))
def test_error_is_within_the_step(form, rows, width, seed, power):
    """absmax: half a step everywhere. mse: never a larger squared error per block than absmax's."""
    weight = (np.random.default_rng(seed).standard_normal((rows, width)) * 2.0**power).astype(np.float32)
    back, scales = round_trip(weight, form)
    assert back.shape == weight.shape and np.isfinite(back).all()
    if form.scheme == "absmax" and form.symmetric:
        step = np.repeat(np.abs(scales), form.block_size, axis=1)[:, :width]
        assert (np.abs(back - weight) <= step * (0.5 + 1e-4)).all()
    plain, _ = round_trip(weight, BlockFormat(form.bits, form.block_size, form.symmetric, "absmax"))
    assert np.square(back - weight).sum() <= np.square(plain - weight).sum() * (1 + 1e-4)


def test_mse_beats_absmax_clearly_on_gaussian_weights():
    """Max-scaled rounding of 32 Gaussian values spends its range on one of them."""
    weight = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    errors = {s: np.linalg.norm(round_trip(weight, BlockFormat(scheme=s))[0] - weight) for s in ("mse", "absmax")}
    assert errors["mse"] < 0.9 * errors["absmax"]


def test_extremes():
    """Zeros, a single spike, one sign, tiny and huge magnitudes."""
    weight = np.zeros((6, 64), np.float32)
    weight[1, 5] = 3.0
    weight[2] = np.linspace(1, 2, 64)
    weight[3] = -np.linspace(1, 2, 64)
    weight[4] = 1e-30
    weight[5] = 1e30
    for bits in (4, 8):
        for symmetric in (True, False):
            back, scales = round_trip(weight, BlockFormat(bits=bits, symmetric=symmetric))
            assert np.isfinite(back).all() and (scales != 0).all()
            assert (back[0] == 0).all() and back[1, 5] == pytest.approx(3.0, rel=1e-6)
            assert np.abs(back[[2, 3, 5]] / weight[[2, 3, 5]] - 1).max() < (0.15 if bits == 4 else 0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_a_number(bad):
    weight = np.ones((2, 32), np.float32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose_scales(weight, BlockFormat())


@pytest.mark.parametrize("arguments", [{"bits": 3}, {"block_size": 48}])
def test_refuses_formats_that_do_not_exist(arguments):
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        BlockFormat(**arguments)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), seed=st.integers(0, 1000))
def test_packing_keeps_every_code(width, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (3, width)).astype(np.uint8)
    packed = pack(codes, 4)
    assert packed.shape == (3, -(-width // 2))
    assert (unpack(packed, 4)[:, :width] == codes).all()
    assert packed[0, 0] & 0xF == codes[0, 0], "the first code is the low half"


def test_large_weights_go_in_parts(monkeypatch):
    from vlm_edge.quantize import blockwise

    weight = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    whole = round_trip(weight, BlockFormat())[0]
    monkeypatch.setattr(blockwise, "_CHUNK", 64 * 7)
    assert (round_trip(weight, BlockFormat())[0] == whole).all()
