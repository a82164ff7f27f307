"""The three small models in the real transformers classes, and the processors that belong to them.

Every width is a multiple of 32 (block-32 quantisation) and every head is 32 wide.
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from benchmarks.train import tokenizer as tokenizers

Name = Literal["llava", "smolvlm", "clip"]

WIDTH, HEADS, KV_HEADS, MLP = 128, 4, 2, 384
TILE, PATCH, SCALE = 64, 16, 2
"""Edge of the vision encoder's image and of a patch in pixels, and SmolVLM's pixel-shuffle factor."""


@dataclass(slots=True)
class Parts:
    """A fresh model and what stands beside it in the checkpoint's folder."""

    model: PreTrainedModel
    processor: Any
    generation: GenerationConfig | None = None

    def save(self, folder: Path) -> None:
        """Write the checkpoint in float16, the configuration, tokenizer, processor and chat template to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        half = copy.deepcopy(self.model).half()
        if self.generation is not None:
            half.generation_config = self.generation
        half.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors creates its files for their owner alone
        self.processor.image_processor.save_pretrained(folder)  # preprocessor_config.json, which older readers expect


def _text_config(tokenizer: Any, layers: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizers.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
    )


def _generation(tokenizer: Any) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=24,
    )


def _clip_images() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})


def llava(seed: int) -> Parts:
    """LLaVA (Liu et al. 2023): a CLIP vision tower read at its second last layer, a two-layer projector, Llama."""
    tokenizer: Any = tokenizers.llava(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer, 4, tied=True),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    processor = LlavaProcessor(
        image_processor=_clip_images(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizers.LLAVA_TEMPLATE,
    )
    return Parts(LlavaForConditionalGeneration(config), processor, _generation(tokenizer))


def smolvlm(seed: int) -> Parts:
    """SmolVLM (Marafioti et al. 2025): tiles and a global view through SigLIP, pixel shuffle, Llama."""
    tokenizer: Any = tokenizers.smolvlm(seed)
    vision = {
        "model_type": "smolvlm_vision",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    padding: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}  # read by the configuration, yet not declared
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer, 4, tied=False),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SCALE,
        tie_word_embeddings=False,
        **padding,
    )
    # The first SmolVLM releases shipped Idefics3's processor, which joins text and tiles in the same way. SmolVLM's own
    # also wants a video processor, and that one cannot even be loaded where torchvision is missing.
    processor = Idefics3Processor(
        image_processor=SmolVLMImageProcessorPil(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}, do_image_splitting=True
        ),
        tokenizer=tokenizer,
        image_seq_len=(TILE // PATCH) ** 2 // SCALE**2,
        chat_template=tokenizers.SMOLVLM_TEMPLATE,
    )
    return Parts(SmolVLMForConditionalGeneration(config), processor, _generation(tokenizer))


def clip(seed: int) -> Parts:
    """CLIP (Radford et al. 2021): two towers and a shared space of 128 dimensions."""
    tokenizer: Any = tokenizers.clip(seed)
    shared: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    text = CLIPTextConfig(
        vocab_size=tokenizers.CLIP_VOCABULARY,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=TILE, patch_size=PATCH, **shared)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    return Parts(CLIPModel(config), CLIPProcessor(image_processor=_clip_images(), tokenizer=tokenizer))


def build(name: Name, seed: int) -> Parts:
    """Return the freshly initialised model called ``name``; set torch's seed before."""
    return {"llava": llava, "smolvlm": smolvlm, "clip": clip}[name](seed)
