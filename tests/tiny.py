"""Tiny checkpoints with random weights, whole: weights, configuration, a real tokenizer, image processor, chat template.

`checkpoint(name, folder)` writes one. Two layers, width 64, heads of 16. The weights are drawn much wider than an
initialiser would, so that attention is far from uniform and a wrong mask, window, position or soft-cap shows in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 384
WIDTH, MLP, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 128, 4, 2, 2, 256
IMAGE, PATCH = 32, 8
WINDOW = 8
"""Sliding window of the models that have one: shorter than what tests run through them."""

Parts = tuple[t.PreTrainedModel, Any, t.PreTrainedTokenizerFast, dict[str, Any] | None, str | None]
"""Model, image processor, tokenizer, processor_config.json, chat template."""

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_CORPUS = [
    "USER: what is in the picture? ASSISTANT: a red circle left of a blue square",
    "USER: how many shapes are there? ASSISTANT: three green triangles",
    "describe this image, please. The cat sat on the mat, the dog ran after it!",
    "a photo of a cat; a photo of a dog; two photos of the sea, of a house, of a tree",
]


def tokenizer(special: list[str], *, ends: bool = False, **named: str) -> t.PreTrainedTokenizerFast:
    """A byte-level BPE trained on four sentences. `<s>` begins a text; with `ends`, `</s>` ends it (CLIP's manner)."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    words = ["<unk>", "<pad>", "<s>", "</s>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        special_tokens=[AddedToken(word, special=True, normalized=False) for word in words],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(_CORPUS, trainer)
    bare.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
        padding_side="right" if ends else "left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def heat(model: torch.nn.Module, seed: int = 7) -> None:
    """Redraws every weight: matrices with variance 2.25 / fan-in, embeddings and positions of size 1, norms around 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, spread: float, centre: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + centre)

    with torch.no_grad():
        for name, module in model.named_modules():
            for key, weight in module.named_parameters(recurse=False):
                if weight.numel() == 1:  # a scale or a bias of the similarity
                    continue
                if key == "bias":
                    draw(weight, 0.1)
                elif isinstance(module, torch.nn.Embedding):
                    draw(weight, 1.0)
                elif weight.dim() == 1:
                    centred = "gemma" in type(module).__name__.lower()  # Gemma's norms multiply by 1 + weight
                    draw(weight, 0.2, 0.0 if centred else 1.0)
                elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)) or name.endswith(("c_attn", "c_fc")):
                    draw(weight, 1.5 * (weight.numel() / weight.shape[0]) ** -0.5)
                else:
                    draw(weight, 0.5)


def checkpoint(name: str, folder: str | Path, *, seed: int = 7) -> Path:
    """Writes the checkpoint called `name` (a key of CHECKPOINTS) as a local folder and returns it."""
    torch.manual_seed(seed)
    model, images, words, processor, template = CHECKPOINTS[name]()
    heat(model, seed)
    model.eval().tie_weights()
    folder = Path(folder)
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    words.save_pretrained(folder)
    if processor is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


def _text_config(kind: str) -> t.PreTrainedConfig:
    """A decoder of each architecture that the shared decoder graph must carry."""
    alternating = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
    wide = {"query_pre_attn_scalar": 16}
    if kind == "llama":
        return t.LlamaConfig(**_TEXT, tie_word_embeddings=True)
    if kind == "mistral":
        return t.MistralConfig(**_TEXT, sliding_window=WINDOW)
    if kind == "qwen2":
        return t.Qwen2Config(**_TEXT, tie_word_embeddings=True)
    if kind == "qwen3":
        return t.Qwen3Config(**_TEXT)
    if kind == "phi3":
        return t.Phi3Config(**_TEXT, original_max_position_embeddings=CONTEXT)
    if kind == "gemma":
        return t.GemmaConfig(**_TEXT)
    if kind == "gemma2":
        # Caps small enough to bend the scores.
        return t.Gemma2Config(**_TEXT, **alternating, **wide, attn_logit_softcapping=2.0, final_logit_softcapping=4.0)
    if kind == "gemma3":
        return t.Gemma3TextConfig(**_TEXT, **alternating, **wide)
    tokens = {key: _TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    if kind == "opt":
        return t.OPTConfig(
            **tokens,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            tie_word_embeddings=False,
            ffn_dim=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
        )
    if kind == "gpt2":
        return t.GPT2Config(**tokens, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, tie_word_embeddings=False)
    raise KeyError(kind)


def _generating(model: t.PreTrainedModel, ends: int | list[int] = 3) -> t.PreTrainedModel:
    model.generation_config = t.GenerationConfig(bos_token_id=2, eos_token_id=ends, pad_token_id=1, max_new_tokens=8)
    return model


def _clip_images() -> t.CLIPImageProcessorPil:
    return t.CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})


def _siglip_images() -> t.SiglipImageProcessorPil:
    return t.SiglipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})


def llava(text: str, *, tower: str = "clip", layer: int | list[int] = -2, strategy: str = "default") -> Parts:
    """LLaVA around any text model; `tower` is `clip` (with a class token) or `siglip` (without)."""
    words = tokenizer(["<image>"], image_token="<image>")
    vision = t.CLIPVisionConfig(**_VISION) if tower == "clip" else t.SiglipVisionConfig(**_VISION, vision_use_head=False)
    decoder = _text_config(text)
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if tower == "clip" else 0,
        "image_token": "<image>",
    }
    model = _generating(t.LlavaForConditionalGeneration(config))
    images = _clip_images() if tower == "clip" else _siglip_images()
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>\n'")


def vipllava() -> Parts:
    """VipLLaVA: LLaVA over several layers of its vision encoder, with a norm before the projector."""
    _, images, words, processor, template = llava("llama")
    config = t.VipLlavaConfig(
        vision_config=t.CLIPVisionConfig(**_VISION),
        text_config=_text_config("llama"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=True,
    )
    return _generating(t.VipLlavaForConditionalGeneration(config)), images, words, processor, template


def tiles(kind: str) -> Parts:
    """SmolVLM or Idefics3: an image of up to 2 × 2 tiles and a global view, each 4 tokens after the pixel shuffle."""
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "global_image_token": "<global-img>"}
    markers = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer([*names.values(), "<end_of_utterance>", *markers], **names)
    smol = kind == "smolvlm"
    config = (t.SmolVLMConfig if smol else t.Idefics3Config)(
        vision_config={"model_type": "smolvlm_vision" if smol else "idefics3_vision", **_VISION},
        text_config=t.LlamaConfig(**_TEXT, tie_word_embeddings=not smol),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=not smol,
        pad_token_id=1,
    )
    images = (t.SmolVLMImageProcessorPil if smol else t.Idefics3ImageProcessorPil)(
        size={"longest_edge": 2 * IMAGE}, max_image_size={"longest_edge": IMAGE}, do_image_splitting=True
    )
    end = words.convert_tokens_to_ids("<end_of_utterance>")
    model = _generating((t.SmolVLMForConditionalGeneration if smol else t.Idefics3ForConditionalGeneration)(config), [3, end])
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": (IMAGE // PATCH) ** 2 // 4}
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>'")


def qwen2_vl() -> Parts:
    """Qwen2-VL: images of any size in patches of 8, merged 2 × 2, M-RoPE over time, height and width."""
    words = tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], image_token="<|image_pad|>")
    token = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {key: value for key, value in _TEXT.items() if key != "head_dim"}
    config = t.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={
            "depth": LAYERS,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    images = t.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    model = _generating(t.Qwen2VLForConditionalGeneration(config))
    return model, images, words, None, TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")


def clip() -> Parts:
    """CLIP with a space of 32 dimensions."""
    words = tokenizer([], ends=True)
    text = {key: _TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    layers = {key: _VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = t.CLIPConfig(text_config={**text, **layers, "max_position_embeddings": 16}, vision_config=_VISION, projection_dim=32)
    return t.CLIPModel(config), _clip_images(), words, {"processor_class": "CLIPProcessor"}, None


def siglip() -> Parts:
    """SigLIP: no class token, pooling by attention, a scale and a bias."""
    words = tokenizer([], ends=True)
    text = {key: _TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    layers = {key: _VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = t.SiglipConfig(
        text_config={**text, **layers, "max_position_embeddings": 16, "projection_size": WIDTH}, vision_config=_VISION
    )
    model = t.SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model, _siglip_images(), words, {"processor_class": "SiglipProcessor"}, None


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "llava-llama": lambda: llava("llama"),
    "llava-opt": lambda: llava("opt", tower="siglip", layer=-1, strategy="full"),
    "llava-gpt2": lambda: llava("gpt2", strategy="full"),
    "llava-qwen2": lambda: llava("qwen2", layer=[-2, -1]),
    "llava-qwen3": lambda: llava("qwen3"),
    "llava-phi3": lambda: llava("phi3"),
    "llava-mistral": lambda: llava("mistral"),
    "llava-gemma": lambda: llava("gemma"),
    "llava-gemma2": lambda: llava("gemma2"),
    "llava-gemma3": lambda: llava("gemma3"),
    "vipllava": vipllava,
    "smolvlm": lambda: tiles("smolvlm"),
    "idefics3": lambda: tiles("idefics3"),
    "qwen2_vl": qwen2_vl,
    "clip": clip,
    "siglip": siglip,
}
