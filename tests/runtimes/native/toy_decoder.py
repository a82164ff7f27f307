"""A two-layer decoder in both contracts, with the same random weights: portable (growing past) and lowered (shared KV buffer).

What else a decoder may read can be switched on: cross-attention with source and token masks, features per token, blocks, a
recurrent state, a static input that all rows share; and a further output.
"""

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
    cached: bool = True
    """Self-attention, and with it a KV cache."""
    cross: bool = False
    """Static `cross_key_values.{i}.key/.value` [batch, heads, source, size]; output `attentions` [batch, sequence, source]."""
    source_mask: bool = True
    """With `cross`: static `encoder_attention_mask` int64 [batch, source]."""
    token_mask: bool = False
    """With `cross`: per token `cross_attention_mask` int64 [batch, sequence, source]."""
    media: int = 0
    """With `cross`: per token `image_attention_mask` int64 [batch, sequence, images], an image being so many source entries."""
    feature: bool = False
    """Per token `deepstack.0` [batch, sequence, hidden], added to the embeddings."""
    blocks: bool = False
    """Per token `block_ids` int64 [batch, sequence]: tokens of a block get the mean of their embeddings added."""
    recurrent: bool = False
    """`state.0` [batch, hidden]: an RNN over the embeddings, whose output is added to them."""
    shared: bool = False
    """Static `shift` [1, hidden], added to the embeddings."""
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _weights: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)

    @property
    def past_names(self) -> list[str]:
        """Names of the cache inputs, layer by layer."""
        return [f"past_key_values.{i}.{kind}" for i in range(self.layers if self.cached else 0) for kind in ("key", "value")]

    @property
    def cross_names(self) -> list[str]:
        """Names of the cross-attention inputs, layer by layer."""
        return [f"cross_key_values.{i}.{kind}" for i in range(self.layers if self.cross else 0) for kind in ("key", "value")]

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
        inputs = []
        if self.cached:
            inputs.append(helper.make_tensor_value_info("seqlens_k", I32, ["batch"]))
            inputs.append(helper.make_tensor_value_info("total_sequence_length", I32, [1]))
        hidden = self._enriched()
        for layer in range(self.layers):
            if not self.cached:
                hidden = self._feed_forward(layer, self._cross_attention(layer, hidden))
                continue
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
            hidden = self._feed_forward(layer, self._cross_attention(layer, self._attended(layer, hidden, attended)))
        last = self._node("Gather", [hidden, self._constant("last", np.array([-1]))], "last_hidden", axis=1)
        self._node("MatMul", [last, self._random("head", self.hidden, self.vocab)], "logits")
        return self._decoder(inputs, 1, self.capacity or "capacity", self.capacity or "capacity", 21)

    def portable_model(self) -> bytes:
        """The decoder as exported: `Attention` with a growing past and an explicit mask."""
        self._reset()
        inputs = [helper.make_tensor_value_info("attention_mask", I64, ["batch", "total"])] if self.cached else []
        hidden = self._enriched()
        mask = self._mask() if self.cached else ""
        for layer in range(self.layers):
            if not self.cached:
                hidden = self._feed_forward(layer, self._cross_attention(layer, hidden))
                continue
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
            hidden = self._feed_forward(layer, self._cross_attention(layer, self._attended(layer, hidden, f"attended{layer}")))
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

    def _enriched(self) -> str:
        """Positions, shared shift, features, blocks and the recurrent net, added one after another."""
        hidden = self._positioned()
        if self.shared:
            hidden = self._node("Add", [hidden, "shift"], "shifted")
        if self.feature:
            hidden = self._node("Add", [hidden, "deepstack.0"], "featured")
        if self.blocks:
            ids = self._node("Cast", ["block_ids"], "block_numbers", to=F32)
            column = self._node("Unsqueeze", [ids, self._constant("axis_two", np.array([2]))], "block_column")
            row = self._node("Unsqueeze", [ids, self._constant("axis_one_", np.array([1]))], "block_row")
            same = self._node("Cast", [self._node("Equal", [column, row], "same_block")], "same", to=F32)
            inside = self._node(
                "Cast", [self._node("Greater", [row, self._constant("nought", np.float32(0))], "in_block")], "inside", to=F32
            )
            members = self._node("Mul", [same, inside], "members")
            count = self._node("ReduceSum", [members, self._constant("axis_two", np.array([2]))], "member_count")
            mean = self._node(
                "Div", [members, self._node("Max", [count, self._constant("unity", np.float32(1))], "divisor")], "means"
            )
            hidden = self._node("Add", [hidden, self._node("MatMul", [mean, "inputs_embeds"], "block_mean")], "blocked")
        if self.recurrent:
            scale = 0.5 * self.hidden**-0.5
            weights = [self._random(name, 1, self.hidden, self.hidden, scale=scale) for name in ("rnn_w", "rnn_r")]
            steps = self._node("Transpose", [hidden], "steps", perm=[1, 0, 2])
            axis = self._constant("axis_zero", np.array([0]))
            before = self._node("Unsqueeze", ["state.0", axis], "before")
            self._nodes.append(
                helper.make_node("RNN", [steps, *weights, "", "", before], ["rnn_out", "rnn_last"], hidden_size=self.hidden)
            )
            self._node("Squeeze", ["rnn_last", axis], "present_state.0")
            out = self._node("Squeeze", ["rnn_out", self._constant("axis_one_", np.array([1]))], "rnn_steps")
            hidden = self._node("Add", [hidden, self._node("Transpose", [out], "rnn_rows", perm=[1, 0, 2])], "remembered")
        return hidden

    def _cross_attention(self, layer: int, hidden: str) -> str:
        if not self.cross:
            return hidden
        width = self.heads * self.size
        queries = self._node("MatMul", [hidden, self._random(f"cq{layer}", self.hidden, width)], f"cq_out{layer}")
        split = self._constant("split_heads", np.array([0, 0, self.heads, self.size]))
        queries = self._node(
            "Transpose", [self._node("Reshape", [queries, split], f"cq_heads{layer}")], f"cqt{layer}", perm=[0, 2, 1, 3]
        )
        keys = self._node("Transpose", [f"cross_key_values.{layer}.key"], f"ckt{layer}", perm=[0, 1, 3, 2])
        scale = self._constant("cross_scale", np.float32(self.size**-0.5))
        scores = self._node("Mul", [self._node("MatMul", [queries, keys], f"cdots{layer}"), scale], f"cscores{layer}")
        for name, axes in [("encoder_attention_mask", [1, 2])] * self.source_mask + [
            ("cross_attention_mask", [1])
        ] * self.token_mask:
            hidden_keys = self._node("Equal", [name, self._constant("no", np.array(0))], f"{name}_off{layer}")
            wide = self._node("Unsqueeze", [hidden_keys, self._constant(f"{name}_axes", np.array(axes))], f"{name}_wide{layer}")
            scores = self._node("Where", [wide, self._constant("never", np.float32(-1e9)), scores], f"{name}_scores{layer}")
        if self.media:
            shape = [
                self._constant(f"image_shape{i}", np.array(value))
                for i, value in enumerate(([3], [1, 1, 1, self.media], [0, 0, -1]))
            ]
            each = self._node("Unsqueeze", ["image_attention_mask", shape[0]], f"image_each{layer}")
            entries = self._node(
                "Reshape", [self._node("Tile", [each, shape[1]], f"image_tiled{layer}"), shape[2]], f"image_entries{layer}"
            )
            unseen = self._node("Equal", [entries, self._constant("no", np.array(0))], f"image_off{layer}")
            wide = self._node("Unsqueeze", [unseen, self._constant("image_heads", np.array([1]))], f"image_wide{layer}")
            scores = self._node("Where", [wide, self._constant("never", np.float32(-1e9)), scores], f"image_scores{layer}")
        weights = self._node("Softmax", [scores], f"cweights{layer}", axis=-1)
        if layer == 0:
            self._node("ReduceMean", [weights, self._constant("head_axis", np.array([1]))], "attentions", keepdims=0)
        mixed = self._node("MatMul", [weights, f"cross_key_values.{layer}.value"], f"cmixed{layer}")
        joined = self._node("Transpose", [mixed], f"cjoined{layer}", perm=[0, 2, 1, 3])
        flat = self._node("Reshape", [joined, self._constant("join_heads", np.array([0, 0, width]))], f"cflat{layer}")
        out = self._node("MatMul", [flat, self._random(f"co{layer}", width, self.hidden)], f"cout{layer}")
        return self._node("Add", [hidden, out], f"crossed{layer}")

    def _attended(self, layer: int, hidden: str, attended: str) -> str:
        mixed = self._node("MatMul", [attended, self._random(f"o{layer}", self.heads * self.size, self.hidden)], f"mixed{layer}")
        return self._node("Add", [hidden, mixed], f"summed{layer}")

    def _feed_forward(self, layer: int, summed: str) -> str:
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
        for name, wanted, kind, shape in [
            ("shift", self.shared, F32, [1, self.hidden]),
            ("deepstack.0", self.feature, F32, ["batch", "sequence", self.hidden]),
            ("block_ids", self.blocks, I64, ["batch", "sequence"]),
            ("cross_attention_mask", self.cross and self.token_mask, I64, ["batch", "sequence", "source"]),
            ("image_attention_mask", self.media > 0, I64, ["batch", "sequence", "images"]),
            ("encoder_attention_mask", self.cross and self.source_mask, I64, ["batch", "source"]),
            ("state.0", self.recurrent, F32, ["batch", self.hidden]),
        ]:
            given += [info(name, kind, shape)] * wanted
        given += [info(name, F32, ["batch", self.heads, "source", self.size]) for name in self.cross_names]
        given += [info(name, F32, ["batch", self.kv_heads, past, self.size]) for name in self.past_names]
        outputs = [info("logits", F32, ["batch", tokens, self.vocab])]
        outputs += [info("attentions", F32, ["batch", "sequence", "source"])] * self.cross
        outputs += [info("present_state.0", F32, ["batch", self.hidden])] * self.recurrent
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
