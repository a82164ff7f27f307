"""Family cross_attention and the graphs of any decoder that reads an encoder: compared with transformers, refused where not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as t
from tiny.common import heat

from vlm_edge.export import patches
from vlm_edge.export.attention import IMPLEMENTATION, attention_implementation, recording
from vlm_edge.export.check import TOLERANCE, check, difference
from vlm_edge.export.checkpoint import Checkpoint, load
from vlm_edge.export.trace import trace
from vlm_edge.export.weights import WeightFile
from vlm_edge.families import cross_decoder, cross_step, registry
from vlm_edge.families.base import Case, GraphPlan
from vlm_edge.families.cross_attention import FAMILY
from vlm_edge.families.cross_decoder import CrossDecoder, cross_decoder_plan, cross_kv_plan, encoder_plan
from vlm_edge_runtime.bundle.manifest import FixedPlaceholder
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import UnsupportedModelError

WIDTH, VOCABULARY, CONTEXT = 32, 99, 64
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": CONTEXT,
}
TEXT_MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5)),  # type: ignore[arg-type]
    "t5, gated and untied": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # type: ignore[arg-type]
    ),
    "umt5": lambda: t.UMT5ForConditionalGeneration(t.UMT5Config(**_T5)),  # type: ignore[arg-type]
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**_BART)),
    "bart, scaled": lambda: t.BartForConditionalGeneration(t.BartConfig(**_BART, scale_embedding=True)),
    "mbart": lambda: t.MBartForConditionalGeneration(t.MBartConfig(**_BART)),
    "pegasus": lambda: t.PegasusForConditionalGeneration(t.PegasusConfig(**_BART)),
    "m2m100": lambda: t.M2M100ForConditionalGeneration(t.M2M100Config(**_BART)),
}


def text_model(name: str) -> Any:
    torch.manual_seed(0)
    model = TEXT_MODELS[name]()
    heat(model)
    model.eval().tie_weights()
    return model


def plans_of(model: Any) -> list[GraphPlan]:
    decoder = CrossDecoder(model, WIDTH)
    embedding = model.get_input_embeddings()
    encoder = encoder_plan(model.get_encoder(), embedding, WIDTH, WIDTH)
    return [encoder, cross_kv_plan(decoder), cross_decoder_plan(decoder, CONTEXT, masked=True)]


def worst(plan: GraphPlan, model: Any, case: Case) -> float:
    """The traced form, run by PyTorch, against the original; NaN and shapes included."""
    with torch.no_grad():
        with attention_implementation(model, "eager"):
            inputs = plan.sample(case)
            expected, masks = plan.reference(case, inputs), plan.compared(case, inputs)
        with attention_implementation(model, IMPLEMENTATION), patches.exchanged(model), recording():
            found = plan.module(*(tensor.clone() for tensor in inputs))
    differences = [
        difference(a.numpy(), b.numpy(), None if masks is None else masks[i].numpy())
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
    ]
    assert all(one.scaled == one.scaled for one in differences), "NaN, or another shape"
    return max(one.scaled for one in differences)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models_are_the_originals(name: str) -> None:
    """Padded sources, left-padded prompts, batches, an empty, short and long past."""
    model = text_model(name)
    for plan in plans_of(model):
        for case in plan.cases:
            assert worst(plan, model, case) <= TOLERANCE, f"{plan.role}, {case.label}"


def test_t5_as_graphs(tmp_path: Path) -> None:
    """Relative bias and masks as additive masks; cross-attention's keys computed once; one attention op a layer and source."""
    model = text_model("t5")
    plans = plans_of(model)
    with WeightFile(tmp_path) as weights:
        for plan in plans:
            graph = trace(plan, model)
            ops = [node.op_type for node in graph.graph]
            assert ops.count("Attention") == {"encoder": 2, "cross_kv": 0, "decoder": 4}[plan.role]
            assert "Softmax" not in ops
            if plan.role == "cross_kv":
                assert ops.count("MatMul") == 4
            if plan.role == "decoder":
                masks = [node.metadata_props["vlm_edge.mask"] for node in graph.graph if node.op_type == "Attention"]
                assert masks == ["explicit", "bidirectional"] * 2
            weights.save(graph, f"{plan.role}.onnx")
    for plan in plans:
        assert check(plan, model, tmp_path / f"{plan.role}.onnx").verdict == "PASS"


