"""Real tokenizers of the kinds that checkpoints bring, trained here on a few sentences, in folders as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "A red circle is left of the blue square. Don't say it isn't: it's there, isn't it?",
    "The quick brown fox jumps over 13 lazy dogs , doesn't it ?",
    "Ein grüner Kreis über dem größten Dreieck. Où est le café ? Ça va !",
    "二つの青い四角がある。猫は椅子の上にいます。",
    "Привет, мир! 🙂🚀 naïve façade",
    "    indented\n\n\ttabs and   spaces\n",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SPECIAL += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _special(words: list[str]) -> list[AddedToken]:
    return [AddedToken(word, normalized=False, special=True) for word in words]


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)])
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2, Qwen, SmolLM: bytes in disguise."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=_special(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _fallback_model(tokenizer: Tokenizer) -> Tokenizer:
    """Trains on the Latin sentences only, so that all else falls back to bytes."""
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=_special(SPECIAL) + _special(BYTES), show_progress=False)
    tokenizer.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    saved = json.loads(tokenizer.to_str())
    saved["model"]["byte_fallback"] = True
    saved["model"]["unk_token"] = "<unk>"
    # The bytes are ordinary vocabulary in SentencePiece's models, not special tokens.
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in BYTES]
    return _with_bos(Tokenizer.from_str(json.dumps(saved)))


def llama() -> Tokenizer:
    """Llama 2, LLaVA 1.5: SentencePiece as converted by transformers, spaces as ▁, bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fallback_model(tokenizer)


def metaspace() -> Tokenizer:
    """The newer form of the same."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=True)])
    return _fallback_model(tokenizer)


def word_piece() -> Tokenizer:
    """BERT: words are joined by spaces, which `clean_up_tokenization_spaces` then takes out before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=_special(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def clip() -> Tokenizer:
    """CLIP: lower case, words end in </w>."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="</s>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"<s>|</s>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=_special(["<s>", "</s>"]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return tokenizer


MAKERS = {
    "byte-level": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}),
    "llama": (llama, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **NAMES}),
    "metaspace": (metaspace, {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **NAMES}),
    "word-piece": (word_piece, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **NAMES}),
    "clip": (
        clip,
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "</s>",
            "pad_token": {"__type": "AddedToken", "content": "</s>", "special": True},
            "model_max_length": 77,
        },
    ),
}


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with tokenizer.json and tokenizer_config.json per kind; and the committed checkpoints."""
    folders: dict[str, Path] = {}
    for name, (make, config) in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        make().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        folders[name] = folder
    for path in sorted((Path(__file__).parents[2] / "checkpoints").glob("*/tokenizer.json")):
        folders[path.parent.name] = path.parent
    return folders
