"""The graphs between an input and the language model's width: encoder, Q-Former, projection. A part of family `qformer`.

A Q-Former (BLIP-2, arXiv 2301.12597, section 3.1) is a transformer whose learned queries attend to each other and, in every
n-th layer, to the encoder's output; what the queries become is the input's features, a fixed number of them. In InstructBLIP
(2305.06500, section 2.3) they also attend to the tokens of the instruction, in the same self-attention.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from vlm_edge.export.attention import attention_implementation
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Single, Tensors, float32, int64, randn, submodule
from .layouts import pixels_of
from .registry import Entry

INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")
"""The names by which a Q-Former reads its instruction, as the processors of transformers give it."""


class Input(msgspec.Struct, forbid_unknown_fields=True):
    """What the registry says about one kind of input; see registry.toml."""

    kind: Literal["image", "video", "audio"]
    features: str
    within: str = ""
    encoder: str = "vision_model"
    frames: int = 0
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """One kind of input and the parts of the model that it passes through, first to last."""

    model: Part
    options: Input
    encoder: Part
    qformer: Part
    queries: torch.Tensor
    projection: torch.nn.Module

    @property
    def instructed(self) -> bool:
        """Whether the Q-Former reads an instruction."""
        return "input_ids" in inspect.signature(self.qformer.forward).parameters

    @property
    def tokens(self) -> int:
        """How many tokens one input becomes."""
        return int(self.queries.shape[1]) * max(1, self.options.frames)


def branch(model: Part, wanted: Input, entry: Entry) -> Branch:
    """The parts that the registry's line names. Raises UnsupportedModelError where the model lacks one."""
    parts: Part = submodule(model, wanted.within, entry) if wanted.within else model
    found = Branch(
        model,
        wanted,
        submodule(parts, wanted.encoder, entry),
        submodule(parts, "qformer", entry),
        parts.query_tokens,
        submodule(parts, "language_projection", entry),
    )
    if wanted.frames and not found.instructed:
        raise UnsupportedModelError(f"The Q-Former of '{entry.model_type}' reads no instruction, which its videos need.")
    return found


class _Encoder(torch.nn.Module):
    """The frozen encoder: its last hidden states, normalised as the model itself does."""

    def __init__(self, encoder: Part) -> None:
        super().__init__()
        self.encoder: Part = encoder

    def forward(self, values: torch.Tensor) -> Tensors:
        return (self.encoder(values).last_hidden_state,)


class _QFormer(torch.nn.Module):
    """Hidden states of the encoder `[rows, entries, width]` → what the queries become `[rows, queries, hidden]`.

    The queries are part of the graph. One instruction is read for every row where only one is given (the frames of a video).
    """

    queries: torch.Tensor

    def __init__(self, found: Branch) -> None:
        super().__init__()
        self.qformer: Part = found.qformer
        self.register_buffer("queries", found.queries.detach(), persistent=False)

    def forward(self, hidden_states: torch.Tensor, *instruction: torch.Tensor) -> Tensors:
        rows, count = hidden_states.shape[0], self.queries.shape[1]
        queries = self.queries.expand(rows, -1, -1)
        if not instruction:
            output = self.qformer(query_embeds=queries, encoder_hidden_states=hidden_states)
            return (output.last_hidden_state,)
        ids, mask = (tensor.expand(rows, -1) for tensor in instruction)
        output = self.qformer(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(rows, count, dtype=mask.dtype), mask], 1),
            query_embeds=queries,
            encoder_hidden_states=hidden_states,
        )
        return (output.last_hidden_state[:, :count],)


