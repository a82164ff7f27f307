"""Takes what is constant in an activation out of it, so that its 8 bits are spent on what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, consumers, fixed_dim, is_weight, lazy_tensor, like, rank, substitute

from .smooth import channel_inputs, smoothable

Floats = npt.NDArray[np.float32]


class CentreActivations(GraphPass):
    """LayerNorm(x) + b → products with W becomes LayerNorm(x) + (b − m) → products with W, plus m · W: the same result.

    In trained transformers a few channels are ten and more times as large as the others and much the same for every row; the
    scale of a row is theirs, and the other channels round to few codes. With each channel's mean m taken out, what is left is
    small, and nothing is computed that was not before (the shift of "Outlier Suppression+", https://arxiv.org/abs/2304.09145).
    A mean that does not hold for other inputs costs a wider range, never a wrong result; so it wants pictures like those to come.
    Done where a norm with stored weights feeds MatMuls with stored weights and nothing else. `means`: the mean of each channel
    by the norm's output (`calibrate.channel_means`).
    """

    name: ClassVar[str] = "centre_activations"

    def __init__(self, means: Mapping[str, Floats]) -> None:
        self.means = means

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for norm, products in centrable(model.graph).items():
            means = self.means.get(str(norm.outputs[0].name))
            place = _shift(norm)
            if place is None or means is None or not np.isfinite(means).all() or not means.any():
                continue
            shift = norm.inputs[place]
            assert shift is not None and shift.const_value is not None
            own = np.asarray(shift.const_value.numpy(), np.float32)
            norm.replace_input_with(place, add_initializer(model.graph, f"{shift.name}.centred", own - means))
            for product in products:
                _add(model.graph, product, means)
            changes.add("activations centred")
        return changes


def centrable(graph: ir.Graph) -> dict[ir.Node, list[ir.Node]]:
    """Norms with stored gain and shift → the MatMuls with stored weights that alone read them."""
    found = smoothable(graph)
    return {norm: products for norm, products in found.items() if _shift(norm) is not None}


def _shift(norm: ir.Node) -> int | None:
    """Which input of a norm is added to each channel."""
    places = channel_inputs(norm)
    return places[1] if len(places) > 1 and norm.inputs[places[1]] is not None else None


def _add(graph: ir.Graph, product: ir.Node, means: Floats) -> None:
    """means · W behind a product: in its bias, where it has a stored one."""
    weight, out = product.inputs[1], product.outputs[0]
    assert weight is not None and weight.const_value is not None
    tensor, width = weight.const_value, int(weight.const_value.shape.numpy()[1])
    users = consumers(out)
    user = users[0] if len(users) == 1 and not out.is_graph_output() else None
    if user is not None and user.op_type == "Add" and not user.domain:
        place = 1 if user.inputs[0] is out else 0
        bias = user.inputs[place]
        if is_weight(bias) and rank(bias) == 1 and fixed_dim(bias, 0) == width:
            assert bias is not None and bias.const_value is not None
            stored = bias.const_value
            more: Callable[[], Floats] = lambda: np.asarray(stored.numpy() + _product(means, tensor), np.float32)  # noqa: E731
            name = f"{product.name or out.name}.bias.centred"
            user.replace_input_with(place, add_initializer(graph, name, lazy_tensor(name, ir.DataType.FLOAT, (width,), more)))
            return
    name = f"{product.name or out.name}.centred"
    made = lazy_tensor(name, ir.DataType.FLOAT, (width,), lambda: _product(means, tensor))
    node = ir.node("Add", [None, add_initializer(graph, name, made)])
    substitute(out, like(node.outputs[0], out))
    node.replace_input_with(0, out)
    graph.insert_after(product, node)


def _product(means: Floats, weight: ir.TensorProtocol) -> Floats:
    return np.asarray(means.astype(np.float64) @ np.asarray(weight.numpy(), np.float64), np.float32)
