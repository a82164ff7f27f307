"""Visual tokens merged at export: the arithmetic, what the manifest says, what runs, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from vlm_edge.export import export
from vlm_edge.families.base import Case, GraphPlan, Single, Split
from vlm_edge.families.token_merging import ROLE, TokenMerger, kept_tokens, merge_tokens, merging, rounds
from vlm_edge.parity import Example, compare
from vlm_edge.targets.build import build
from vlm_edge.targets.examine import examine
from vlm_edge_runtime import VisionLanguageModel, load
from vlm_edge_runtime.bundle.manifest import (
    CropsPlaceholder,
    DualEncoderContract,
    FixedPlaceholder,
    GenerativeContract,
    GridPlaceholder,
    MRopePositions,
    SoftmaxSimilarity,
    TilePlaceholder,
    TokenInput,
)
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.bundle.vision_layout import AnyResolutionPlaceholder, FramedTilesPlaceholder, MarkedTilesPlaceholder
from vlm_edge_runtime.errors import ExportError, UnsupportedModelError


@pytest.mark.parametrize(
    ("wanted", "tokens", "kept"),
    [
        ("50%", 64, 32),
        ("0%", 64, 64),
        ("0 %", 7, 7),
        ("25%", 9, 7),
        ("12.5%", 64, 56),
        ("48", 64, 48),
        ("1", 4, 1),
        ("98%", 64, 1),
    ],
)
def test_a_share_is_merged_away_and_a_number_is_kept(wanted, tokens, kept) -> None:
    assert kept_tokens(wanted, tokens) == kept


@pytest.mark.parametrize("wanted", ["100%", "65", "0", "half", "-1", "50%%", "1.5", ""])
def test_other_wishes_are_refused(wanted) -> None:
    with pytest.raises(ExportError, match=r"merge away|would leave"):
        kept_tokens(wanted, 64)


def test_a_round_takes_at_most_half() -> None:
    assert list(rounds(17, 5)) == [(17, 8), (9, 4)]
    assert list(rounds(64, 48)) == [(64, 16)]
    assert list(rounds(5, 5)) == []


@pytest.mark.parametrize(("tokens", "kept"), [(16, 16), (16, 15), (16, 8), (17, 5), (9, 8), (64, 3), (2, 1)])
def test_the_graph_computes_what_the_paper_says(tokens, kept) -> None:
    features = torch.randn(3, tokens, 24, generator=torch.Generator().manual_seed(tokens))
    (found,) = TokenMerger(tokens, kept)(features)
    assert found.shape == (3, kept, 24)
    torch.testing.assert_close(found, merge_tokens(features, kept), rtol=1e-5, atol=1e-5)
    # An image's tokens do not depend on the other images of its batch.
    torch.testing.assert_close(TokenMerger(tokens, kept)(features[1:2])[0], found[1:2])


def test_pairs_most_alike_become_their_average_in_the_place_of_the_odd_one() -> None:
    a, b, c = torch.eye(4)[:3]
    tokens = torch.stack([a, b, c, 3 * c, b, 2 * a])[None]  # even places: a, c, b; odd ones: b, 3c, 2a
    (found,) = TokenMerger(6, 5)(tokens)
    # All three find their like; of equals the first is taken: a at place 0 goes to 2a at place 5.
    torch.testing.assert_close(found[0], torch.stack([b, c, 3 * c, b, 1.5 * a]))
    (found,) = TokenMerger(6, 3)(tokens)
    torch.testing.assert_close(found[0], torch.stack([b, 2 * c, 1.5 * a]))


def test_averages_count_what_they_stand_for() -> None:
    one = torch.tensor([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3], [10.0, 1.0]])[None]
    (found,) = TokenMerger(4, 1)(one)
    torch.testing.assert_close(found[0, 0], one[0].mean(0))


def test_tokens_that_are_all_the_same_are_merged_all_the_same() -> None:
    (found,) = TokenMerger(8, 3)(torch.zeros(2, 8, 4))
    assert not found.any() and found.shape == (2, 3, 4)
    (found,) = TokenMerger(8, 3)(torch.ones(2, 8, 4))
    torch.testing.assert_close(found, torch.ones(2, 3, 4))


def _split(manifest) -> Split:
    """What an exporter would have, without a model."""
    graph = manifest.graphs["projector"]
    plan = GraphPlan(
        role="projector",
        module=Single(torch.nn.Identity()),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        cases=(Case("one", {}),),
        sample=lambda case: (),
        reference=lambda case, inputs: inputs,
    )
    return Split((plan,), manifest.contract)


def _with_placeholder(split: Split, placeholder) -> Split:
    contract = split.contract
    assert isinstance(contract, GenerativeContract)
    modality = msgspec.structs.replace(contract.modalities[0], placeholder=placeholder)
    return Split(split.graphs, msgspec.structs.replace(contract, modalities=[modality]))


def test_nothing_to_merge_leaves_the_split_as_it_is(portable_bundle) -> None:
    split = _split(read_manifest(portable_bundle("smolvlm")))
    assert merging(split, None) is split
    assert merging(split, "0%") is split
    assert merging(split, "4") is split


@pytest.mark.parametrize(
    ("placeholder", "count"),
    [
        (FixedPlaceholder(image_token="i", tokens_per_image=4), "tokens_per_image"),
        (
            CropsPlaceholder(image_token="i", soft_token="s", before="", after="", tokens_per_image=4, crops=""),
            "tokens_per_image",
        ),
        (TilePlaceholder(image_token="i", fake_token="f", global_token="g", tokens_per_tile=4), "tokens_per_tile"),
        (FramedTilesPlaceholder(image_token="i", start_token="s", end_token="e", tokens_per_tile=4), "tokens_per_tile"),
        (
            MarkedTilesPlaceholder(
                image_token="i", soft_token="s", start="", tile="", whole="", tile_end="", end="", tokens_per_tile=4
            ),
            "tokens_per_tile",
        ),
    ],
)
def test_the_prompt_makes_room_for_what_is_left(portable_bundle, placeholder, count) -> None:
    split = merging(_with_placeholder(_split(read_manifest(portable_bundle("smolvlm"))), placeholder), "25%")
    assert [plan.role for plan in split.graphs] == ["projector", ROLE]
    modality = split.contract.modalities[0]
    assert modality.graphs == ["vision_encoder", "projector", ROLE]
    assert modality.placeholder == msgspec.structs.replace(placeholder, **{count: 3})
    assert split.graphs[1].outputs[0].shape[1] == 3


def test_what_does_not_fit_is_refused_in_one_sentence(portable_bundle) -> None:
    split = _split(read_manifest(portable_bundle("smolvlm")))
    contract = split.contract
    rotary = MRopePositions(merge_size=2, image_token_id=1, vision_start_token_id=2)
    deep = [TokenInput(name="deepstack.0", kind="features")]
    dual = DualEncoderContract(
        embedding_dim=8, similarity=SoftmaxSimilarity(logit_scale=1.0), text_length=8, text_padding="longest", pad_token_id=0
    )
    for case, why in (
        (Split(split.graphs, msgspec.structs.replace(contract, positions=rotary)), "M-RoPE"),
        (Split(split.graphs, msgspec.structs.replace(contract, token_inputs=deep)), "DeepStack"),
        (Split(split.graphs, msgspec.structs.replace(contract, family="cross_attention")), "family 'cross_attention'"),
        (Split(split.graphs, dual), "family 'dual_encoder'"),
        (_with_placeholder(split, AnyResolutionPlaceholder(image_token="i", side=2)), "AnyResolutionPlaceholder"),
        (_with_placeholder(split, GridPlaceholder(image_token="i", merge_size=2)), "GridPlaceholder"),
    ):
        with pytest.raises(UnsupportedModelError, match=why):
            merging(case, "50%")


@pytest.mark.slow
def test_a_refusal_comes_before_anything_is_traced(tiny_checkpoint, tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match="M-RoPE"):
        export(tiny_checkpoint("qwen2_vl"), tmp_path / "refused.vlm", merge_visual_tokens="50%")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def halved(tiny_checkpoint, tmp_path_factory) -> Iterator[Path]:
    """The tiny SmolVLM with 2 tokens for a tile and not 4; exporting it compares the merger with PyTorch."""
    folder = tmp_path_factory.mktemp("merged") / "halved.vlm"
    export(tiny_checkpoint("smolvlm"), folder, merge_visual_tokens="50%")
    yield folder


def _picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_tile_of_every_image_has_the_tokens_that_are_left(halved, portable_bundle) -> None:
    pictures = [_picture(64, 64, 1), _picture(64, 32, 2), _picture(40, 64, 3)]
    with load(halved, build="portable") as merged, load(portable_bundle("smolvlm"), build="portable") as whole:
        assert isinstance(merged, VisionLanguageModel) and isinstance(whole, VisionLanguageModel)
        token = merged.manifest.contract.modality("image").token_id
        assert merged.manifest.contract.modality("image").placeholder.tokens_per_tile == 2
        for images in (pictures[:1], pictures):
            fewer, all_tokens = (one.prepare("what is it?", images=images) for one in (merged, whole))
            tiles = sum(len(medium.arrays["pixel_values"]) for medium in fewer.inputs)
            assert fewer.token_ids.count(token) == 2 * tiles
            assert all_tokens.token_ids.count(token) == 4 * tiles
            assert merged.generate("what is it?", images=images, max_new_tokens=4, temperature=0.0).tokens
        batch = merged.generate(["what?", "where?"], images=[pictures[:1], pictures[1:]], max_new_tokens=4, temperature=0.0)
        alone = merged.generate("where?", images=pictures[1:], max_new_tokens=4, temperature=0.0)
        assert list(batch[1].tokens) == list(alone.tokens)


@pytest.mark.slow
def test_the_whole_model_is_compared_with_pytorch_that_merges_the_same(halved, tiny_checkpoint) -> None:
    pictures = _picture(64, 64, 1), _picture(64, 32, 2)
    examples = [Example(pictures[:1], "what is it?"), Example(pictures, "what are they?")]
    report = compare(halved, tiny_checkpoint("smolvlm"), builds=["portable"], examples=examples, max_new_tokens=6, store=False)
    assert "4 visual tokens merged into 2" in report.reference
    assert report.builds[0].verdict == "PASS", report.builds[0]
    assert ROLE in {graph.role for graph in report.builds[0].graphs}


@pytest.mark.slow
def test_nothing_merged_is_the_plain_export_bit_for_bit(tiny_checkpoint, portable_bundle, tmp_path) -> None:
    export(tiny_checkpoint("llava-llama"), tmp_path / "zero.vlm", merge_visual_tokens="0%", check=False)

    def digests(folder: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((folder / "portable").iterdir())}

    assert digests(tmp_path / "zero.vlm") == digests(portable_bundle("llava-llama"))


@pytest.mark.slow
def test_targets_take_the_merger(halved) -> None:
    for target in ("rtx-40", "jetson-orin-nano", "jetson-orin-nano-jp62", "h100-h200"):
        found = examine(halved, target)
        assert not [problem for problem in found.problems if problem.graph == ROLE], target
    build(halved, "cpu-int4")
    with load(halved, build="cpu-int4") as session:
        assert isinstance(session, VisionLanguageModel)
        assert session.generate("what is it?", images=[_picture(64, 64, 1)], max_new_tokens=4, temperature=0.0).tokens
