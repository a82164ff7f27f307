"""What the prefix language models, and Gemma 3, write into the manifest; what is refused; what export leaves behind."""

from __future__ import annotations

import pytest
import tiny
import transformers as t
from transformers.models.git.modeling_git import GitSelfAttention

from vlm_edge.export import export
from vlm_edge.families import registry
from vlm_edge_runtime.bundle.manifest import CropsPlaceholder, FixedPlaceholder, PrefixPlaceholder, TokenInput
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.errors import UnsupportedModelError

TOKENS = (tiny.IMAGE // tiny.PATCH) ** 2
GRAPHS = ["decoder", "embed_tokens", "projector", "vision_encoder"]


def _blocks(contract) -> TokenInput:
    (found,) = contract.token_inputs
    assert (found.name, found.kind, found.decode) == ("block_ids", "blocks", "zero")
    return found


def _decoder_takes_blocks(manifest) -> None:
    assert sorted(manifest.graphs) == GRAPHS
    (spec,) = [spec for spec in manifest.graphs["decoder"].inputs if spec.name == "block_ids"]
    assert (spec.dtype, spec.shape) == ("int64", ("batch", "sequence"))
    checks = {check.subject: check for check in manifest.parity.checks}
    assert {check.verdict for check in checks.values()} == {"PASS"}
    assert checks["decoder"].cases == 11


@pytest.mark.parametrize("name", ["paligemma2", pytest.param("paligemma", marks=pytest.mark.slow)])
def test_paligemma(portable_bundle, name):
    """The whole prompt is one block, and positions count from 1."""
    manifest = read_manifest(portable_bundle(name))
    contract = manifest.contract
    _decoder_takes_blocks(manifest)
    assert manifest.family == "prefix_lm"
    (image,) = contract.modalities
    assert image.placeholder == FixedPlaceholder(image_token="<image>", tokens_per_image=TOKENS)
    assert (image.joins, image.batch, image.least, image.most) == ("tokens", "image", 1, None)
    assert _blocks(contract).blocks == "prompt"
    assert contract.positions.offset == 1
    assert contract.prompt.template == "{images}<s>{text}\n"
    assert not contract.prompt.add_special_tokens
    assert contract.context_length == tiny.CONTEXT


def test_git(portable_bundle):
    """One image before the text; text counts from 0 after it."""
    manifest = read_manifest(portable_bundle("git"))
    contract = manifest.contract
    _decoder_takes_blocks(manifest)
    (image,) = contract.modalities
    assert image.placeholder == PrefixPlaceholder(tokens_per_image=TOKENS + 1)  # CLIP's class token too
    assert (image.least, image.most) == (1, 1)
    assert _blocks(contract).blocks == "prefix"
    assert contract.positions.offset == -(TOKENS + 1)
    assert contract.prompt.template == "<s>{text}"  # [CLS], and no [SEP]
    assert contract.context_length == tiny.CONTEXT + TOKENS + 1


def test_simvlm(portable_bundle):
    """One image before the text, all of it one block; an image's tokens are at position 0, text counts from 1."""
    manifest = read_manifest(portable_bundle("simvlm"))
    contract = manifest.contract
    _decoder_takes_blocks(manifest)
    assert (contract.modalities[0].least, contract.modalities[0].most) == (1, 1)
    assert _blocks(contract).blocks == "prompt"
    assert contract.positions.offset == 1 - TOKENS
    assert contract.prompt.template == "{images}<s>{text}"
    assert manifest.source.architecture == "SimVLMForConditionalGeneration"


def test_gemma3(portable_bundle):
    """A family's other model with the same masks: images are blocks of their own, and may come in crops."""
    manifest = read_manifest(portable_bundle("gemma3"))
    contract = manifest.contract
    _decoder_takes_blocks(manifest)
    assert manifest.family == "projector"
    (image,) = contract.modalities
    assert image.placeholder == CropsPlaceholder(
        image_token="<start_of_image>",
        soft_token="<image_soft_token>",
        before="\n\n<start_of_image>",
        after="<end_of_image>\n\n",
        tokens_per_image=4,
        crops="Here is the original image {image} and here are some crops to help you see better {crops}",
    )
    assert image.batch == "tile"
    assert (image.least, image.most) == (0, None)
    assert _blocks(contract).blocks == "images"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3-narrow", "gemma3-crops"])
def test_other_gemma3(portable_bundle, name):
    """A sliding window shorter than an image, and crops."""
    _decoder_takes_blocks(read_manifest(portable_bundle(name)))


def test_a_git_for_videos_is_refused_before_it_is_loaded():
    config = t.GitConfig(vision_config={"hidden_size": 32}, num_image_with_embedding=6)
    entry = registry.lookup("git")
    with pytest.raises(UnsupportedModelError, match="6 frames of a video"):
        registry.load("prefix_lm").refuse(config, entry)


def test_a_text_model_with_other_layers_is_refused():
    config = t.PaliGemmaConfig(
        text_config=t.Gemma2Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    )
    entry, family = registry.lookup("paligemma"), registry.load("prefix_lm")
    family.refuse(config, entry)
    config.text_config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        family.refuse(config, entry)


def test_a_tokenizer_without_the_image_token_is_refused(tiny_checkpoint, tmp_path):
    model = t.PaliGemmaForConditionalGeneration.from_pretrained(tiny_checkpoint("paligemma2"))
    model.config.image_token_id = tiny.VOCABULARY - 1
    with pytest.raises(UnsupportedModelError, match="calls its image"):
        export(model, tmp_path / "out.vlm", processor=tiny_checkpoint("paligemma2"))
    assert not (tmp_path / "out.vlm").exists()


def test_git_is_itself_again_after_its_export(portable_bundle):
    portable_bundle("git")
    assert GitSelfAttention.forward.__module__ == "transformers.models.git.modeling_git"
