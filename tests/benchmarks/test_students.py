"""The students' lessons: tokens and pixels are what the checkpoint's own processor makes, donated weights are in their places,

and a step of training learns.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from benchmarks.train import donors, scenes
from benchmarks.train.student import CELLS
from benchmarks.train.students import STUDENTS
from benchmarks.train.teach import Lessons, measure, train

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
TRAINED = {name: CHECKPOINTS / f"tiny-{name}" for name in STUDENTS if (CHECKPOINTS / f"tiny-{name}").is_dir()}


@pytest.fixture(scope="module")
def donor():
    found = transformers.LlavaForConditionalGeneration.from_pretrained(donors.FOLDER, dtype=torch.float32).eval()
    images = transformers.AutoImageProcessor.from_pretrained(donors.FOLDER)
    return found, images


@pytest.fixture(scope="module")
def pictures():
    return [example.image for example in scenes.held_out_examples(16)]


@pytest.mark.parametrize("name", STUDENTS)
def test_lessons_are_the_processors(name: str) -> None:
    student = STUDENTS[name]
    torch.manual_seed(0)
    parts = student.build(0)
    lessons = Lessons(student, parts, 0)
    lessons.check(parts.processor)
    batch, targets = lessons.next()
    told = batch["labels"] != -100
    assert not (told & batch["prefix"]).any(), "the prompt is not learned"
    assert (batch["labels"][told] == batch["input_ids"][told]).all()
    assert told.any(1).all() and len(batch["labels"]) == student.batch * student.talks
    assert targets["shape"].shape == (student.batch, CELLS)
    words = parts.model.get_input_embeddings()
    assert int(batch["input_ids"].max()) < len(words.weight) + getattr(parts.model.config, "additional_vocab_size", 0)


@pytest.mark.parametrize("name", ["minigpt_v2", "idefics"])
def test_donated_eyes_see_what_the_donors_see(name: str, donor, pictures) -> None:
    model, images = donor
    pixels = images(images=pictures, return_tensors="pt")["pixel_values"]
    torch.manual_seed(0)
    eyes = STUDENTS[name].build(0).model.get_submodule(STUDENTS[name].eyes).eval()
    with torch.no_grad():
        wanted = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        found = eyes(pixels).last_hidden_state
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    learn = [weight.requires_grad for key, weight in eyes.named_parameters() if not key.startswith("post_layernorm")]
    assert all(learn) if name == "idefics" else not any(learn)


@pytest.mark.parametrize("name", ["paligemma", "blip2", "visual_gpt", "coca"])
def test_fitted_eyes_see_much_the_same(name: str, donor, pictures) -> None:
    model, images = donor
    torch.manual_seed(0)
    parts = STUDENTS[name].build(0)
    eyes = parts.model.get_submodule(STUDENTS[name].eyes).eval()
    own = parts.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model.model.vision_tower(
            images(images=pictures, return_tensors="pt")["pixel_values"], output_hidden_states=True
        ).hidden_states[-2][:, -CELLS:]
        found = eyes(own, output_hidden_states=True).hidden_states[-1][:, -CELLS:]
    centre = wanted.mean((0, 1))
    explained = 1.0 - float((found - wanted).square().sum() / (wanted - centre).square().sum())
    assert explained > 0.5, explained


def test_donated_language_models_speak_as_the_donors(donor) -> None:
    model, _ = donor
    ids = torch.tensor([[1, *donors.words()("describe the image. a red circle", add_special_tokens=False)["input_ids"]]])
    torch.manual_seed(0)
    minigpt: torch.nn.Module = STUDENTS["minigpt_v2"].build(0).model.eval()
    idefics = STUDENTS["idefics"].build(0).model.eval()
    for layer in idefics.model.gated_cross_attn_layers:
        layer.alpha_cross_attn.data.zero_(), layer.alpha_dense.data.zero_()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        found = minigpt(input_ids=ids).logits[..., : wanted.shape[-1]]
        seen = torch.zeros(*ids.shape, 1, dtype=torch.long)
        gated = idefics(input_ids=ids, pixel_values=torch.zeros(1, 1, 3, 64, 64), image_attention_mask=seen)
    for logits in (found, gated.logits[..., : wanted.shape[-1]]):
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="they do not fit"):
        donors.give(torch.nn.Linear(4, 3), {"weight": torch.zeros(5, 4)})


@pytest.mark.parametrize("name", TRAINED)
def test_the_checkpoint_says_how_it_was_made(name: str) -> None:
    record = json.loads((TRAINED[name] / "training.json").read_text())
    assert f"python -m benchmarks.train.teach {name} --seed {record['seed']} --steps" in record["command"]
    assert record["donor"] == STUDENTS[name].donor
    assert next(iter(record["accuracy"].values())) >= 0.9, "what the checkpoints must reach"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_checkpoint_knows_what_it_says(name: str) -> None:
    """On a tenth of the questions: within four standard errors of the share that was measured on all."""
    record, count = json.loads((TRAINED[name] / "training.json").read_text()), 200
    for key, found in measure(TRAINED[name], name, count)[0].items():
        told = record["accuracy"][key]
        assert found >= told - 4 * math.sqrt(told * (1 - told) / count) - 1 / count, key


def test_all_checkpoints_together_stay_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()) < 60e6


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_training_learns(name: str) -> None:
    losses: list[float] = []
    train(STUDENTS[name], 0, 24, None, lambda step, seconds, found: losses.append(found["text"]))
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
