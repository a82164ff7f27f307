"""What each family writes into the manifest, read from exported bundles."""

from __future__ import annotations

import math

import pytest
import tiny

from vlm_edge.families import registry
from vlm_edge_runtime.bundle.manifest import (
    GridPlaceholder,
    MRopePositions,
    SequentialPositions,
    SigmoidSimilarity,
    SoftmaxSimilarity,
    TilePlaceholder,
)
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.errors import UnsupportedModelError


def test_llava(portable_bundle):
    manifest = read_manifest(portable_bundle("llava-llama"))
    contract = manifest.contract
    assert manifest.family == "projector"
    assert manifest.model_type == "llava"
    assert contract.modalities[0].placeholder.image_token == "<image>"
    assert contract.modalities[0].placeholder.tokens_per_image == (tiny.IMAGE // tiny.PATCH) ** 2
    assert isinstance(contract.positions, SequentialPositions)
    assert contract.modalities[0].batch == "image"
    assert (contract.kv.layers, contract.kv.kv_heads, contract.kv.head_dim) == (2, 2, 16)
    assert (contract.hidden_size, contract.vocab_size, contract.context_length) == (64, tiny.VOCABULARY, tiny.CONTEXT)
    assert (contract.eos_token_ids, contract.pad_token_id, contract.bos_token_id) == ([3], 1, 2)
    vision = manifest.graphs["vision_encoder"]
    assert vision.inputs[0].shape == ("images", 3, 32, 32)
    assert vision.outputs[0].shape == ("images", 16, 64)
    assert manifest.graphs["projector"].outputs[0].shape == ("images", 16, 64)


def test_smolvlm(portable_bundle):
    contract = read_manifest(portable_bundle("smolvlm")).contract
    assert isinstance(contract.modalities[0].placeholder, TilePlaceholder)
    assert contract.modalities[0].placeholder.tokens_per_tile == 4
    assert contract.modalities[0].placeholder.fake_token == "<fake_token_around_image>"
    assert contract.modalities[0].placeholder.global_token == "<global-img>"
    assert contract.modalities[0].batch == "tile"
    assert len(contract.eos_token_ids) == 2  # generation_config.json lists two


def test_qwen2_vl(portable_bundle):
    manifest = read_manifest(portable_bundle("qwen2_vl"))
    contract = manifest.contract
    assert isinstance(contract.modalities[0].placeholder, GridPlaceholder)
    assert isinstance(contract.positions, MRopePositions)
    assert contract.positions.merge_size == contract.modalities[0].placeholder.merge_size == 2
    assert contract.modalities[0].batch == "patches"
    shapes = {spec.name: spec.shape for spec in manifest.graphs["vision_encoder"].inputs}
    assert shapes == {"pixel_values": ("patches", 3 * 2 * 8 * 8), "position_ids": ("patches", 2)}
    positions = next(spec for spec in manifest.graphs["decoder"].inputs if spec.name == "position_ids")
    assert positions.shape == (3, "batch", "sequence")


def test_clip(portable_bundle):
    manifest = read_manifest(portable_bundle("clip"))
    contract = manifest.contract
    assert manifest.family == "dual_encoder"
    assert isinstance(contract.similarity, SoftmaxSimilarity)
    assert contract.similarity.logit_scale == pytest.approx(math.exp(2.6592), rel=1e-6)
    assert (contract.embedding_dim, contract.text_length, contract.text_padding) == (32, 16, "longest")
    assert [spec.name for spec in manifest.graphs["text_encoder"].inputs] == ["input_ids", "attention_mask"]


def test_siglip(portable_bundle):
    manifest = read_manifest(portable_bundle("siglip"))
    contract = manifest.contract
    assert isinstance(contract.similarity, SigmoidSimilarity)
    assert contract.similarity.logit_scale == pytest.approx(math.exp(2.0), rel=1e-6)
    assert contract.similarity.logit_bias == pytest.approx(-3.0)
    assert contract.text_padding == "max_length"
    assert manifest.graphs["text_encoder"].inputs[0].shape == ("texts", 16)


def test_other_kinds_of_layers_are_refused_before_loading():
    from transformers import LlavaConfig

    config = LlavaConfig(text_config={"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["full_attention"]})
    config.text_config.layer_types = ["linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        registry.load("projector").refuse(config, registry.lookup("llava"))


def test_encoder_decoder_text_models_are_refused_before_loading():
    from transformers import LlavaConfig

    config = LlavaConfig(text_config={"model_type": "t5"})
    with pytest.raises(UnsupportedModelError, match="encoder-decoder text model 't5'"):
        registry.load("projector").refuse(config, registry.lookup("llava"))
