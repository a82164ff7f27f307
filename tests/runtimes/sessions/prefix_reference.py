"""transformers' own inputs and answers for models whose prefix is seen in both directions; see transformers_reference.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_edge.families import registry

Inputs = dict[str, torch.Tensor]


class PrefixReference:
    """A checkpoint in PyTorch, float32. `options`: what its processor is called with besides images and text."""

    def __init__(self, folder: Path, **options: Any) -> None:
        config = (folder / "config.json").read_text()
        registry.lookup("simvlm" if '"simvlm"' in config else "paligemma")  # imports the zoo's model
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.options = options
        self._answers: dict[Any, list[int]] = {}
        self.inputs: Callable[[str, list[Image.Image]], Inputs] = getattr(self, f"_{self.model.config.model_type}")

    def _paligemma(self, prompt: str, images: list[Image.Image]) -> Inputs:
        return dict(self.processor(text="<image>" * len(images) + prompt, images=images, return_tensors="pt"))

    def _simvlm(self, prompt: str, images: list[Image.Image]) -> Inputs:
        found = self.processor(text=f"<image><s>{prompt}", images=images, add_special_tokens=False, return_tensors="pt")
        return dict(found)

    def _git(self, prompt: str, images: list[Image.Image]) -> Inputs:
        """As the model's documentation: [CLS], the question, and no [SEP]."""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "pixel_values": self.processor(images=images, return_tensors="pt").pixel_values,
        }

    def _gemma3(self, prompt: str, images: list[Image.Image]) -> Inputs:
        text = self.render([{"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]}])
        return self.of_text(text, images)

    def render(self, messages: list[dict[str, Any]]) -> str:
        text: str = self.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.processor.chat_template, tokenize=False, add_generation_prompt=True
        )
        return text

    def of_text(self, text: str, images: list[Image.Image]) -> Inputs:
        return dict(
            self.processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt", **self.options)
        )

    @torch.inference_mode()
    def generate(self, inputs: Inputs, new: int) -> list[int]:
        """Greedy new tokens, the end of sequence included."""
        out = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=new)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def answer(self, prompt: str, images: list[Image.Image], new: int) -> list[int]:
        key = prompt, tuple(image.tobytes() for image in images), new
        if key not in self._answers:
            self._answers[key] = self.generate(self.inputs(prompt, images), new)
        return self._answers[key]
