"""Checkpoints of family `cross_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from .common import CONTEXT, HEADS, IMAGE, LAYERS, MLP, PATCH, VISION, VOCABULARY, WIDTH, Parts, generating, tokenizer

START = 2
"""What decoders begin with: `<s>`."""

_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "is_decoder": True,
    "add_cross_attention": True,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": MLP,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "is_decoder": True,
    "add_cross_attention": True,
    "is_encoder_decoder": False,
}


def _vision(kind: str, width: int = WIDTH) -> t.PreTrainedConfig:
    sizes = {**VISION, "hidden_size": width}
    if kind == "vit":
        return t.ViTConfig(**sizes)
    if kind == "deit":
        return t.DeiTConfig(**sizes)
    swin = {"image_size": [IMAGE, 2 * IMAGE], "patch_size": 4, "embed_dim": width // 2, "depths": [2, 1], "num_heads": [2, 4]}
    return (t.DonutSwinConfig if kind == "donut" else t.SwinConfig)(**swin, window_size=4)


def _decoder(kind: str, **more: Any) -> t.PreTrainedConfig:
    if kind == "gpt2":
        names = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "tie_word_embeddings": False}
        tokens = {key: _BERT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        return t.GPT2Config(**names, **tokens, is_decoder=True, add_cross_attention=True, **more)
    if kind == "bert":
        return t.BertConfig(**_BERT, **more)
    if kind == "roberta":  # positions begin after the padding token's
        return t.RobertaConfig(**{**_BERT, "max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1}, **more)
    classes = {"bart": t.BartConfig, "mbart": t.MBartConfig, "trocr": t.TrOCRConfig}
    return classes[kind](**_BART, **more)


def vision_encoder_decoder(vision: str, decoder: str, *, width: int = WIDTH, **more: Any) -> Parts:
    """Any vision encoder with any decoder. `width`: the encoder's; where it differs from the decoder's there is a projector."""
    words = tokenizer(["<s_ocr>", "<s_vqa>"])
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(_vision(vision, width), _decoder(decoder, **more))
    model = _starting(t.VisionEncoderDecoderModel(config))
    if vision in ("donut", "swin"):
        images: Any = t.DonutImageProcessorPil(size={"height": IMAGE, "width": 2 * IMAGE}, do_align_long_axis=True)
    else:
        kind = t.DeiTImageProcessorPil if vision == "deit" else t.ViTImageProcessorPil
        images = kind(size={"height": IMAGE, "width": IMAGE}, **({"do_center_crop": False} if vision == "deit" else {}))
    return model, images, words, None, None


def blip(kind: type[t.PreTrainedModel]) -> Parts:
    """BLIP: a BERT with cross-attention to the image; for questions a second one that writes the answer."""
    words = tokenizer(["[DEC]"], ends=True)
    text = {key: value for key, value in _BERT.items() if key != "add_cross_attention"}
    text |= {"bos_token_id": words.convert_tokens_to_ids("[DEC]"), "sep_token_id": 3, "eos_token_id": 3, "projection_dim": WIDTH}
    config = t.BlipConfig(vision_config={**VISION, "projection_dim": WIDTH}, text_config=text, projection_dim=WIDTH)
    model = kind(config)
    model.generation_config = t.GenerationConfig(max_new_tokens=8)
    images = t.BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    return model, images, words, {"processor_class": "BlipProcessor"}, None


def florence2(**more: Any) -> Parts:
    """Florence-2: DaViT in four stages (here two), features in place of image tokens in BART's encoder."""
    words = tokenizer(["<image>"], image_token="<image>")
    text = {
        **_BART,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": MLP,
        "is_encoder_decoder": True,
    }
    text |= {
        "is_decoder": False,
        "add_cross_attention": False,
        "decoder_start_token_id": START,
        "forced_eos_token_id": None,
        **more,
    }
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [WIDTH // 2, WIDTH],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 3,
        "projection_dim": WIDTH,
        "max_position_embeddings": 20,
    }
    config = t.Florence2Config(
        text_config={"model_type": "bart", **text},
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = _starting(t.Florence2ForConditionalGeneration(config))
    images = t.CLIPImageProcessorPil(
        size={"height": IMAGE, "width": IMAGE}, do_center_crop=False, image_seq_length=(IMAGE // 8) ** 2 + 1
    )
    return model, images, words, {"processor_class": "Florence2Processor"}, None


def pix2struct() -> Parts:
    """Pix2Struct: patches in the image's aspect ratio, a decoder of T5's kind."""
    heads = {"num_heads": HEADS, "d_kv": WIDTH // HEADS, "d_ff": MLP, "num_layers": LAYERS}
    text = {**heads, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "relative_attention_num_buckets": 8}
    text |= {"relative_attention_max_distance": 16, "decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 3}
    vision = {**VISION, "d_kv": WIDTH // HEADS, "d_ff": MLP, "patch_embed_hidden_size": 3 * PATCH**2, "seq_len": 64}
    config = t.Pix2StructConfig(text_config=text, vision_config=vision, pad_token_id=1, eos_token_id=3)
    model = generating(t.Pix2StructForConditionalGeneration(config))
    model.generation_config.decoder_start_token_id = 1
    images = t.Pix2StructImageProcessorPil(patch_size={"height": PATCH, "width": PATCH}, max_patches=20)
    return model, images, tokenizer([]), {"processor_class": "Pix2StructProcessor"}, None


def _starting(model: t.PreTrainedModel) -> t.PreTrainedModel:
    generating(model).generation_config.decoder_start_token_id = START
    model.config.decoder_start_token_id = START
    return model


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "blip-caption": lambda: blip(t.BlipForConditionalGeneration),
    "blip-vqa": lambda: blip(t.BlipForQuestionAnswering),
    "vit-gpt2": lambda: vision_encoder_decoder("vit", "gpt2"),
    "vit-gpt2-scaled": lambda: vision_encoder_decoder("vit", "gpt2", width=32, scale_attn_by_inverse_layer_idx=True),
    "vit-bert": lambda: vision_encoder_decoder("vit", "bert"),
    "deit-roberta": lambda: vision_encoder_decoder("deit", "roberta", width=32),
    "deit-trocr": lambda: vision_encoder_decoder("deit", "trocr", width=32, cross_attention_hidden_size=32, scale_embedding=True),
    "vit-trocr-sines": lambda: vision_encoder_decoder("vit", "trocr", use_learned_position_embeddings=False),
    "vit-bart": lambda: vision_encoder_decoder("vit", "bart", scale_embedding=True),
    "donut-mbart": lambda: vision_encoder_decoder("donut", "mbart"),
    "florence2": florence2,
    "florence2-scaled": lambda: florence2(scale_embedding=True),
    "pix2struct": pix2struct,
}
