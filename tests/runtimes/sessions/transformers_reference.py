"""transformers' own processors and `generate`, which the runtime's answers are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


class Reference:
    """A checkpoint in PyTorch, float32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.folder = folder
        self.kind = self.model.config.model_type
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.template = (folder / "chat_template.jinja").read_text()

    def render(self, messages) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )

    def inputs(self, text: str, images) -> dict[str, torch.Tensor]:
        """What `generate` takes for one prompt with its image placeholders."""
        if self.kind != "qwen2_vl":
            processor = AutoProcessor.from_pretrained(self.folder)
            return dict(processor(text=text, images=list(images) or None, return_tensors="pt"))
        # Its processor class wants torchvision for videos; what it does for images is this.
        found: dict[str, torch.Tensor] = {}
        counts: list[int] = []
        if images:
            processed = AutoImageProcessor.from_pretrained(self.folder)(images=list(images), return_tensors="pt")
            found = {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
            counts = [int(grid.prod()) // 4 for grid in found["image_grid_thw"]]
        for count in counts:
            text = text.replace("<|image_pad|>", "<|later|>" * count, 1)
        found |= dict(self.tokenizer(text.replace("<|later|>", "<|image_pad|>"), return_tensors="pt"))
        found.pop("token_type_ids", None)
        image = self.model.config.image_token_id
        found["mm_token_type_ids"] = (found["input_ids"] == image).long()
        return found

    @torch.inference_mode()
    def generate(self, text: str, images, max_new_tokens: int, **options) -> list[int]:
        """Greedy new tokens, the end of sequence included."""
        inputs = self.inputs(text, images)
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **options)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def logprobs(self, text: str, images, tokens: list[int]) -> torch.Tensor:
        """Log probabilities float32 [len(tokens), vocab] of what follows the prompt, then each token but the last."""
        inputs = self.inputs(text, images)
        forced = torch.tensor([tokens[:-1]], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], forced], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).long()
        logits = self.model(**inputs).logits[0, -len(tokens) :]
        return torch.log_softmax(logits.float(), -1)
