"""The comparison models and what is derived from them: transformers must read each, and they must be one and the same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import models, scenario

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny-smolvlm"
TEXT = {**models.QWEN_TEXT, "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
VISION = {**models.QWEN_VISION, "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> models.Model:
    """A small Qwen2-VL of several shards, with tiny-smolvlm's tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("qwen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SHARD", 50_000)
        patch.setattr(models, "PEERS", folder)
        models.make_qwen2_vl(folder / "small", AutoTokenizer.from_pretrained(TINY), TEXT, VISION)
        return models.model_named(str(folder / "small"))


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def test_a_qwen2_vl_is_written_in_shards_that_transformers_reads(qwen):
    from transformers import AutoModelForImageTextToText

    assert len(list(qwen.checkpoint.glob("*.safetensors"))) > 3
    model, said = AutoModelForImageTextToText.from_pretrained(qwen.checkpoint, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    assert json.loads((qwen.checkpoint / "made.json").read_text())["parameters"] == sum(p.numel() for p in model.parameters())
    assert qwen.model_type == "qwen2_vl" and qwen.placeholder in "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_vl"])
def test_the_text_model_is_the_same_decoder(kind, qwen, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    monkeypatch.setattr(models, "PEERS", tmp_path)
    model = models.model_named(str(TINY)) if kind == "smolvlm" else qwen
    derived = models.derive(model)
    whole = AutoModelForImageTextToText.from_pretrained(model.checkpoint, dtype=torch.float32)
    text, said = AutoModelForCausalLM.from_pretrained(derived["text_checkpoint"], dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    ids = [1, 20, 31, 42, 53]
    np.testing.assert_allclose(logits(text, ids), logits(whole, ids), rtol=1e-4, atol=1e-5)
    plain = json.loads((Path(derived["plain_checkpoint"]) / "config.json").read_text())
    theta = plain["text_config"]["rope_theta"]
    assert theta == (10000.0 if kind == "smolvlm" else 1e6) and "rope_parameters" not in plain["text_config"]
    assert plain["model_type"] == ("idefics3" if kind == "smolvlm" else "qwen2_vl")
    saved = json.loads((Path(derived["plain_text_checkpoint"]) / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_checkpoint_that_the_bench_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"max_position_embeddings": 64}}))
    with pytest.raises(ValueError, match="a checkpoint of 'llava'"):
        models.model_named(str(tmp_path))


def test_prompts_have_exactly_the_tokens_they_should(portable_bundle):
    from tokenizers import Tokenizer

    from vlm_edge_runtime import load

    bundle = portable_bundle("tiny-smolvlm")
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    with load(bundle, build="portable", image_options={"do_image_splitting": False}) as vlm:
        prompts = scenario.Prompts(vlm, tokenizer)
        one, two = prompts.text(40), prompts.text(40)
        assert len(one["ids"]) == len(two["ids"]) == 40 and one["text"] != two["text"]
        assert len(prompts.turn(32)["ids"]) == 32
        shown = prompts.image("<image>", scenario.picture(64), 32)
        image = shown["ids"].count(shown["token_id"])
        assert image == (64 // 16) ** 2 // 2**2 and len(shown["ids"]) == image + 32
