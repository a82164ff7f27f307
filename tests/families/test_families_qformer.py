"""What family `qformer` writes into the manifest, what its graphs hold, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from tiny.qformer import AUDIO, FRAMES, INSTRUCTION_LENGTH, QUERIES, SMALL
from transformers import AutoModelForImageTextToText, Blip2Config, InstructBlipConfig, InstructBlipVideoConfig

from vlm_edge.export import export
from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import load
from vlm_edge.families import registry
from vlm_edge.families.base import options
from vlm_edge.families.qformer import Options
from vlm_edge.families.qformer_branch import branch, branch_plans
from vlm_edge_runtime.bundle.manifest import FixedPlaceholder, Instruction, SequentialPositions
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest
from vlm_edge_runtime.errors import UnsupportedModelError


def test_blip2(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("blip2-opt"))
    contract, (image,) = manifest.contract, manifest.contract.modalities
    assert manifest.family == "qformer"
    assert list(manifest.graphs) == ["vision_encoder", "qformer", "projector", "embed_tokens", "decoder"]
    assert image.graphs == ["vision_encoder", "qformer", "projector"]
    assert image.placeholder == FixedPlaceholder(image_token="<image>", tokens_per_image=QUERIES)
    assert (image.kind, image.batch, image.joins, image.instruction) == ("image", "image", "tokens", None)
    assert contract.prompt.apart
    assert contract.memory is None
    assert isinstance(contract.positions, SequentialPositions)
    assert (contract.hidden_size, contract.vocab_size, contract.context_length) == (64, tiny.VOCABULARY, tiny.CONTEXT)
    assert manifest.graphs["qformer"].inputs[0].shape == ("images", 17, SMALL)
    assert manifest.graphs["qformer"].outputs[0].shape == ("images", QUERIES, SMALL)
    assert manifest.graphs["projector"].outputs[0].shape == ("images", QUERIES, 64)


def test_the_queries_are_in_the_graph(portable_bundle) -> None:
    folder = portable_bundle("blip2-opt")
    graph = ir.load(folder / "portable" / "qformer.onnx")
    assert "query_tokens" in graph.graph.initializers
    assert sum(node.op_type == "Attention" for node in graph.graph) == 5  # three layers, two of which look at the image


def test_blip2_with_t5(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("blip2-t5"))
    contract = manifest.contract
    assert list(manifest.graphs)[3:] == ["encoder", "cross_kv", "embed_tokens", "decoder"]
    assert (contract.memory.source, contract.memory.mask, contract.memory.source_length) == ("encoder", "source", None)
    assert contract.prompt.start_tokens == [1]
    assert contract.modalities[0].joins == "tokens"


def test_instructblip(portable_bundle) -> None:
    folder = portable_bundle("instructblip-llama")
    manifest, bundle = read_manifest(folder), open_bundle(folder)
    instruction = manifest.contract.modalities[0].instruction
    assert instruction == Instruction(tokenizer="qformer_tokenizer.json", max_length=INSTRUCTION_LENGTH)
    assert json.loads(bundle.read_text("qformer_tokenizer.json")) != json.loads(bundle.read_text("tokenizer.json"))
    inputs = {spec.name: spec.shape for spec in manifest.graphs["qformer"].inputs}
    assert inputs["qformer_input_ids"] == inputs["qformer_attention_mask"] == ("images", "instruction")


def test_instructblip_video(portable_bundle) -> None:
    folder = portable_bundle("instructblipvideo")
    manifest, bundle = read_manifest(folder), open_bundle(folder)
    (video,) = manifest.contract.modalities
    assert (video.kind, video.batch) == ("video", "tile")
    assert video.placeholder == FixedPlaceholder(image_token="<video>", tokens_per_image=FRAMES * QUERIES)
    assert {spec.name: spec.shape for spec in manifest.graphs["qformer"].inputs}["qformer_input_ids"] == (1, "instruction")
    assert bundle.read_json("video_preprocessor_config.json")["video_processor_type"] == "InstructBlipVideoVideoProcessor"
    assert not bundle.has_file("preprocessor_config.json")


def test_x_instructblip(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("x_instructblip"))
    image, audio = manifest.contract.modalities
    assert (image.kind, image.graphs) == ("image", ["vision_encoder", "qformer", "projector"])
    assert (audio.kind, audio.graphs) == ("audio", ["audio_encoder", "audio_qformer", "audio_projector"])
    assert image.placeholder == FixedPlaceholder(image_token="<image>", tokens_per_image=QUERIES, before=" image: ")
    assert audio.placeholder == FixedPlaceholder(image_token="<audio>", tokens_per_image=QUERIES, before=" audio: ")
    assert image.instruction == audio.instruction != None  # noqa: E711
    assert not manifest.contract.prompt.apart
    assert manifest.graphs["audio_encoder"].inputs[0].shape == ("clips", "steps", AUDIO)
    assert manifest.graphs["audio_encoder"].outputs[0].shape == ("clips", "steps", 32)


def test_generation_is_the_language_models(portable_bundle, tiny_checkpoint, tmp_path) -> None:
    """`generate` of these classes is that of their language model, with its configuration, whatever the outer one says."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("blip2-opt"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    _, entry, family = _identified(folder)
    checkpoint = load(folder, family.auto_class, _config(folder))
    assert checkpoint.eos_token_ids() == [3]  # generation_config.json of the whole
    family.split(checkpoint, entry)
    assert checkpoint.eos_token_ids() == [checkpoint.model.language_model.generation_config.eos_token_id] == [77]


