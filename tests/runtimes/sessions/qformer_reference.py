"""BLIP-2 and its descendants in transformers: their own processors and `generate`, one row or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BlipImageProcessorPil


class QFormerReference:
    """A checkpoint in PyTorch, float32. An input is an image, or the list of a video's frames."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.takes_videos = self.model.config.model_type == "instructblipvideo"
        self.reads_source = bool(getattr(self.model.language_model.config, "is_encoder_decoder", False))

    def inputs(self, texts: Sequence[str], given: Sequence[Any]) -> dict[str, torch.Tensor]:
        """What `generate` takes for these rows, one input each."""
        if self.takes_videos:
            return self._video_inputs(texts, given)
        processor = AutoProcessor.from_pretrained(self.folder)
        found = dict(processor(images=list(given), text=list(texts), return_tensors="pt", padding=True))
        if "qformer_input_ids" in found:
            # Padded on the right, as its tokenizer says. The processor pads by the language model's side; on the left
            # the Q-Former counts the padding as positions, and a row's answer in a batch is not its answer alone.
            questions = processor.qformer_tokenizer(list(texts), return_tensors="pt", padding=True)
            found |= {f"qformer_{name}": questions[name] for name in ("input_ids", "attention_mask")}
        return found

    def _video_inputs(self, texts: Sequence[str], videos: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """As InstructBlipVideoProcessor's code has it; its class wants torchvision for the frames."""
        config = self.model.config
        images = BlipImageProcessorPil(size={"height": config.vision_config.image_size, "width": config.vision_config.image_size})
        pixels = torch.stack([images(list(frames), return_tensors="pt")["pixel_values"] for frames in videos])
        questions = AutoTokenizer.from_pretrained(self.folder / "qformer_tokenizer")(
            list(texts), return_tensors="pt", padding=True
        )
        told = self.tokenizer(list(texts), padding=True)
        before = self.tokenizer("<video>" * config.num_query_tokens * 4, add_special_tokens=False)
        return {
            "pixel_values": pixels,
            "qformer_input_ids": questions["input_ids"],
            "qformer_attention_mask": questions["attention_mask"],
            "input_ids": torch.tensor([before["input_ids"] + row for row in told["input_ids"]]),
            "attention_mask": torch.tensor([before["attention_mask"] + row for row in told["attention_mask"]]),
        }

    @torch.inference_mode()
    def generate(self, texts: Sequence[str], given: Sequence[Any], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """New tokens of every row, up to and with the end of sequence; greedy unless `options` say otherwise."""
        inputs = self.inputs(texts, given)
        found = self.model.generate(**inputs, **{"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **options})
        return [self._answer(row.tolist()) for row in found[:, 1 if self.reads_source else inputs["input_ids"].shape[1] :]]

    @torch.inference_mode()
    def logprobs(self, text: str, given: Any, tokens: Sequence[int]) -> np.ndarray:
        """Log probabilities float32 [len(tokens), vocab] of what follows the prompt, then each token but the last."""
        inputs = self.inputs([text], [given])
        forced = torch.tensor([list(tokens[:-1])], dtype=torch.long)
        if self.reads_source:
            start = torch.tensor([[self.model.language_model.config.decoder_start_token_id]])
            inputs["decoder_input_ids"] = torch.cat([start, forced], 1)
        else:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], forced], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = self.model(**inputs).logits[0, -len(tokens) :]
        return torch.log_softmax(logits.float(), -1).numpy()

    def _answer(self, tokens: list[int]) -> list[int]:
        end = self.model.language_model.generation_config.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class XReference:
    """X-InstructBLIP of our zoo, in PyTorch."""

    def __init__(self, folder: Path) -> None:
        from vlm_edge.zoo.x_instructblip import XInstructBlipForConditionalGeneration, prompt

        self.model = XInstructBlipForConditionalGeneration.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.questions = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")
        self._prompt = prompt
        size = self.model.config.image_config.image_size
        self._images = BlipImageProcessorPil(size={"height": size, "width": size})

    @torch.inference_mode()
    def generate(self, text: str, images: Sequence[Any], clips: Sequence[np.ndarray], max_new_tokens: int) -> list[int]:
        """New greedy tokens of one prompt; clips may differ in length."""
        written = self._prompt(self.model.config, self.tokenizer, text, len(images), len(clips))
        ids = self.tokenizer(written, return_tensors="pt")["input_ids"]
        question = self.questions(text, return_tensors="pt")["input_ids"]
        pixels = self._images(list(images), return_tensors="pt")["pixel_values"] if images else None
        embeddings = self.model.embed(ids, pixels, None, question)
        if clips:
            heard = [self.model.get_audio_features(torch.from_numpy(clip)[None], question).pooler_output for clip in clips]
            places = (ids == self.model.config.audio_token_id)[..., None]
            embeddings = embeddings.masked_scatter(places, torch.cat(heard))
        out = self.model.language_model.generate(
            input_ids=ids,
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
        )[0, ids.shape[1] :].tolist()
        if len(clips) == 1:  # then the model's own generate does it all
            whole = self.model.generate(
                ids,
                torch.ones_like(ids),
                pixels,
                torch.from_numpy(clips[0])[None],
                question,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
            )
            assert whole[0, ids.shape[1] :].tolist() == out
        end = self.model.language_model.generation_config.eos_token_id
        return out[: out.index(end) + 1] if end in out else out