def branch_plans(found: Branch) -> tuple[GraphPlan, GraphPlan, GraphPlan]:
    """The graphs encoder, Q-Former and projection; all are compared with one run of the model's own features method."""
    wanted = found.options
    named = "" if wanted.kind in ("image", "video") else f"{wanted.kind}_"
    rows = {"image": "images", "video": "frames", "audio": "clips"}[wanted.kind]
    values = _values(found, rows)
    hidden, asked, features = _sizes(found, values, rows)
    cases = _cases(found, values, rows)
    states = float32(f"{wanted.kind if named else 'image'}_hidden_states", rows, *hidden)
    output = float32(f"{named}query_output", rows, *asked)
    last = float32(f"{named}embeds" if named else "image_features", rows, *features)
    texts: tuple[TensorSpec, ...] = ()
    if found.instructed:
        # A video has one instruction for all its frames; images have one each.
        texts = tuple(int64(name, 1 if wanted.frames else rows, "instruction") for name in INSTRUCTION)
    seen: dict[str, Tensors] = {}

    def instruction(case: Case) -> Tensors:
        if not texts:
            return ()
        shape, generator = case.shape(texts[0]), case.generator()
        ids = torch.randint(0, found.qformer.config.vocab_size, shape, generator=generator)
        mask = torch.ones(shape, dtype=torch.long)
        if case.padding:
            mask[0, -case.padding :] = 0
        return ids, mask

    def original(case: Case) -> Tensors:
        """What the encoder, the Q-Former and the projection give in the model's own run on the inputs of a case."""
        if case.label not in seen:
            with torch.no_grad(), attention_implementation(found.model, "eager"):
                seen[case.label] = _original(found, randn(values, case), instruction(case))
        return seen[case.label]

    return (
        GraphPlan(
            role=f"{named}encoder" if named else "vision_encoder",
            module=_Encoder(found.encoder),
            inputs=(values,),
            outputs=(states,),
            cases=cases,
            sample=lambda case: (randn(values, case),),
            reference=lambda case, inputs: _original(found, inputs[0].clone(), instruction(case))[:1],
        ),
        GraphPlan(
            role=f"{named}qformer",
            module=_QFormer(found),
            inputs=(states, *texts),
            outputs=(output,),
            cases=cases,
            sample=lambda case: (original(case)[0], *instruction(case)),
            reference=lambda case, inputs: original(case)[1:2],
        ),
        GraphPlan(
            role=f"{named}projector",
            module=Single(found.projection),
            inputs=(output,),
            outputs=(last,),
            cases=cases,
            sample=lambda case: original(case)[1:2],
            reference=lambda case, inputs: original(case)[2:],
        ),
    )


def _original(found: Branch, values: torch.Tensor, instruction: Tensors) -> Tensors:
    """The model's own features method: the encoder's output, the queries' output and the projected features, row by row."""
    given = dict(zip(INSTRUCTION, instruction, strict=bool(instruction)))
    call = getattr(found.model, found.options.features)
    output = call(values[None] if found.options.frames else values, **given, return_dict=True)
    count, rows = int(found.queries.shape[1]), len(values)
    return (
        output.last_hidden_state,
        output.qformer_outputs.last_hidden_state[:, :count].contiguous(),
        output.pooler_output.reshape(rows, count, -1),
    )


def _values(found: Branch, rows: str) -> TensorSpec:
    """What the encoder reads."""
    if found.options.kind == "audio":
        return float32("audio_features", rows, "steps", int(found.encoder.config.feature_size))
    return pixels_of(found.encoder.config, rows)


def _sizes(found: Branch, values: TensorSpec, rows: str) -> list[tuple[int | str, ...]]:
    """Sizes of the three outputs but for their rows, read off a run; a length that follows the input's keeps its name."""
    shapes = []
    for steps in (5, 6):
        case = Case("probe", {rows: max(1, found.options.frames), "steps": steps, "instruction": 2})
        text = torch.ones(1, 2, dtype=torch.long)
        with torch.no_grad(), attention_implementation(found.model, "eager"):
            outputs = _original(found, randn(values, case), (text, text) if found.instructed else ())
        shapes.append([tuple(tensor.shape[1:]) for tensor in outputs])
    return [tuple(a if a == b else "steps" for a, b in zip(one, other, strict=True)) for one, other in zip(*shapes, strict=True)]


def _cases(found: Branch, values: TensorSpec, rows: str) -> tuple[Case, ...]:
    """One input and several, instructions short, long and padded, inputs of several lengths."""
    table = [(2, 5, 7, 0), (1, 1, 3, 0), (3, 9, 12, 4), (3, 4, 2, 1)]

    def case(count: int, words: int, steps: int, padding: int) -> Case:
        sizes, label = {rows: count}, f"{count} {rows if count > 1 else rows[:-1]}"
        if found.instructed:
            sizes["instruction"] = words
            label += f", instruction of {words} tokens{f', {padding} padded' if padding else ''}"
        if "steps" in values.shape:
            sizes["steps"] = steps
            label += f", {steps} steps"
        return Case(label, sizes, padding if found.instructed else 0)

    return tuple(case(*row) for row in (table if found.instructed else table[:3]))
