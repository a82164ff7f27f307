"""Makes the random-weight checkpoint: model, a tokenizer trained on the standard library's sources, processor."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VOCABULARY = 49280
LAYERS = 30


def _tokenizer() -> Any:
    """A byte-level BPE of 49,152 pieces with single digits, as SmolLM2's, and SmolVLM's special tokens after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    random.Random(0).shuffle(sources)
    texts = []
    for source in sources[:3000]:
        try:
            texts.append(source.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a few test files of the standard library are not UTF-8 on purpose
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=49152,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = _with_paragraphs(tokenizer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    frames = ["<global-img>", *tiles, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    fast.add_tokens(frames, special_tokens=True)
    return fast


def _with_paragraphs(tokenizer: Any) -> Any:
    """SmolLM2 has a token for two line ends, which llama.cpp asks for; here it takes the place of the last merge."""
    from tokenizers import Tokenizer

    saved = json.loads(tokenizer.to_str())
    vocabulary, end = saved["model"]["vocab"], "\u010a"
    if end * 2 not in vocabulary:
        vocabulary[end * 2] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
        saved["model"]["merges"][-1] = [end, end]
    return Tokenizer.from_str(json.dumps(saved))


def make(folder: Path, layers: int = LAYERS) -> None:
    """Writes the checkpoint into `folder` (about 1 GB in float32); does nothing when it is there already."""
    if (folder / "made.json").is_file():
        return
    import torch
    from transformers import (
        GenerationConfig,
        Idefics3Processor,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
    )

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **ids,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 512,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    config = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=4,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=ids["pad_token_id"],
    )
    model = SmolVLMForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(**ids)
    images = SmolVLMImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"longest_edge": 2048},
        do_image_splitting=True,
        max_image_size={"longest_edge": 512},
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_pad=True,
    )
    # SmolVLM's own processor wants a video processor, which needs torchvision; the first releases shipped this one.
    processor = Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=CHAT_TEMPLATE)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    images.save_pretrained(folder)
    parameters = sum(p.numel() for p in set(model.parameters()))
    (folder / "made.json").write_text(json.dumps({"parameters": parameters, "layers": layers}))
