"""Small models of the other fusion families, trained on the same scenes by one plain recipe: one question and answer per row.

These are classes of transformers; students_zoo.py has those of vlm_edge.zoo. The loop is teach.py. Widths are multiples of 32
(block-32 quantisation) and every head is 32 wide, as in models.py.
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

from benchmarks.train import donors
from benchmarks.train.models import HEADS, KV_HEADS, MLP, TILE, WIDTH, Parts
from benchmarks.train.student import CELLS, TEXT, VISION, Student, generation, plain, prefix_types
from benchmarks.train.students_zoo import STUDENTS as ZOO

FENCE = "<fake_token_around_image>"
IMAGE = 4
"""The donor's image token."""


def paligemma(seed: int) -> Parts:
    """PaliGemma (arXiv 2407.07726): SigLIP, a linear projection, Gemma with a bidirectional prefix."""
    words = donors.words(image_token="<image>")
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=t.GemmaConfig(**TEXT, num_key_value_heads=KV_HEADS, head_dim=WIDTH // HEADS, rms_norm_eps=1e-5),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    images = t.SiglipImageProcessorPil(size={"height": TILE, "width": TILE})
    images.image_seq_length = CELLS
    model: Any = t.PaliGemmaForConditionalGeneration(config)
    donors.give(model.model.vision_tower, donors.siglip_eyes(images))
    donors.give(model.model.language_model, donors.gemma())
    return Parts(model, t.PaliGemmaProcessor(images, words), generation())


def idefics(seed: int) -> Parts:
    """IDEFICS, the open Flamingo (arXiv 2204.14198): CLIP's encoder, a perceiver to 16 latents, gated cross-attention."""
    words = donors.words([FENCE])
    config = t.IdeficsConfig(
        **TEXT,
        additional_vocab_size=32,
        rms_norm_eps=1e-5,
        alpha_initializer="ones",
        alpha_type="vector",
        cross_layer_interval=1,
        qk_layer_norms=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        tie_word_embeddings=False,
        use_resampler=True,
        vision_config={**{key: value for key, value in VISION.items() if key != "hidden_size"}, "embed_dim": WIDTH},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": CELLS,
            "resampler_depth": 2,
            "resampler_n_heads": HEADS,
            "resampler_head_dim": WIDTH // HEADS,
            "qk_layer_norms_perceiver": True,
        },
    )
    images = t.IdeficsImageProcessorPil(image_size=TILE)
    model: Any = t.IdeficsForVisionText2Text(config)
    donors.give(model.model.vision_model, donors.clip_eyes())
    donors.give(model.model, donors.llama(grouped=False))
    donors.give(model, {"lm_head.weight": donors.embeddings()})
    for layer in model.model.gated_cross_attn_layers:  # Flamingo's 0 is a slow beginning, 1 drowns what the donor knows
        for gate in (layer.alpha_cross_attn, layer.alpha_dense):
            torch.nn.init.constant_(gate, 0.3)
    return Parts(model, t.IdeficsProcessor(images, words, image_size=TILE), generation())


def blip2(seed: int) -> Parts:
    """BLIP-2 (arXiv 2301.12597): ViT, a Q-Former with 16 queries, OPT."""
    words = donors.words()
    text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    config = t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**VISION, layer_norm_eps=1e-5).to_dict(),
        qformer_config=t.Blip2QFormerConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            cross_attention_frequency=1,
            initializer_range=WIDTH**-0.5,  # at BERT's 0.02 all queries see the mean of all patches for a long time
            encoder_hidden_size=WIDTH,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ).to_dict(),
        text_config=t.OPTConfig(**text, ffn_dim=MLP, word_embed_proj_dim=WIDTH, dropout=0.0, tie_word_embeddings=True).to_dict(),
        num_query_tokens=CELLS,
        image_token_index=IMAGE,
    )
    images = t.BlipImageProcessorPil(size={"height": TILE, "width": TILE})
    model: Any = t.Blip2ForConditionalGeneration(config)
    donors.give(model.vision_model, donors.blip2_eyes(images))
    donors.give(model.language_model, {"model.decoder.embed_tokens.weight": donors.embeddings()})
    torch.nn.init.normal_(model.query_tokens, std=0.5)  # equal queries would stay equal
    return Parts(model, t.Blip2Processor(images, words, num_query_tokens=CELLS), generation())


def _image_mask(batch: dict[str, Tensor]) -> dict[str, Any]:
    """IDEFICS: every token from the image's own on sees it."""
    seen = (batch["input_ids"] == IMAGE).cumsum(-1).clamp(max=1)[..., None]
    return plain(batch) | {"pixel_values": batch["pixel_values"][:, None], "image_attention_mask": seen}


def _texts(processor: Any, images: list[Any], prompts: list[str]) -> Any:
    return processor(text=prompts, images=images, padding=True, return_tensors="pt")


STUDENTS: dict[str, Student] = {
    "paligemma": Student(
        paligemma,
        lambda ids, words, question: [*[IMAGE] * CELLS, 1, *ids(f"{question}\n")],
        prefix_types,
        lambda processor, images, prompts: _texts(processor, images, [f"<image>{prompt}" for prompt in prompts]),
        eyes="model.vision_tower",
        seen="model.vision_tower",
        donor="vision encoder (its first layer fitted to SigLIP's form), words and language model of tiny-llava",
    ),
    "idefics": Student(
        idefics,
        lambda ids, words, question: [1, *ids(f"{FENCE}<image>{FENCE}{question}")],
        _image_mask,
        lambda processor, images, prompts: processor(
            text=[[image, prompt] for image, prompt in zip(images, prompts, strict=True)], padding=True, return_tensors="pt"
        ),
        eyes="model.vision_model",
        seen="model.perceiver_resampler",
        sides=True,
        batch=16,
        rate=7e-4,
        donor="vision encoder, words and language model of tiny-llava",
    ),
    "blip2": Student(
        blip2,
        lambda ids, words, question: [*[IMAGE] * CELLS, 1, *ids(question)],
        plain,
        _texts,
        eyes="vision_model",
        seen="language_projection",
        sides=True,
        donor="vision encoder (its first layer fitted to BLIP-2's form) and words of tiny-llava",
    ),
    **ZOO,
}
