"""The original: the checkpoint in PyTorch through transformers, float32, eager attention, its own processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlm_edge.export import checkpoint as checkpoints
from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint, evaluating
from vlm_edge.export.trace import quiet
from vlm_edge.families.base import GraphPlan, submodule
from vlm_edge.families.token_merging import merging
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.errors import ParityError

from .examples import Example
from .merged_tokens import MergedTokens
from .reference_inputs import Ours, ReferenceInputs
from .reference_processor import load_processor
from .subject import Answer, Array, Floats, GraphCase, Prepared


class TorchReference:
    """A loaded checkpoint as the reference of every comparison. Use as a context manager, or `close()` it.

    `merged`: (tokens, tokens that are left) of an image or tile, for a bundle that merges them; the reference then does too.
    """

    def __init__(self, source: str, *, trust_remote_code: bool = False, merged: tuple[int, int] | None = None) -> None:
        config, entry, family = checkpoints.identify(source, None, trust_remote_code)
        self.checkpoint: Checkpoint = checkpoints.load(
            source, entry.auto_class or family.auto_class, config, trust_remote_code=trust_remote_code
        )
        self.name = f"PyTorch, {self.checkpoint.source.name}"
        self.model_type = entry.model_type
        self.model: Any = self.checkpoint.model
        self._stack = ExitStack()
        self._stack.enter_context(evaluating(self.model))
        self._stack.enter_context(attention_implementation(self.model, "eager"))
        with quiet():
            split = merging(family.split(self.checkpoint, entry), str(merged[1]) if merged else None)
            self.processor: Any = load_processor(source, self.checkpoint, trust_remote_code)
            self.plans: dict[str, GraphPlan] = {plan.role: plan for plan in split.graphs}
        self._said: dict[int, tuple[Example, list[int], Floats]] = {}
        contract = split.contract
        self._space = contract.contrast if isinstance(contract, GenerativeContract) else contract
        if isinstance(contract, GenerativeContract):
            self._inputs = ReferenceInputs(self.checkpoint, self.processor, contract)
            self._inputs.decoder_prompt = self._decoder_prompt
        self._merged: MergedTokens | None = None
        if merged is not None and isinstance(contract, GenerativeContract):
            image = contract.modality("image")
            assert image is not None and image.token_id is not None  # else there was nothing to merge
            projector = submodule(self.model, str(entry.options["projector"]), entry)
            self._merged = MergedTokens(projector, image.token_id, *merged)
            self._inputs.changed = self._merged.inputs
            self.name += f" with {merged[0]} visual tokens merged into {merged[1]}"

    def close(self) -> None:
        """Puts the model's attention and mode back."""
        self._stack.close()

    def graph_cases(self, role: str) -> Iterator[GraphCase]:
        """The cases of the family's plan: several shapes, padding, an empty and a long past."""
        if role not in self.plans:
            raise ParityError(
                f"The checkpoint has no graph '{role}' (it has {', '.join(self.plans)}): is it the bundle's source?"
            )
        plan = self.plans[role]
        for case in plan.cases:
            with torch.no_grad(), quiet():
                inputs = plan.sample(case)
                expected = plan.reference(case, inputs)
                masks = plan.compared(case, inputs)
            named = zip(plan.outputs, masks or (), strict=False)
            yield GraphCase(
                label=case.label,
                feeds={spec.name: _array(tensor) for spec, tensor in zip(plan.inputs, inputs, strict=True)},
                expected={spec.name: _array(tensor) for spec, tensor in zip(plan.outputs, expected, strict=True)},
                masks={spec.name: _array(mask) for spec, mask in named},
            )

    # -- a model that answers

    def reads_like(self, ours: Ours) -> None:
        """Lets a bundle's own reading of an example decide between the ways that a processor may be called in."""
        self._inputs.ours = ours

    def prepare(self, example: Example) -> Prepared:
        inputs = self._inputs(example)
        ids = [int(token) for token in inputs["input_ids"][0]] if "input_ids" in inputs else []
        alone = (
            [self._inputs(Example((image,), example.prompt)) for image in example.images] if len(example.images) > 1 else [inputs]
        )
        return Prepared(ids, [_pixels(one) for one in alone] if example.images else [], self._decoder_prompt(inputs))

    def forced(self, example: Example, answer: Sequence[int]) -> Floats:
        said = self._said.get(id(example))
        if said is not None and said[1] == list(answer):  # its own answer: its logits are known
            return said[2]
        return self._generate(self._inputs(example), len(answer), answer)[2]

    def greedy(self, example: Example, max_new_tokens: int) -> Answer:
        _, tokens, logits = self._generate(self._inputs(example), max_new_tokens)
        self._said[id(example)] = (example, tokens, logits)
        return Answer(tokens, self.checkpoint.tokenizer.decode(tokens, skip_special_tokens=True))

    def _decoder_prompt(self, inputs: dict[str, Any]) -> list[int]:
        """What the decoder begins with: what `generate` gives back in front of the first new token."""
        return self._generate(inputs, 1)[0]

    def _generate(
        self, inputs: dict[str, Any], new: int, forced: Sequence[int] | None = None
    ) -> tuple[list[int], list[int], Floats]:
        """(what the decoder began with, new tokens, the logits before each of them float32 [tokens, vocabulary]).

        `forced`: these tokens are taken whatever the model would say; the logits are the model's own all the same.
        """
        processors = LogitsProcessorList([] if forced is None else [_Forced(forced)])
        merged = self._merged.applied() if self._merged is not None else nullcontext()
        with torch.no_grad(), quiet(), _plain_generation(self.model), merged:
            try:
                out = self.model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=new,
                    logits_processor=processors,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            except (RuntimeError, ValueError, TypeError) as error:  # what transformers raises for inputs it cannot join
                said = " ".join(str(error).split())[:200]
                raise ParityError(f"The reference's `generate` refuses the example: {said}") from error
        tokens = [int(token) for token in out.sequences[0]]
        steps = len(out.logits)
        logits: Floats = _array(torch.stack([step[0] for step in out.logits]).float())
        return tokens[: len(tokens) - steps], tokens[len(tokens) - steps :], logits

    def words(self, tokens: Sequence[int]) -> list[str]:
        return [self.checkpoint.tokenizer.decode([token]) for token in tokens]

    # -- a model that embeds

    def pixels(self, image: Image.Image) -> Array:
        with quiet():
            found: Array = _array(
                self.processor.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
            )
            return found

    def embed_images(self, images: Sequence[Image.Image]) -> Floats:
        rows = []
        for image in images:
            with torch.no_grad(), quiet():
                pixels = torch.from_numpy(self.pixels(image).copy())
                rows.append(_unit(self.model.get_image_features(pixel_values=pixels)))
        return np.concatenate(rows)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        if self._space is None:
            raise ParityError(f"{self.name} does not compare pictures with texts.")
        wanted = [spec.name for spec in self.plans["text_encoder"].inputs]
        fixed = self._space.text_padding == "max_length"
        end = self._space.end_token_id
        rows = []
        for text in texts:
            inputs = self.checkpoint.tokenizer(
                [text],
                padding="max_length" if fixed else True,
                truncation=True,
                max_length=self._space.text_length - (end is not None),
                return_tensors="pt",
            )
            if end is not None:  # a token of the model's own, which its tokenizer does not write
                inputs = {
                    name: F.pad(inputs[name], (0, 1), value=value) for name, value in (("input_ids", end), ("attention_mask", 1))
                }
            with torch.no_grad(), quiet():
                rows.append(_unit(self.model.get_text_features(**{name: inputs[name] for name in wanted})))
        return np.concatenate(rows)


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Makes the next token of a given list the only one there is, step after step."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, next(self._tokens)] = 0
        return chosen


@contextmanager
def _plain_generation(model: torch.nn.Module) -> Iterator[None]:
    """Nothing of a generation configuration but its special tokens counts inside: no beams, penalties, forced tokens."""
    parts: list[Any] = [
        part for part in model.modules() if isinstance(getattr(part, "generation_config", None), GenerationConfig)
    ]
    before = [part.generation_config for part in parts]
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    try:
        for part, config in zip(parts, before, strict=True):
            part.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in names})
        yield
    finally:
        for part, config in zip(parts, before, strict=True):
            part.generation_config = config


def _pixels(inputs: dict[str, Any]) -> Array:
    """The largest array of numbers that are no integers: the pictures."""
    arrays = [_array(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return max(arrays, key=lambda array: array.size) if arrays else np.zeros(0, np.float32)


def _unit(features: Any) -> Floats:
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    array: Floats = _array(tensor / tensor.norm(dim=-1, keepdim=True))
    return array


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().numpy()
