"""A two-layer decoder in both contracts, with the same random weights: portable (growing past) and lowered (shared KV buffer)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
F32, I64, I32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


@dataclass(slots=True)
class Toy:
    """Sizes of the model. `axes` 3 gives M-RoPE's position shape, 0 no position_ids at all; `rotary` rotates in the attention."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    hidden: int = 32
    vocab: int = 61
    axes: int = 1
    rotary: bool = False
    positions: int = 256
    seed: int = 0
    capacity: int | None = None
    nan_token: int | None = None
    """A token whose embedding is NaN."""
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _weights: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)

    @property
    def past_names(self) -> list[str]:
        """Names of the cache inputs, layer by layer."""
        return [f"past_key_values.{i}.{kind}" for i in range(self.layers) for kind in ("key", "value")]

    def embed_model(self) -> bytes:
        """embed_tokens: input_ids → inputs_embeds."""
        self._reset()
        table = self._random("embed", self.vocab, self.hidden, scale=1.0)
        if self.nan_token is not None:
            self._weights[table] = self._weights[table].copy()
            self._weights[table][self.nan_token] = np.nan
        self._node("Gather", [table, "input_ids"], "inputs_embeds", axis=0)
        ids = helper.make_tensor_value_info("input_ids", I64, ["batch", "sequence"])
        out = helper.make_tensor_value_info("inputs_embeds", F32, ["batch", "sequence", self.hidden])
        return self._model([ids], [out], 21)

    def lowered_model(self) -> bytes:
        """The decoder of a build with a shared KV buffer."""
        self._reset()
        inputs = [
            helper.make_tensor_value_info("seqlens_k", I32, ["batch"]),
            helper.make_tensor_value_info("total_sequence_length", I32, [1]),
        ]
        hidden = self._positioned()
        for layer in range(self.layers):
            queries, keys, values = self._projections(layer, hidden)
            attended = f"attended{layer}"
            past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
            rotary = [*self._tables(), "position_ids" if self.axes else ""] if self.rotary else []
            self._nodes.append(
                helper.make_node(
                    "GroupQueryAttention",
                    [queries, keys, values, *past, "seqlens_k", "total_sequence_length", *rotary],
                    [attended, f"present.{layer}.key", f"present.{layer}.value"],
                    domain=MS,
                    num_heads=self.heads,
                    kv_num_heads=self.kv_heads,
                    do_rotary=int(self.rotary),
                )
            )
            hidden = self._feed_forward(layer, hidden, attended)
        last = self._node("Gather", [hidden, self._constant("last", np.array([-1]))], "last_hidden", axis=1)
        self._node("MatMul", [last, self._random("head", self.hidden, self.vocab)], "logits")
        return self._decoder(inputs, 1, self.capacity or "capacity", self.capacity or "capacity", 21)

    def portable_model(self) -> bytes:
        """The decoder as exported: `Attention` with a growing past and an explicit mask."""
        self._reset()
        inputs = [helper.make_tensor_value_info("attention_mask", I64, ["batch", "total"])]
        hidden = self._positioned()
        mask = self._mask()
        for layer in range(self.layers):
            queries, keys, values = self._projections(layer, hidden)
            if self.rotary:
                cos, sin = self._tables()
                queries = self._node("RotaryEmbedding", [queries, cos, sin, "position_ids"], f"rq{layer}", num_heads=self.heads)
                keys = self._node("RotaryEmbedding", [keys, cos, sin, "position_ids"], f"rk{layer}", num_heads=self.kv_heads)
            past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
            self._nodes.append(
                helper.make_node(
                    "Attention",
                    [queries, keys, values, mask, *past],
                    [f"attended{layer}", f"present.{layer}.key", f"present.{layer}.value"],
                    q_num_heads=self.heads,
                    kv_num_heads=self.kv_heads,
                )
            )
            hidden = self._feed_forward(layer, hidden, f"attended{layer}")
        self._node("MatMul", [hidden, self._random("head", self.hidden, self.vocab)], "logits")
        return self._decoder(inputs, "sequence", "past", "total", 23)

    def _positioned(self) -> str:
        """Learned positions, one table per axis (none where the attention rotates)."""
        hidden = "inputs_embeds"
        if self.rotary or self.axes == 0:
            return hidden
        for axis in range(self.axes):
            table = self._random(f"positions{axis}", self.positions, self.hidden, scale=0.5)
            ids = "position_ids"
            if self.axes > 1:
                ids = self._node("Gather", ["position_ids", self._constant(f"axis{axis}", np.array(axis))], f"ids{axis}", axis=0)
            rows = self._node("Gather", [table, ids], f"position_rows{axis}", axis=0)
            hidden = self._node("Add", [hidden, rows], f"positioned{axis}")
        return hidden

    def _projections(self, layer: int, hidden: str) -> list[str]:
        widths = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        return [
            self._node("MatMul", [hidden, self._random(f"{name}{layer}", self.hidden, n * self.size)], f"{name}_out{layer}")
            for name, n in widths.items()
        ]

    def _feed_forward(self, layer: int, hidden: str, attended: str) -> str:
        mixed = self._node("MatMul", [attended, self._random(f"o{layer}", self.heads * self.size, self.hidden)], f"mixed{layer}")
        summed = self._node("Add", [hidden, mixed], f"summed{layer}")
        inner = self._node("MatMul", [summed, self._random(f"up{layer}", self.hidden, 64)], f"up_out{layer}")
        bent = self._node("Tanh", [inner], f"bent{layer}")
        outer = self._node("MatMul", [bent, self._random(f"down{layer}", 64, self.hidden)], f"down_out{layer}")
        return self._node("Add", [summed, outer], f"hidden{layer}")

    def _tables(self) -> list[str]:
        angles = np.arange(self.positions)[:, None] / 100.0 ** (np.arange(self.size // 2) / (self.size // 2))
        return [
            self._constant("cos", np.cos(angles).astype(np.float32)),
            self._constant("sin", np.sin(angles).astype(np.float32)),
        ]

    def _mask(self) -> str:
        """bool [batch, 1, sequence, total]: causal, and not padding."""
        one, zero = self._constant("one", np.array(1)), self._constant("zero", np.array(0))
        total = self._node("Gather", [self._node("Shape", ["attention_mask"], "mask_shape"), one], "total_size", axis=0)
        sequence = self._node("Gather", [self._node("Shape", ["inputs_embeds"], "x_shape"), one], "sequence_size", axis=0)
        keys = self._node("Range", [zero, total, one], "key_index")
        queries = self._node("Range", [self._node("Sub", [total, sequence], "first"), total, one], "query_index")
        column = self._node("Unsqueeze", [queries, self._constant("axis_one", np.array([1]))], "query_column")
        causal = self._node("LessOrEqual", [keys, column], "causal")
        valid = self._node("Cast", ["attention_mask"], "valid", to=TensorProto.BOOL)
        rows = self._node("Unsqueeze", [valid, self._constant("axes_one_two", np.array([1, 2]))], "valid_rows")
        return self._node("And", [causal, rows], "allowed")

    def _decoder(self, inputs: list, tokens: int | str, past: int | str, present: int | str, opset: int) -> bytes:
        info = helper.make_tensor_value_info
        given = [info("inputs_embeds", F32, ["batch", "sequence", self.hidden])]
        if self.axes:
            given.append(info("position_ids", I64, [3, "batch", "sequence"] if self.axes > 1 else ["batch", "sequence"]))
        given += inputs
        given += [info(name, F32, ["batch", self.kv_heads, past, self.size]) for name in self.past_names]
        outputs = [info("logits", F32, ["batch", tokens, self.vocab])]
        for name in self.past_names:
            outputs.append(info(name.replace("past_key_values", "present"), F32, ["batch", self.kv_heads, present, self.size]))
        return self._model(given, outputs, opset)

    def _model(self, inputs: list, outputs: list, opset: int) -> bytes:
        weights = [numpy_helper.from_array(array, name) for name, array in self._weights.items()]
        graph = helper.make_graph(self._nodes, "toy", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11 if opset >= 23 else 10).SerializeToString()

    def _reset(self) -> None:
        self._nodes, self._weights = [], {}

    def _random(self, name: str, *shape: int, scale: float | None = None) -> str:
        """Weights that depend on their name alone, so that both contracts get the same."""
        random = np.random.default_rng([self.seed, *name.encode()])
        return self._constant(name, (random.standard_normal(shape) * (scale or shape[0] ** -0.5)).astype(np.float32))

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self._weights[name] = value
        return name

    def _node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output
