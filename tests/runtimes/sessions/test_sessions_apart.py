"""Prompts whose placeholders stand apart from the text: token for token what Blip2Processor makes, with any kind of tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
from session_pictures import noise
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Blip2Processor, BlipImageProcessorPil, PreTrainedTokenizerFast

from vlm_edge_runtime import load
from vlm_edge_runtime.bundle.reader import file_sha256

QUERIES, IMAGE = 5, 32
CORPUS = ["what is in the picture?", "describe this image, please.", "Question: how many? Answer:", "the cat sat on the mat"]
PROMPTS = [*CORPUS, "", " a cat", "  two  blanks ", "cat\n", "Ünïcode?", "a", "</s>", "<s>what"]
SPLITTERS = {
    "metaspace at the start of a text": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace everywhere": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace by normalising": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizers.Split("▁", "merged_with_next"),
    ),
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a blank before": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
}
AROUND = {"<s> text": "<s> $A", "text </s>": "$A </s>", "text": "$A"}


def tokenizer(splitter: str, around: str) -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer, bare.pre_tokenizer = SPLITTERS[splitter]
    if normalizer is not None:
        bare.normalizer = normalizer
    bare.decoder = decoders.ByteLevel()
    special = [AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<pad>", "<s>", "</s>", "<image>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if splitter.startswith("bytes") else []
    bare.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    bare.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("around", AROUND)
def test_tokens_are_the_processors(splitter, around, portable_bundle, tmp_path) -> None:
    words = tokenizer(splitter, around)
    folder = tmp_path / "bundle.vlm"
    shutil.copytree(portable_bundle("blip2-opt"), folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    words.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text("{}")
    manifest = json.loads((folder / "manifest.json").read_text())
    for ref in manifest["files"]:
        ref |= {"bytes": (folder / ref["file"]).stat().st_size, "sha256": file_sha256(folder / ref["file"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE}), words, num_query_tokens=QUERIES)
    image = noise(1)
    with load(folder, build="portable") as vlm:
        for prompt in PROMPTS:
            expected = processor(images=image, text=prompt)["input_ids"][0]
            assert vlm.prepare(prompt, images=image).token_ids == expected, prompt
            assert vlm.prepare("<image>" + prompt, images=image).token_ids == expected, prompt
            if prompt and expected[QUERIES:]:
                assert vlm.prepare(prompt).token_ids == expected[QUERIES:], prompt
