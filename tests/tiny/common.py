"""What the tiny checkpoints of all families are made from: sizes, a tokenizer, text configurations, wide random weights."""

from __future__ import annotations

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


TEXT: dict[str, Any] = {
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
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


def text_config(kind: str) -> t.PreTrainedConfig:
    """A decoder of each architecture that the shared decoder graph must carry."""
    alternating = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
    wide = {"query_pre_attn_scalar": 16}
    if kind == "llama":
        return t.LlamaConfig(**TEXT, tie_word_embeddings=True)
    if kind == "mistral":
        return t.MistralConfig(**TEXT, sliding_window=WINDOW)
    if kind == "qwen2":
        return t.Qwen2Config(**TEXT, tie_word_embeddings=True)
    if kind == "qwen3":
        return t.Qwen3Config(**TEXT)
    if kind == "phi3":
        return t.Phi3Config(**TEXT, original_max_position_embeddings=CONTEXT)
    if kind == "gemma":
        return t.GemmaConfig(**TEXT)
    if kind == "gemma2":
        # Caps small enough to bend the scores.
        return t.Gemma2Config(**TEXT, **alternating, **wide, attn_logit_softcapping=2.0, final_logit_softcapping=4.0)
    if kind == "gemma3":
        return t.Gemma3TextConfig(**TEXT, **alternating, **wide)
    tokens = {key: TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
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


def generating(model: t.PreTrainedModel, ends: int | list[int] = 3) -> t.PreTrainedModel:
    model.generation_config = t.GenerationConfig(bos_token_id=2, eos_token_id=ends, pad_token_id=1, max_new_tokens=8)
    return model


def clip_images() -> t.CLIPImageProcessorPil:
    return t.CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})


def siglip_images() -> t.SiglipImageProcessorPil:
    return t.SiglipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
