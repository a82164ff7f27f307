"""Moves outliers of activations into the weights behind them, so that one int8 scale fits a whole activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import MICROSOFT, add_initializer, consumers, fixed_dim, is_weight, lazy_tensor, rank

Floats = npt.NDArray[np.float32]

_NORMS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    (MICROSOFT, "SkipLayerNormalization"): (2, 3),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (2,),
}
"""Norms → which of their inputs are the gain and the shift of each channel."""
_WIDEST = 1e3
"""A channel shrinks by at most this factor: gains stay within half precision."""


class SmoothActivations(GraphPass):
    """Norm(x) · gain → products with W becomes Norm(x) · (gain / s) → products with s · W: the same result, channel by channel.

    Transformers have a few channels that are a hundred times larger than the others; with one scale for all of an activation,
    the others round to nothing. s = max|xⱼ|^a / max|Wⱼ|^(1−a) shares the range between the two sides (SmoothQuant,
    https://arxiv.org/abs/2211.10438). Here s is divided by its median and at least 1: channels above the middle shrink, none
    grows, for what was small on a few pictures need not be small on the next. How far (`strength` a, 0 to 1) differs from
    model to model, and so does whether it helps at all (1 − cosine of three trained vision encoders in int8, 6 pictures to
    calibrate on, 6 others: 3.0e-4 → 1.6e-4, 4.8e-5 → 2.5e-5, but 1.5e-4 → 7.9e-4): off unless a target's options ask for it.
    With one scale for each row, measured while it runs (CPU plans), five of six get closer and one does not (relative errors
    of tiny-visual_gpt, smolvlm, llava, clip, blip2, paligemma without and with 0.7, on drawn pictures: 0.0128, 0.0056, 0.0127,
    0.0094, 0.0100, 0.0135; 0.0089, 0.0040, 0.0088, 0.0113, 0.0073, 0.0082).
    Done where a norm with stored gain feeds MatMuls with stored weights and nothing else.
    `maxima` gives the largest magnitude of each channel by the norm's output (`calibrate.channel_maxima`).
    """

    name: ClassVar[str] = "smooth_activations"

    def __init__(self, maxima: Mapping[str, Floats], strength: float = 0.5) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, found {strength}")
        self.maxima, self.strength = maxima, strength

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for norm, products in list(smoothable(model.graph).items()):
            top = self.maxima.get(str(norm.outputs[0].name))
            if top is None:
                continue
            weights = list(dict.fromkeys(product.inputs[1] for product in products))
            factors = _factors(top, [np.asarray(w.const_value.numpy()) for w in weights], self.strength)  # type: ignore[union-attr]
            if factors is None or np.allclose(factors, 1):
                continue
            for index in channel_inputs(norm):
                gain = norm.inputs[index]
                if gain is not None:
                    norm.replace_input_with(index, _scaled(model.graph, gain, np.reciprocal(factors)))
            scaled = {weight: _scaled(model.graph, weight, factors[:, None]) for weight in weights if weight is not None}
            for product in products:
                assert product.inputs[1] is not None
                product.replace_input_with(1, scaled[product.inputs[1]])
            changes.add("activations smoothed")
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[name]
        return changes


def smoothable(graph: ir.Graph) -> dict[ir.Node, list[ir.Node]]:
    """Norms with stored gain → the MatMuls with stored weights that alone read them."""
    found: dict[ir.Node, list[ir.Node]] = {}
    for node in graph:
        stored = [node.inputs[index] for index in channel_inputs(node)]
        if not stored or not all(value is None or is_weight(value) for value in stored) or rank(stored[0]) != 1:
            continue
        out, width = node.outputs[0], fixed_dim(stored[0], 0)
        products = consumers(out)
        if out.is_graph_output() or not products:
            continue
        if all(_reads(product, out, width) and _alone(product.inputs[1], products) for product in products):
            found[node] = products
    return found


def channel_inputs(norm: ir.Node) -> tuple[int, ...]:
    """Which inputs of a norm are its gain and its shift; none of another node."""
    places = _NORMS.get((norm.domain, norm.op_type), ())
    return tuple(index for index in places if index < len(norm.inputs))


def _reads(product: ir.Node, value: ir.Value, width: int | None) -> bool:
    if product.op_type != "MatMul" or product.domain or product.inputs[0] is not value:
        return False
    weight = product.inputs[1]
    return is_weight(weight) and rank(weight) == 2 and fixed_dim(weight, 0) == width


def _alone(weight: ir.Value | None, products: list[ir.Node]) -> bool:
    return weight is not None and weight.dtype == ir.DataType.FLOAT and all(user in products for user in consumers(weight))


def _factors(top: Floats, weights: list[npt.NDArray[np.generic]], strength: float) -> Floats | None:
    """s [channels]; 1 where a channel or its weights are all zero. None for weights with NaN or infinity."""
    rows = np.max([np.abs(weight.astype(np.float32)).max(axis=1) for weight in weights], axis=0)
    if not np.isfinite(rows).all() or not np.isfinite(top).all():
        return None
    usable = (top > 0) & (rows > 0)
    found = np.where(usable, top, 1) ** strength / np.where(usable, rows, 1) ** (1 - strength)
    middle = float(np.median(found[usable])) if usable.any() else 1.0
    return np.asarray(np.clip(np.where(usable, found / middle, 1), 1, _WIDEST), np.float32)


def _scaled(graph: ir.Graph, value: ir.Value, factors: Floats) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    name, shape = f"{value.name}.smooth", tuple(int(size) for size in tensor.shape.numpy())
    make: Callable[[], Floats] = lambda: np.asarray(tensor.numpy(), np.float32) * factors  # noqa: E731
    return add_initializer(graph, name, lazy_tensor(name, ir.DataType.FLOAT, shape, make))
