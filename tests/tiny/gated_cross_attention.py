"""Checkpoints of family `gated_cross_attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t

from .common import CONTEXT, HEADS, IMAGE, KV_HEADS, LAYERS, MLP, PATCH, VOCABULARY, WIDTH, Parts, generating, tokenizer

_FENCE = "<fake_token_around_image>"


def idefics(*, resampler: bool = True, norms: bool = True, interval: int = 1) -> Parts:
    """IDEFICS: 4 latents an image, gated layers before every `interval`-th layer, gates that are open."""
    words = tokenizer([_FENCE, "<image>", "<end_of_utterance>"], image_token="<image>")
    extra = 2
    config = t.IdeficsConfig(
        vocab_size=VOCABULARY - extra,
        additional_vocab_size=extra,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        alpha_initializer="ones",
        alpha_type="vector",
        cross_layer_interval=interval,
        qk_layer_norms=norms,
        use_resampler=resampler,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        tie_word_embeddings=False,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        vision_config={
            "embed_dim": 32,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "intermediate_size": MLP,
        },
        perceiver_config={
            "use_resampler": resampler,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "qk_layer_norms_perceiver": norms,
        },
    )
    images = t.IdeficsImageProcessorPil(image_size=IMAGE)
    model = generating(t.IdeficsForVisionText2Text(config))
    return model, images, words, {"processor_class": "IdeficsProcessor"}, None


def mllama(*, crossing: tuple[int, ...] = (1, 3)) -> Parts:
    """Llama 3.2 Vision: 4 layers of which `crossing` read images, up to 4 tiles, gates that are open."""
    words = tokenizer(["<|image|>", "<|python_tag|>"], image_token="<|image|>")
    config = t.MllamaConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": 4,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": CONTEXT,
            "cross_attention_layers": list(crossing),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": MLP,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 96,
        },
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )
    model = generating(t.MllamaForConditionalGeneration(config))
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if gate.numel() == 1:
                gate.fill_(0.9 if "attn" in name else 0.6)
    images = t.MllamaImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, max_image_tiles=4)
    return model, images, words, {"processor_class": "MllamaProcessor"}, None


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "idefics": idefics,
    "idefics-plain": lambda: idefics(resampler=False, norms=False, interval=2),
    "mllama": mllama,
}
