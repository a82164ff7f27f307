"""Students of the classes in vlm_edge.zoo: MiniGPT-v2, SimVLM, and the captioners Show-Attend-Tell, VisualGPT and CoCa."""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor
from torch.nn import functional as F

from benchmarks.train import donors, scenes
from benchmarks.train import tokenizer as tokenizers
from benchmarks.train.models import HEADS, KV_HEADS, TILE, WIDTH, Parts
from benchmarks.train.student import CELLS, IDS, TEXT, VISION, SideBySide, Student, generation, plain, prefix_types
from vlm_edge.zoo.coca import CoCaConfig, CoCaForConditionalGeneration, CoCaTextConfig, CoCaVisionConfig
from vlm_edge.zoo.minigpt_v2 import TASKS, MiniGPTv2Config, MiniGPTv2ForConditionalGeneration
from vlm_edge.zoo.show_attend_tell import ShowAttendTellConfig, ShowAttendTellForConditionalGeneration
from vlm_edge.zoo.simvlm import SimVLMConfig, SimVLMForConditionalGeneration
from vlm_edge.zoo.visual_gpt import VisualGPTConfig, VisualGPTForConditionalGeneration, VisualGPTTextConfig

IMAGE = 4
"""The donor's image token."""
MINIGPT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<Img><image></Img> ' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ ' [/INST]' }}{% else %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ ' ' + part['text'] }}{% endfor %}{% endif %}{{ '</s>' }}"
    "{% endif %}{% endfor %}"
)
"""Section 2.2: ``[INST] <Img><ImageFeature></Img> instruction [/INST]``; a task identifier, where there is one, is the user's."""

_GPT2: dict[str, Any] = {
    "vocab_size": tokenizers.VOCABULARY,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": True,
    **IDS,
}


def minigpt_v2(seed: int) -> Parts:
    """MiniGPT-v2 (arXiv 2310.09478): CLIP's encoder, four neighbouring patches become one token of a Llama."""
    words = donors.words(["[INST]", "[/INST]", "<Img>", "</Img>", *TASKS])
    words.chat_template = MINIGPT_TEMPLATE
    config = MiniGPTv2Config(
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
        text_config=t.LlamaConfig(
            **{**TEXT, "vocab_size": tokenizers.VOCABULARY + 32, "max_position_embeddings": 1024},
            num_key_value_heads=KV_HEADS,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )
    model: Any = MiniGPTv2ForConditionalGeneration(config)
    donors.give(model.vision_tower, donors.clip_eyes(), frozen=True)
    donors.give(model.language_model, donors.llama("model."))
    return Parts(model, SideBySide(_clip_images(), words), generation())


def simvlm(seed: int) -> Parts:
    """SimVLM (arXiv 2108.10904): convolutions, and one stack of layers that sees its prefix in both directions."""
    words = donors.words()
    config = SimVLMConfig(**TEXT, image_size=TILE, image_token_id=IMAGE)
    model = SimVLMForConditionalGeneration(config)
    donors.give(model, {"decoder.embed_tokens.weight": donors.embeddings()})
    images = t.SiglipImageProcessorPil(size={"height": TILE, "width": TILE})
    processor = t.LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=TILE // int(CELLS**0.5),
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    return Parts(model, processor, generation())


def show_attend_tell(seed: int) -> Parts:
    """Show, Attend and Tell (arXiv 1502.03044): convolutions to 4 x 4 places, an LSTM that attends to them."""
    config = ShowAttendTellConfig(vocab_size=tokenizers.VOCABULARY, image_size=TILE, conv_channels=[16, 32, 64, 128, 128], **IDS)
    model = ShowAttendTellForConditionalGeneration(config)
    donors.give(model.decoder, {"embed_tokens.weight": donors.embeddings()})
    return _captioner(model)


def visual_gpt(seed: int) -> Parts:
    """VisualGPT (arXiv 2102.10407): a ViT, and a GPT-2 whose cross-attention enters through self-resurrecting gates."""
    vision = t.ViTConfig(**VISION, layer_norm_eps=1e-5)
    config = VisualGPTConfig.from_encoder_decoder_configs(vision, VisualGPTTextConfig(**_GPT2, n_layer=3))
    model: Any = VisualGPTForConditionalGeneration(config)
    donors.give(model.encoder, donors.vit_eyes(_vit_images()))
    donors.give(model.decoder, {"transformer.wte.weight": donors.embeddings()})
    return _captioner(model)


def coca(seed: int) -> Parts:
    """CoCa (arXiv 2205.01917): a ViT, 16 caption queries, two unimodal and three multimodal layers."""
    words = donors.words(["[CLS]"])
    vision = CoCaVisionConfig(**VISION, layer_norm_eps=1e-5, caption_queries=CELLS)
    text = CoCaTextConfig(
        **{**_GPT2, "vocab_size": tokenizers.VOCABULARY + 32},
        n_layer=5,
        unimodal_layers=2,
        cls_token_id=words.convert_tokens_to_ids("[CLS]"),
    )
    model: Any = CoCaForConditionalGeneration(CoCaConfig.from_encoder_decoder_configs(vision, text))
    donors.give(model.encoder.vit, donors.vit_eyes(_vit_images()))
    donors.give(model.decoder, {"transformer.wte.weight": donors.embeddings()})
    return _captioner(model, words)


def _clip_images() -> Any:
    return t.CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})