@pytest.mark.parametrize("name", ["instructblip-llama", "x_instructblip"])
def test_a_planted_mistake_shows(name, tiny_checkpoint) -> None:
    """The cases tell a Q-Former that ignores the instruction's mask from one that does not, and one without an instruction."""
    folder = tiny_checkpoint(name)
    _, entry, family = _identified(folder)
    model = load(folder, family.auto_class, _config(folder)).model.eval()
    for wanted in options(entry, Options).inputs:
        plan = branch_plans(branch(model, wanted, entry))[1]
        case = next(case for case in plan.cases if case.padding)
        with torch.no_grad(), attention_implementation(model, "eager"):
            states, ids, mask = plan.sample(case)
            (expected,) = plan.reference(case, (states, ids, mask))
            (same,) = plan.module(states, ids, mask)
            (unmasked,) = plan.module(states, ids, torch.ones_like(mask))
            (other,) = plan.module(states, ids.flip(1), mask)
        largest = expected.abs().max()
        assert (same - expected).abs().max() / largest < 1e-5
        assert (unmasked - expected).abs().max() / largest > 1e-2
        assert (other - expected).abs().max() / largest > 1e-2


def test_no_instruction_tokenizer_is_refused(tiny_checkpoint, tmp_path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("instructblip-llama"), folder)
    shutil.rmtree(folder / "qformer_tokenizer")
    with pytest.raises(UnsupportedModelError, match="qformer_tokenizer"):
        export(folder, tmp_path / "bundle.vlm")
    assert not (tmp_path / "bundle.vlm").exists()


@pytest.mark.parametrize(
    ("model_type", "config", "kind"),
    [
        ("blip-2", Blip2Config, "image"),
        ("instructblip", InstructBlipConfig, "image"),
        ("instructblipvideo", InstructBlipVideoConfig, "video"),
    ],
)
def test_checkpoints_without_a_token_are_refused_before_loading(model_type, config, kind) -> None:
    """Older ones, whose features went in front of the text; transformers refuses them too."""
    with pytest.raises(UnsupportedModelError, match=f"{kind}_token_index"):
        registry.load("qformer").refuse(config(), registry.lookup(model_type))


def test_other_kinds_of_layers_are_refused_before_loading() -> None:
    config = Blip2Config(text_config={"model_type": "qwen2", "num_hidden_layers": 1}, image_token_index=5)
    config.text_config.layer_types = ["linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        registry.load("qformer").refuse(config, registry.lookup("blip-2"))


def test_retrieval_checkpoints_are_refused_before_loading() -> None:
    """transformers would load them with a language model of random weights."""
    config = Blip2Config(image_token_index=5)
    config.architectures = ["Blip2ForImageTextRetrieval"]
    with pytest.raises(UnsupportedModelError, match="Blip2ForImageTextRetrieval, which has no language model"):
        registry.load("qformer").refuse(config, registry.lookup("blip-2"))


def test_embeddings_narrower_than_the_features_are_refused(tiny_checkpoint) -> None:
    """OPT-350m's manner: token embeddings of another width than the layers; transformers' own scatter fails on it."""
    folder = tiny_checkpoint("blip2-opt")
    _, entry, family = _identified(folder)
    config = _config(folder)
    config.text_config.word_embed_proj_dim = 32
    checkpoint = load(folder, family.auto_class, _config(folder))
    checkpoint.model = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="64 wide and the token embeddings of 'opt' 32"):
        family.split(checkpoint, entry)


def test_a_processor_object_brings_its_tokenizers(tiny_checkpoint) -> None:
    from transformers import InstructBlipProcessor

    folder = tiny_checkpoint("instructblip-llama")
    _, _, family = _identified(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    checkpoint = load(model, family.auto_class, model.config, processor=InstructBlipProcessor.from_pretrained(folder))
    saved = load(folder, family.auto_class, model.config)
    for one in (checkpoint, saved):
        assert list(one.extra_tokenizers) == ["qformer_tokenizer"]
        assert one.extra_tokenizers["qformer_tokenizer"]("a cat")["input_ids"] != one.tokenizer("a cat")["input_ids"]
    np.testing.assert_equal(checkpoint.image_processor["size"], saved.image_processor["size"])


def _identified(folder):
    from vlm_edge.export.checkpoint import identify

    return identify(folder, None, False)


def _config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)
