"""What Chameleon, CM3Leon and Janus write into the manifest, what is refused, and what their graphs hold."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import transformers as t

from vlm_edge.families import registry
from vlm_edge_runtime.bundle.image_output import CodebookOutput
from vlm_edge_runtime.bundle.manifest import FixedPlaceholder
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.errors import UnsupportedModelError

TOKENS = 16
CODES = 32


def _passes(manifest) -> None:
    checks = {check.subject: check for check in manifest.parity.checks}
    assert set(checks) == set(manifest.graphs)
    assert {check.verdict for check in checks.values()} == {"PASS"}


def test_chameleon(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("chameleon"))
    contract = manifest.contract
    _passes(manifest)
    assert manifest.family == "early_fusion"
    assert sorted(manifest.graphs) == ["decoder", "embed_tokens", "image_tokenizer"]
    (image,) = contract.modalities
    assert (image.joins, image.batch, image.graphs) == ("codes", "image", ["image_tokenizer"])
    assert image.placeholder == FixedPlaceholder(
        image_token="<image>", tokens_per_image=TOKENS, before="<racm3:break>", after="<eoss>"
    )
    (codes,) = manifest.graphs["image_tokenizer"].outputs
    assert (codes.name, codes.dtype, codes.shape) == ("image_codes", "int64", ("images", TOKENS))
    assert contract.prompt.template == "{images}{text}<reserved08706>"
    assert contract.image_output is None


@pytest.mark.slow
def test_cm3leon(portable_bundle) -> None:
    """The same graphs, one token on both sides of an image, nothing after a text."""
    manifest = read_manifest(portable_bundle("cm3leon"))
    _passes(manifest)
    (image,) = manifest.contract.modalities
    assert image.placeholder == FixedPlaceholder(
        image_token="<image>", tokens_per_image=TOKENS, before="<break>", after="<break>"
    )
    assert manifest.contract.prompt.template == "{images}{text}"


def test_the_papers_sizes_of_cm3leon() -> None:
    registry.lookup("cm3leon")
    config = t.AutoConfig.for_model("cm3leon")
    halvings = len(config.vq_config.channel_multiplier) - 1
    assert (config.vq_config.resolution >> halvings) ** 2 == 1024
    assert (config.vq_config.num_embeddings, config.vocab_size) == (8192, 56320 + 8192)
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (32, 4096, 4096)


def test_janus(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("janus"))
    contract = manifest.contract
    _passes(manifest)
    reading, writing = ["vision_encoder", "projector"], ["image_detokenizer", "image_embed", "image_head"]
    assert sorted(manifest.graphs) == sorted(["decoder", "embed_tokens", *reading, *writing])
    (image,) = contract.modalities
    assert (image.joins, image.graphs) == ("tokens", reading)
    output = contract.image_output
    assert isinstance(output, CodebookOutput)
    assert (output.tokens, output.codes, output.guidance_scale) == (TOKENS, 2 * CODES, 5.0)
    assert output.mean == output.std == [0.5, 0.5, 0.5]
    assert output.blank_token == 1 and set(output.kept_tokens) == {2, output.begin_token}
    assert manifest.graphs["decoder"].outputs[-1].name == "hidden_states"
    assert manifest.graphs["image_detokenizer"].outputs[0].shape == ("images", 3, tiny.IMAGE, tiny.IMAGE)


def test_the_decoder_never_names_an_image_token(portable_bundle, tiny_checkpoint) -> None:
    """The check of the graph leaves these logits out, for the type's minimum would hide every other difference."""
    folder = portable_bundle("chameleon")
    model = t.ChameleonForConditionalGeneration.from_pretrained(tiny_checkpoint("chameleon"), dtype=torch.float32).eval()
    entry = read_manifest(folder).graphs["decoder"]
    session = onnxruntime.InferenceSession(str(folder / entry.model.file), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(1)
    sizes = {"batch": 2, "sequence": 3, "past": 0, "total": 3}
    feeds = {}
    for spec in entry.inputs:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        feeds[spec.name] = generator.standard_normal(shape, np.float32)
    feeds["attention_mask"] = np.ones((2, 3), np.int64)
    feeds["position_ids"] = np.tile(np.arange(3), (2, 1))
    logits = session.run(["logits"], feeds)[0]
    lowest = np.finfo(np.float32).min
    images = model.model.vocabulary_mapping.image_tokens
    assert len(images) == CODES
    assert (logits[..., images] == lowest).all()
    with torch.no_grad():
        expected = model(inputs_embeds=torch.from_numpy(feeds["inputs_embeds"])).logits.numpy()
    np.testing.assert_array_equal(logits == lowest, expected == lowest)
    others = expected != lowest
    np.testing.assert_allclose(logits[others], expected[others], atol=1e-4 * np.abs(expected[others]).max())


def test_a_vocabulary_without_the_codes_is_refused_before_it_is_loaded() -> None:
    entry, family = registry.lookup("chameleon"), registry.load("early_fusion")
    with pytest.raises(UnsupportedModelError, match=r"0 image tokens .* no <image>"):
        family.refuse(t.ChameleonConfig(vq_config={"num_embeddings": 4}), entry)
    words = {"<image>": 0, **{f"IMGIMG{chr(ord('A') + number)}Z": number + 1 for number in range(4)}}
    family.refuse(t.ChameleonConfig(vq_config={"num_embeddings": 4}, vocabulary_map=words), entry)