def _vit_images() -> Any:
    return t.ViTImageProcessorPil(size={"height": TILE, "width": TILE})


def _captioner(model: Any, words: Any = None) -> Parts:
    """Captions begin with `<s>`."""
    begin = IDS["bos_token_id"]
    if hasattr(model.config, "decoder"):
        model.config.decoder_start_token_id, model.config.pad_token_id = begin, IDS["pad_token_id"]
    model.generation_config = generation(decoder_start_token_id=begin)
    return Parts(model, SideBySide(_vit_images(), words or donors.words()), model.generation_config)


def _begin(ids: Any, words: Any, question: str) -> list[int]:
    return [IDS["bos_token_id"]]


def _pictures(processor: SideBySide, images: list[Any], prompts: list[str]) -> Any:
    return processor.image_processor(images=images, return_tensors="pt")


def _decoder(batch: dict[str, Tensor]) -> dict[str, Any]:
    """An encoder-decoder's arguments."""
    named = {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    return named | {"pixel_values": batch["pixel_values"]}


def _instructions(processor: SideBySide, images: list[Any], prompts: list[str]) -> Any:
    """MiniGPT-v2: four tokens for each picture."""
    words = processor.tokenizer
    said = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts]
    texts = [words.apply_chat_template(one, tokenize=False).replace("<image>", "<image>" * (CELLS // 4)) for one in said]
    return words(texts, padding=True, return_tensors="pt") | _pictures(processor, images, prompts)


def _prefixed(processor: Any, images: list[Any], prompts: list[str]) -> Any:
    """SimVLM: the image, `<s>`, the text."""
    texts = [f"<image><s>{prompt}" for prompt in prompts]
    return processor(text=texts, images=images, padding=True, add_special_tokens=False, return_tensors="pt")


def _told(batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    chosen = batch["labels"][:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][chosen], batch["labels"][:, 1:][chosen])


def _doubly_stochastic(model: Any, batch: dict[str, Tensor], arguments: dict[str, Any], parts: Parts) -> Tensor:
    """Show, Attend and Tell's own loss, with equation 14's term."""
    loss: Tensor = model(**arguments, labels=batch["labels"]).loss
    return loss


def _contrastive_captioner(model: Any, batch: dict[str, Tensor], arguments: dict[str, Any], parts: Parts) -> Tensor:
    """CoCa's equation 4 with the paper's λ_Con = 1 and λ_Cap = 2; equal captions count as each other's."""
    seen = model.encoder(arguments["pixel_values"])
    made = model(
        encoder_outputs=seen, **{name: value for name, value in arguments.items() if name != "pixel_values"}, use_cache=False
    )
    words = parts.processor.tokenizer
    captions = [words.decode([token for token in row if token > 3]).strip() for row in batch["labels"].clamp(min=0).tolist()]
    text = model.get_text_features(**_texts(model, words, captions)).pooler_output
    image = F.normalize(seen.pooler_output, dim=-1)
    similarity = model.logit_scale.exp().clamp(max=100.0) * image @ F.normalize(text, dim=-1).T
    numbers = torch.tensor([captions.index(caption) for caption in captions])
    wanted = (numbers[:, None] == numbers[None]).float()
    wanted = wanted / wanted.sum(1, keepdim=True)
    contrast = (F.cross_entropy(similarity, wanted) + F.cross_entropy(similarity.T, wanted)) / 2
    return 2.0 * _told(batch, made.logits) + contrast


def _texts(model: Any, words: Any, texts: list[str]) -> dict[str, Tensor]:
    """Texts to be embedded: `<s>`, the words, [CLS], padding on the right."""
    end, rows = model.config.decoder.cls_token_id, words(texts)["input_ids"]
    length = 1 + max(len(row) for row in rows)
    ids = torch.tensor([[*row, end, *[IDS["pad_token_id"]] * (length - 1 - len(row))] for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] <= torch.tensor([[len(row)] for row in rows])).long()}


@torch.inference_mode()
def _retrieval(model: Any, processor: SideBySide, pools: int = 16, size: int = 16) -> dict[str, float]:
    """Top-1 accuracy of CoCa's contrastive half, both ways, over pools of different held-out captions."""
    right = torch.zeros(2)
    for seed in range(pools):
        images, captions = zip(*scenes.held_out_captions(size, seed), strict=True)
        pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        similarity = model.similarity(pixels, **_texts(model, processor.tokenizer, list(captions))).logits_per_image
        right += torch.stack([(similarity.argmax(axis) == torch.arange(size)).sum() for axis in (1, 0)])
    to_text, to_image = (right / (pools * size)).tolist()
    return {f"image to text, top 1 of {size}": to_text, f"text to image, top 1 of {size}": to_image}


STUDENTS: dict[str, Student] = {
    "minigpt_v2": Student(
        minigpt_v2,
        lambda ids, words, question: [1, *ids(f"[INST] <Img>{'<image>' * (CELLS // 4)}</Img> {question} [/INST]")],
        plain,
        _instructions,
        eyes="vision_tower",
        seen=None,
        rate=5e-4,
        processor=SideBySide.from_pretrained,
        donor="vision encoder (frozen), words and language model of tiny-llava",
    ),
    "simvlm": Student(
        simvlm,
        lambda ids, words, question: [*[IMAGE] * CELLS, 1, *ids(question)],
        prefix_types,
        _prefixed,
        eyes="conv_stage",
        seen="image_embedding",
        donor="words of tiny-llava",
    ),
    "show_attend_tell": Student(
        show_attend_tell,
        _begin,
        lambda batch: {name: batch[name] for name in ("input_ids", "pixel_values")},
        _pictures,
        eyes="encoder",
        seen="encoder",
        processor=SideBySide.from_pretrained,
        objective=_doubly_stochastic,
        captions=True,
        donor="words of tiny-llava",
        batch=48,
        talks=1,
    ),
    "visual_gpt": Student(
        visual_gpt,
        _begin,
        _decoder,
        _pictures,
        eyes="encoder",
        seen="encoder",
        processor=SideBySide.from_pretrained,
        captions=True,
        donor="vision encoder (its first layer fitted to ViT's form) and words of tiny-llava",
        batch=48,
        talks=1,
    ),
    "coca": Student(
        coca,
        _begin,
        _decoder,
        _pictures,
        eyes="encoder.vit",
        seen="encoder.caption_pooler",
        sides=True,
        processor=SideBySide.from_pretrained,
        objective=_contrastive_captioner,
        further=_retrieval,
        captions=True,
        donor="vision encoder (its first layer fitted to ViT's form) and words of tiny-llava",
        batch=48,
        talks=1,
    ),
}
