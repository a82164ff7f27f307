"""Every exported graph against the original PyTorch model, on several shapes.

The difference of two tensors is the largest absolute difference divided by the largest absolute value of the reference, where
that is above 1: `max|a − b| / max(1, max|b|)`. fp32 holds 24 bits, about 6e-8; summation order costs some tens to hundreds of
that, so 1e-4 is met with room by an equal graph and missed by a wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from transformers import PreTrainedModel

from vlm_edge.families.base import Case, GraphPlan
from vlm_edge_runtime.bundle.manifest import Check
from vlm_edge_runtime.errors import ExportError

from .attention import attention_implementation
from .trace import quiet

TOLERANCE = 1e-4
"""Largest allowed difference of a float32 graph, as defined above."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """Two tensors compared: `max_abs`, `scaled` (see the module), and the cosine of the two as vectors."""

    max_abs: float
    scaled: float
    cosine: float

    @property
    def within(self) -> bool:
        """False also for NaN, which compares false with everything."""
        return self.scaled <= TOLERANCE


def difference(found: npt.ArrayLike, expected: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Difference:
    """Compares where `mask` is true. Different shapes, any NaN, and an infinity on one side only give NaN: never within."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return Difference(np.nan, np.nan, np.nan)
    if mask is not None:
        chosen = np.broadcast_to(np.asarray(mask, bool), a.shape)
        a, b = a[chosen], b[chosen]
    if a.size == 0:
        return Difference(0.0, 0.0, 1.0)
    same = (a == b) & ~np.isfinite(a)  # equal infinities, as some models write into their logits
    if not (np.isfinite(a) & np.isfinite(b) | same).all():
        return Difference(np.nan, np.nan, np.nan)
    a, b = np.where(same, 0.0, a), np.where(same, 0.0, b)
    largest = float(np.abs(a - b).max())
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float((a * b).sum() / norms) if norms else float(largest == 0.0)
    return Difference(largest, largest / max(1.0, float(np.abs(b).max())), cosine)


def check(plan: GraphPlan, model: PreTrainedModel, file: Path) -> Check:
    """Runs an exported graph in ONNX Runtime on all cases of its plan, beside the original model with eager attention.

    Raises ExportError naming graph, case, output and numbers at the first one that differs.
    """
    session = _session(file, plan.role)
    names = [spec.name for spec in plan.inputs]
    taken = {value.name for value in session.get_inputs()}
    worst = Difference(0.0, 0.0, 1.0)
    for case in plan.cases:
        with torch.no_grad(), attention_implementation(model, "eager"), quiet():
            inputs = plan.sample(case)
            expected = plan.reference(case, inputs)
            masks = plan.compared(case, inputs)
        feed = {name: tensor.detach().numpy() for name, tensor in zip(names, inputs, strict=True) if name in taken}
        try:
            found = session.run([spec.name for spec in plan.outputs], feed)
        except Exception as error:  # onnxruntime raises bare Exceptions of its own
            raise ExportError(f"Graph '{plan.role}' failed in ONNX Runtime on case '{case.label}': {error}") from error
        for i, spec in enumerate(plan.outputs):
            one = difference(found[i], expected[i].detach().numpy(), None if masks is None else masks[i].numpy())
            if not one.within:
                _fail(plan, case, spec.name, one, np.shape(found[i]), tuple(expected[i].shape))
            worst = Difference(max(worst.max_abs, one.max_abs), max(worst.scaled, one.scaled), min(worst.cosine, one.cosine))
    return Check(
        verdict="PASS",
        subject=plan.role,
        metric={"max_abs": worst.max_abs, "scaled": worst.scaled, "cosine": worst.cosine},
        tolerance={"scaled": TOLERANCE},
        cases=len(plan.cases),
        note="; ".join(case.label for case in plan.cases),
    )


def _session(file: Path, role: str) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    try:
        return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"Graph '{role}' was written but ONNX Runtime cannot load it: {error}") from error


def _fail(plan: GraphPlan, case: Case, output: str, one: Difference, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ExportError(f"Graph '{plan.role}', case '{case.label}': {output} has shape {found}, PyTorch's has {expected}.")
    raise ExportError(
        f"Graph '{plan.role}', case '{case.label}': {output} differs from PyTorch by {one.scaled:.3g} of its largest value "
        f"(absolute {one.max_abs:.3g}, cosine {one.cosine:.6f}); {TOLERANCE:g} is allowed."
    )