def test_counting_positions_from_the_cache_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unlike length share one cache: without given positions the shorter ones come out wrong."""
    monkeypatch.setattr(cross_step, "positions", lambda *arguments: nullcontext())
    for name in ("bart", "t5"):
        model = text_model(name)
        plan = plans_of(model)[2]
        padded = next(case for case in plan.cases if case.padding and case.sizes["past"])
        if name == "t5":  # relative: the same shift on both sides leaves it right
            assert worst(plan, model, padded) <= TOLERANCE
        else:
            assert worst(plan, model, padded) > 1e-2


def test_a_source_without_its_mask_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("bart")
    honest = cross_decoder._source_mask
    plan = plans_of(model)[2]
    case = next(case for case in plan.cases if case.sizes["batch"] > 1 and not honest(case).all() and not case.padding)
    mask = [spec.name for spec in plan.inputs].index("encoder_attention_mask")
    with torch.no_grad(), attention_implementation(model, "eager"):
        inputs = list(plan.sample(case))
        masked = plan.reference(case, tuple(inputs))[0]
        inputs[mask] = torch.ones_like(inputs[mask])
        unmasked = plan.reference(case, tuple(inputs))[0]
    assert difference(unmasked.numpy(), masked.numpy()).scaled > 1e-2


def test_classes_are_as_before_after_a_trace() -> None:
    model, *_ = tiny.CHECKPOINTS["blip-caption"]()
    before = {type(module): type(module).forward for module in model.modules()}
    with pytest.raises(RuntimeError, match="inside"), patches.exchanged(model):
        changed = [kind for kind, forward in before.items() if kind.forward is not forward]
        assert sorted(kind.__name__ for kind in changed) == ["BlipAttention", "BlipTextSelfAttention"]
        raise RuntimeError("inside")
    assert {type(module): type(module).forward for module in model.modules()} == before


GRAPHS = {
    "blip-caption": ["vision_encoder", "cross_kv", "embed_tokens", "decoder"],
    "blip-vqa": ["vision_encoder", "encoder", "cross_kv", "embed_tokens", "decoder"],
    "vit-gpt2": ["vision_encoder", "cross_kv", "embed_tokens", "decoder"],
    "donut-mbart": ["vision_encoder", "cross_kv", "embed_tokens", "decoder"],
    "florence2": ["vision_encoder", "projector", "encoder", "cross_kv", "embed_tokens", "decoder"],
    "pix2struct": ["vision_encoder", "cross_kv", "embed_tokens", "decoder"],
    "deit-roberta": ["vision_encoder", "projector", "cross_kv", "embed_tokens", "decoder"],
    "deit-trocr": ["vision_encoder", "cross_kv", "embed_tokens", "decoder"],
}
SLOW = {"deit-roberta", "deit-trocr"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in GRAPHS])
def test_contracts(name: str, portable_bundle: Callable[[str], Path]) -> None:
    manifest = open_bundle(portable_bundle(name)).manifest
    contract: Any = manifest.contract
    assert list(manifest.graphs) == GRAPHS[name]
    assert manifest.parity is not None and manifest.parity.verdict == "PASS"
    by_encoder = "encoder" in GRAPHS[name]
    assert contract.memory.source == ("encoder" if by_encoder else "features")
    assert contract.memory.mask == ("source" if by_encoder or name == "pix2struct" else "none")
    inputs = {spec.name for spec in manifest.graphs["decoder"].inputs}
    assert ("encoder_attention_mask" in inputs) == (contract.memory.mask == "source")
    assert {f"cross_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")} <= inputs
    assert (contract.modalities[0].least, contract.modalities[0].most) == (1, 1)
    assert contract.modalities[0].joins == ("tokens" if name == "florence2" else "memory")
    starts = {"blip-caption": 4, "blip-vqa": 4, "pix2struct": 1}
    assert contract.prompt.start_tokens == [starts.get(name, 2)] and contract.eos_token_ids == [3]
    assert contract.prompt.start == ("instead" if name == "donut-mbart" else "before")
    assert contract.prompt.add_special_tokens == (name == "blip-vqa")
    assert contract.context_length == tiny.CONTEXT
    first = manifest.graphs["encoder"].inputs[0].name if by_encoder else None
    assert first == {"blip-vqa": "input_ids", "florence2": "inputs_embeds"}.get(name)


def test_florence_writes_images_before_a_framed_prompt(portable_bundle: Callable[[str], Path]) -> None:
    contract: Any = open_bundle(portable_bundle("florence2")).manifest.contract
    assert contract.modalities[0].placeholder == FixedPlaceholder(image_token="<image>", tokens_per_image=17)
    assert contract.prompt.template == "{images}<s>{text}</s>"
    assert contract.prompt.replacements["<CAPTION>"] == "What does the image describe?"
    assert contract.prompt.replacements["<OPEN_VOCABULARY_DETECTION>"] == "Locate {input} in the image."
    assert contract.memory.source_length == tiny.CONTEXT


def split(folder: Path) -> None:
    entry = registry.lookup("vision-encoder-decoder")
    config = t.AutoConfig.from_pretrained(folder)
    FAMILY.refuse(config, entry)
    checkpoint: Checkpoint = load(folder, FAMILY.auto_class, config)
    FAMILY.split(checkpoint, entry)


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        (
            t.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=384),
            "'gpt2' of this 'vision-encoder-decoder' has no cross-attention",
        ),
        (
            t.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=384, is_decoder=True),
            "'gpt2' cannot read an encoder: .*add_cross_attention=True",
        ),
        (
            t.LlamaConfig(
                hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=384, is_decoder=True
            ),
            "'llama' has no cross-attention",
        ),
    ],
    ids=["said by the configuration", "said by the model", "never asked"],
)
def test_a_decoder_without_cross_attention_is_refused(decoder: t.PreTrainedConfig, said: str, tmp_path: Path) -> None:
    _, images, words, _, _ = tiny.CHECKPOINTS["vit-gpt2"]()
    vision = t.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    flags = getattr(decoder, "is_decoder", None), getattr(decoder, "add_cross_attention", None)
    config = t.VisionEncoderDecoderConfig(encoder=vision.to_dict(), decoder=decoder.to_dict())
    assert (getattr(config.decoder, "is_decoder", None), getattr(config.decoder, "add_cross_attention", None)) == flags
    model = t.VisionEncoderDecoderModel(config)
    for part in (model, images, words):
        part.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=said):
        split(tmp_path)


def test_questions_drawn_onto_the_image_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="header drawn onto the image"):
        FAMILY.refuse(t.Pix2StructConfig(is_vqa=True), registry.lookup("pix2struct"))


def test_other_classes_of_a_model_type_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="known as BlipForConditionalGeneration, BlipForQuestionAnswering"):
        registry.lookup("blip", ["BlipForImageTextRetrieval"])
