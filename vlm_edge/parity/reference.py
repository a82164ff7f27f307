"""The original: the checkpoint in PyTorch through transformers, float32, eager attention, its own processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_edge.export import checkpoint as checkpoints
from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint, evaluating
from vlm_edge.export.trace import quiet
from vlm_edge.families.base import GraphPlan
from vlm_edge_runtime.errors import ParityError

from .examples import Example
from .reference_processor import load_processor
from .subject import Answer, Array, Floats, GraphCase, Prepared


class TorchReference:
    """A loaded checkpoint as the reference of every comparison. Use as a context manager, or `close()` it."""

    def __init__(self, source: str, *, trust_remote_code: bool = False) -> None:
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
            self.processor: Any = load_processor(source, self.checkpoint, trust_remote_code)
            self.plans: dict[str, GraphPlan] = {plan.role: plan for plan in family.split(self.checkpoint, entry).graphs}

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

    def inputs(self, example: Example) -> dict[str, Any]:
        """What `model.generate` takes, from transformers' own processor and chat template."""
        content = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.prompt}]
        with quiet():
            try:
                text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            except ValueError as error:
                raise ParityError(f"The checkpoint cannot make a prompt ({error}); does it lack a chat template?") from error
            pictures = [image.convert("RGB") for image in example.images]
            return dict(self.processor(images=pictures or None, text=[text], return_tensors="pt"))

    def prepare(self, example: Example) -> Prepared:
        inputs = self.inputs(example)
        pixels = [_array(inputs["pixel_values"])] if "pixel_values" in inputs else []
        return Prepared([int(token) for token in inputs["input_ids"][0]], pixels)

    def forced(self, example: Example, answer: Sequence[int]) -> Floats:
        inputs = self.inputs(example)
        prompt = inputs["input_ids"].shape[1]
        ids = torch.tensor([list(answer[:-1])], dtype=inputs["input_ids"].dtype)
        extended = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                tail = torch.full_like(ids, fill, dtype=inputs[name].dtype)
                extended[name] = torch.cat([inputs[name], tail], 1)
        with torch.no_grad(), quiet():
            logits = self.model(**extended, use_cache=False).logits
        found: Floats = _array(logits[0, prompt - 1 : prompt - 1 + len(answer)])
        return found

    def greedy(self, example: Example, max_new_tokens: int) -> Answer:
        inputs = self.inputs(example)
        plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
        with torch.no_grad(), quiet():
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, min_new_tokens=None, **plain)
        tokens = [int(token) for token in out[0, inputs["input_ids"].shape[1] :]]
        return Answer(tokens, self.checkpoint.tokenizer.decode(tokens, skip_special_tokens=True))

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
        wanted = [spec.name for spec in self.plans["text_encoder"].inputs]
        length = self.plans["text_encoder"].inputs[0].shape[1]
        fixed = isinstance(length, int)
        rows = []
        for text in texts:
            inputs = self.checkpoint.tokenizer(
                [text],
                padding="max_length" if fixed else True,
                truncation=True,
                max_length=length if fixed else self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            with torch.no_grad(), quiet():
                rows.append(_unit(self.model.get_text_features(**{name: inputs[name] for name in wanted})))
        return np.concatenate(rows)


def _unit(features: Any) -> Floats:
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    array: Floats = _array(tensor / tensor.norm(dim=-1, keepdim=True))
    return array


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().numpy()
