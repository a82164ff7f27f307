"""What the tests of decoders' plans share: plans of portable decoders, calls of every shape, and what plans are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.targets.native.compile import Compiler
from vlm_edge.targets.native.plan_file import write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.pipeline import lower_decoder
from vlm_edge.targets.samples import Samples, run_graph, session
from vlm_edge.targets.selfcheck import Difference
from vlm_edge.targets.steps import STEPS, laid_beside, shared_feeds
from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import open_bundle

LONG = ((1, 70, 90, 0), (1, 150, 3, 0), (1, 1, 230, 0), (2, 5, 7, 3), (3, 3, 0, 0))
"""More tokens than a block of queries, more keys than a block of them, keys in several parts; several tokens of several rows."""
Arrays = dict[str, Any]
Shapes = Iterable[tuple[int, int, int, int]]


def families(fast: Iterable[str], slow: Iterable[str]) -> pytest.MarkDecorator:
    """One test for each bundle's name, those of `slow` marked so."""
    return pytest.mark.parametrize("name", [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)])


def lowered(path: Path, precision: str, block_size: int = 32) -> ir.Model:
    """The bundle's portable decoder, lowered; its head in 8 bits where the layers are not float32."""
    bundle, head = open_bundle(path), "fp32" if precision == "fp32" else "int8"
    model = ir.load(bundle.graph_path("decoder"))
    context = bundle.manifest.contract.context_length
    lower_decoder(model, precision=precision, head=head, context_length=context, block_size=block_size, branches=False)
    return model


def plan_of(path: Path, precision: str, cache: ir.DataType, block_size: int = 32) -> Any:
    """The compiled plan."""
    return Compiler(lowered(path, precision, block_size), cache=cache).compile()


def planned(path: Path, out: Path, precision: str, cache: ir.DataType, block_size: int = 32) -> Path:
    """The compiled plan as a file."""
    write(plan_of(path, precision, cache, block_size), out)
    return out


def calls(path: Path, further: Shapes = LONG) -> Iterator[tuple[Arrays, Arrays]]:
    """Feeds of the portable decoder, and the same for a plan with a cache of its own capacity."""
    bundle = open_bundle(path)
    samples = Samples(bundle)
    for rows, sequence, past, padding in (*STEPS, *further):
        if past + sequence <= bundle.manifest.contract.context_length:
            portable = samples.decoder(sequence=sequence, past=past, rows=rows, padding=padding, seed=sequence)
            yield portable, shared_feeds(portable, capacity=past + sequence + 5)


def beside_the_portable_decoder(
    path: Path, plan: Path, further: Shapes = LONG, kept: Callable[[Any], Any] = lambda array: array
) -> dict[str, Difference]:
    """instruction set → how far the plan is from the portable decoder. `kept`: what a cache makes of its entries."""
    reference = session(open_bundle(path).graph_path("decoder"))
    plans = {kernels or "best": PlanSession(plan, kernels=kernels) for kernels in ("scalar", None)}
    differences = {name: Difference() for name in plans}
    for portable, feeds in calls(path, further):
        fed = {name: kept(array) if name.startswith("past_key_values.") else array for name, array in portable.items()}
        wanted = run_graph(reference, fed)
        for name, one in plans.items():
            for _, got, expected in laid_beside(run_graph(one, feeds), wanted, portable):
                differences[name].add(got, expected)
    return differences


def same_bits_on_every_number_of_threads(path: Path, plan: Path) -> None:
    """2 to 8 threads beside one."""
    cases = [feeds for _, feeds in calls(path)]
    wanted = [run_graph(PlanSession(plan), feeds) for feeds in cases]
    for threads in range(2, 9):
        several = PlanSession(plan, threads=threads)
        for feeds, expected in zip(cases, wanted, strict=True):
            for name, array in run_graph(several, feeds).items():
                np.testing.assert_array_equal(array, expected[name], err_msg=f"{threads} threads")


def alike_in_every_instruction_set(path: Path, plan: Path, part: float) -> None:
    """All that this CPU has beside plain C: within `part` of an array's largest number."""
    plain = PlanSession(plan, kernels="scalar")
    for name in _native.kernels():
        fast = PlanSession(plan, kernels=name)
        for _, feeds in calls(path):
            got, wanted = run_graph(fast, feeds), run_graph(plain, feeds)
            for key, array in wanted.items():
                assert np.abs(got[key].astype(np.float64) - array).max() < part * np.abs(array).max(), (name, key)
