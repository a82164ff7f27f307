"""Real byte-level BPE tokenizers, trained on the corpus that the scenes and easy-vqa speak, and their chat templates."""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from benchmarks.train import easyvqa, scenes

VOCABULARY, CLIP_VOCABULARY = 512, 768
"""Rows of the embedding tables: multiples of 32, so that block-32 quantisation divides them. CLIP's table holds every byte
twice, within a word and at its end."""

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{# All images come first, as LLaVA was trained. #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA 1.5's turns: ``USER: <image>\\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:``."""

SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's turns: ``<|im_start|>User:<image>question<end_of_utterance>\\nAssistant: answer<end_of_utterance>``."""


def corpus(seed: int = 0) -> Iterator[str]:
    """Yield sentences in the words of the training data (no test composition is named)."""
    rng = random.Random(f"corpus-{seed}")
    for _ in range(6000):
        scene = scenes.sample(rng)
        yield f"USER:\n{rng.choice(scenes.DESCRIBE)} ASSISTANT: {scene.caption}"
        for question, answer in scenes.questions(scene, rng):
            yield f"User:\n{question}\nAssistant: {answer}"
    for question, answer, _ in easyvqa.questions("train")[::8]:
        yield f"USER:\n{question} ASSISTANT: {answer}"


def _byte_level(special: list[str], seed: int) -> Tokenizer:
    """Train a byte-level BPE in GPT-2's manner (Radford et al. 2019); ``special`` take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return tokenizer


def llava(seed: int = 0) -> PreTrainedTokenizerFast:
    """Return LLaVA's tokenizer; it puts ``<s>`` before every text, as Llama's does."""
    tokenizer = _byte_level(["<unk>", "<s>", "</s>", "<pad>", "<image>"], seed)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def smolvlm(seed: int = 0) -> PreTrainedTokenizerFast:
    """Return SmolVLM's tokenizer, with its row and column markers up to 6 x 6; it adds no token by itself."""
    markers = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *markers], seed)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def clip(seed: int = 0) -> CLIPTokenizer:
    """Return CLIP's tokenizer (lower case, ``</w>`` ends a word) with ``<|endoftext|>`` as its highest id."""
    shell = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - 2 - len(alphabet),  # room for the ends of words, which the trainer leaves out
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    learned = tokenizer.get_vocab()
    ends = [letter + "</w>" for letter in alphabet if letter + "</w>" not in learned]
    words = [*sorted(learned, key=lambda word: learned[word]), *ends]
    words += [f"<|unused{i}|>" for i in range(CLIP_VOCABULARY - 2 - len(words))]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges: Any = _merges(tokenizer)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=32)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)]
