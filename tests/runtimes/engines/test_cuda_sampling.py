"""The sampling kernels compiled for the host, against the C sampler: the same tokens from the same logits and seeds."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from host_device import HostDevice
from host_kernels import HostKernels

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.engines.cuda_layout import CONTROL, EMITTED, FINISHED, RECORD, ROW, STEP, status_text
from vlm_edge_runtime.engines.cuda_sampler import RowSampler, on_device
from vlm_edge_runtime.errors import DeviceError

VOCAB, BLOCKS, SLOTS, STEPS = 203, 4, 4, 12
NEVER = -float("inf")
CASES = {
    "greedy": SamplingParams(),
    "greedy, log probabilities": SamplingParams(logprobs=0),
    "temperature": SamplingParams(temperature=0.7, seed=3),
    "hot, log probabilities": SamplingParams(temperature=5.0, seed=3, logprobs=0),
    "top-k": SamplingParams(temperature=1.0, top_k=5, seed=9),
    "top-k beyond the vocabulary": SamplingParams(temperature=1.0, top_k=1000, seed=9),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8, seed=2**63 + 5),
    "small top-p": SamplingParams(temperature=1.0, top_p=0.01, seed=1),
    "top-p of nearly all": SamplingParams(temperature=1.0, top_p=1 - 1e-16, seed=1),
    "min-p": SamplingParams(temperature=1.3, min_p=0.2, seed=8),
    "all filters": SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05, seed=77, repetition_penalty=1.3),
    "penalty": SamplingParams(repetition_penalty=1.7),
    "shortest length": SamplingParams(min_length=9, eos_token_ids=(1, 2, 3, 4, 5), temperature=0.5, seed=6),
    "n-grams": SamplingParams(no_repeat_ngram_size=2, temperature=0.4, seed=3),
    "single tokens once": SamplingParams(no_repeat_ngram_size=1),
    "rules": SamplingParams(
        temperature=0.9,
        seed=5,
        repetition_penalty=0.8,
        no_repeat_ngram_size=3,
        suppress_tokens=tuple(range(0, VOCAB, 3)),
        begin_suppress_tokens=((6, tuple(range(0, VOCAB, 2))), (8, (7,))),
        forced_tokens=((7, (11, 13)), (9, (17,))),
        sequence_bias=(((5,), 3.0), ((11, 6), 2.5), ((40,), NEVER), ((5,), -1.25), ((7, 8), NEVER), ((99,), 0.5)),
    ),
}


@pytest.fixture(scope="module", name="kernels")
def _kernels(tmp_path_factory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


class Rows:
    """Some rows sampled together on the host-compiled kernels."""

    def __init__(
        self, kernels: HostKernels, folder: Path, params: list[SamplingParams], history: list[int], threads: int
    ) -> None:
        self.kernels, self.threads = kernels, threads
        self.device = HostDevice(kernels, folder)
        self.stride = VOCAB + 5
        batch = len(params)
        self.rows = np.zeros(batch, ROW)
        self.control, self.step = np.zeros(1, CONTROL), np.zeros(1, STEP)
        self.ring = np.zeros((SLOTS, batch), RECORD)
        self.arrays = {
            "logits": np.zeros((batch, self.stride), np.float32),
            "scores": np.zeros((batch, self.stride), np.float32),
            "weights": np.full((batch, self.stride), np.nan),
            "partials": np.zeros((batch, BLOCKS)),
            "ids": np.zeros(batch, np.int32),
        }
        step = self.step[0]
        for name, array in (self.arrays | {"rows": self.rows, "control": self.control, "ring": self.ring}).items():
            step[name] = array.ctypes.data
        step["stride"], step["batch"], step["vocab"], step["slots"], step["blocks"] = self.stride, batch, VOCAB, SLOTS, BLOCKS
        step["capacity"] = step["bucket"] = 1000
        self.samplers = [RowSampler(self.device, VOCAB) for _ in params]
        for row, sampler, given in zip(self.rows, self.samplers, params, strict=True):
            row["pending"], row["active"] = -1, 1
            sampler.arm(row, given, np.array(history, np.int64), 100)
        self.device.synchronize()

    def launch(self, name: str, blocks: int = 1) -> None:
        one = name in ("vlm_begin", "vlm_finish")
        self.kernels.launch(name, self.step.ctypes.data, (blocks, 1 if one else len(self.rows)), self.threads)

    def sample(self, logits: np.ndarray) -> np.ndarray:
        """Records of one step, after the tokens of the step before were run."""
        self.arrays["logits"][:, :VOCAB] = logits
        for name, blocks in (
            ("vlm_begin", 1),
            ("vlm_finish", 1),
            ("vlm_controls", 1),
            ("vlm_weights", BLOCKS),
            ("vlm_choose", 1),
        ):
            self.launch(name, blocks)
        return self.ring[(self.control[0]["slot"] - 1) % SLOTS].copy()


def _logits(kind: str, random: np.random.Generator, rows: int) -> np.ndarray:
    if kind == "wide":
        return (8 * random.standard_normal((rows, VOCAB))).astype(np.float32)
    if kind == "ties":
        return np.round(1.5 * random.standard_normal((rows, VOCAB))).astype(np.float32) / 2
    found = random.standard_normal((rows, VOCAB)).astype(np.float32)
    found[:, ::7] = NEVER
    return found


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("kind", ["wide", "ties", "with minus infinity"])
def test_host_compiled_kernels_choose_as_the_c_sampler(kernels, tmp_path, kind, threads) -> None:
    random = np.random.default_rng(len(kind))
    params = list(CASES.values())
    history = [5, 7, 8, 5, 7]
    rows = Rows(kernels, tmp_path, params, history, threads)
    references = [_native.Sampler(VOCAB, given) for given in params]
    for reference in references:
        for token in history:
            reference.accept(token)
    for _ in range(STEPS if threads == 1 else STEPS // 2):
        logits = _logits(kind, random, len(params))
        records = rows.sample(logits)
        for name, given, reference, record, values in zip(CASES, params, references, records, logits, strict=True):
            token, logprob, _ = reference.choose(values)
            assert (record["token"], status_text(int(record["flags"]))) == (token, None), name
            if given.logprobs == 0:
                assert record["logprob"] == pytest.approx(logprob, abs=1e-12), name
            reference.accept(token)
        for row in rows.rows:
            row["active"] = 1  # EOS does not end this comparison


def test_eos_ends_a_row_and_the_others_go_on(kernels, tmp_path) -> None:
    rows = Rows(kernels, tmp_path, [SamplingParams(eos_token_ids=(3, 9)), SamplingParams(eos_token_ids=(4,))], [], 2)
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 9] = 1
    first = rows.sample(logits)
    assert first["token"].tolist() == [9, 9] and first["flags"].tolist() == [EMITTED | FINISHED, EMITTED]
    second = rows.sample(logits)
    assert second["token"].tolist() == [-1, 9] and second["flags"].tolist() == [0, EMITTED]
    assert rows.rows["length"].tolist() == [0, 1] and rows.rows["pending"].tolist() == [9, 9]


@pytest.mark.parametrize(
    ("given", "values", "text"),
    [
        (SamplingParams(), {5: np.nan}, "NaN"),
        (SamplingParams(temperature=1.0), {5: np.inf}, "infinity"),
        (SamplingParams(temperature=1e-38), {5: 1e30}, "infinity"),
        (SamplingParams(), dict.fromkeys(range(VOCAB), NEVER), "only minus infinity"),
        (SamplingParams(suppress_tokens=tuple(range(VOCAB))), {}, "no token that the generation options"),
    ],
)
def test_unusable_logits_are_told_as_the_c_sampler_tells_them(kernels, tmp_path, given, values, text) -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    for place, value in values.items():
        logits[0, place] = value
    rows = Rows(kernels, tmp_path, [given], [], 4)
    with pytest.raises(DeviceError, match=text):
        _native.Sampler(VOCAB, given).choose(logits[0])
    (record,) = rows.sample(logits)
    found = status_text(int(record["flags"]))
    assert found is not None and found.startswith(text) and record["token"] == -1 and rows.rows[0]["active"] == 0


def test_a_wrong_kernel_would_show(kernels, tmp_path) -> None:
    """The comparison above is not blind: one more draw, or another penalty, gives other tokens."""
    base = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2)
    random = np.random.default_rng(0)
    logits = random.standard_normal((1, VOCAB)).astype(np.float32)
    right = Rows(kernels, tmp_path, [base], [1, 2], 1).sample(logits)[0]["token"]
    shifted = Rows(kernels, tmp_path, [base], [1, 2], 1)
    shifted.rows["draws"] = 1
    other = Rows(kernels, tmp_path, [replace(base, repetition_penalty=8.0, temperature=0.0)], [int(logits.argmax())], 1)
    assert shifted.sample(logits)[0]["token"] != right
    assert other.sample(logits)[0]["token"] != logits.argmax()


def test_what_the_kernels_do_not_know_is_the_c_samplers() -> None:
    assert on_device(SamplingParams(logprobs=0)) and not on_device(SamplingParams(logprobs=3))


def test_structures_are_those_of_the_c_loop() -> None:
    class Record(ctypes.Structure):
        _fields_ = (("token", ctypes.c_int32), ("flags", ctypes.c_int32), ("logprob", ctypes.c_double))

    assert RECORD.itemsize == ctypes.sizeof(Record) == 16
