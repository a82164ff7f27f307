"""Sizes that engines are compiled for, and when a decoder's engine has two sets of them."""

import dataclasses

import msgspec
import pytest
import sketch_bundle

from vlm_edge.targets.tensorrt.profiles import buckets, chunk, decoder_profiles, graph_profiles, holds_weights_twice
from vlm_edge_runtime.bundle.manifest import (
    FixedPlaceholder,
    GenerativeContract,
    GraphEntry,
    GridPlaceholder,
    Memory,
    Modality,
    TensorSpec,
    TokenInput,
)
from vlm_edge_runtime.bundle.reader import Bundle, open_bundle
from vlm_edge_runtime.errors import TargetError

MB = 10**6


@pytest.fixture(scope="module")
def sketch(tmp_path_factory):
    return open_bundle(sketch_bundle.vlm_bundle(tmp_path_factory.mktemp("profiles") / "sketch.vlm"))


def entry(role="decoder", **inputs) -> GraphEntry:
    specs = [TensorSpec(name=name, dtype="float16", shape=shape) for name, shape in inputs.items()]
    file = {"file": "x", "sha256": "0", "bytes": 0}
    return msgspec.convert({"role": role, "model": file, "inputs": msgspec.to_builtins(specs), "outputs": []}, type=GraphEntry)


def with_contract(bundle: Bundle, **changes) -> Bundle:
    manifest = msgspec.structs.replace(bundle.manifest, contract=msgspec.structs.replace(bundle.manifest.contract, **changes))
    return dataclasses.replace(bundle, manifest=manifest)


def decoder(bundle, *, number="two", rows=4):
    graph = entry(
        inputs_embeds=("batch", "sequence", 64),
        past_lengths=("batch",),
        **{"past_key_values.0.key": ("batch", 2, 64, 16), "media": ("batch", "sequence", "images")},
    )
    graph.inputs = [spec for spec in graph.inputs if bundle.manifest.contract.memory or spec.name != "media"]
    return decoder_profiles(bundle, graph, capacity=64, max_batch=rows, number=number)


def test_decode_and_prefill_apart_and_together(sketch):
    """Decode comes first: the first profile that takes a step's sizes is the one for it. Both allow the same rows."""
    decode, prefill = decoder(sketch)
    assert (decode.use, prefill.use) == ("decode", "prefill")
    embeds = prefill.shapes["inputs_embeds"]
    assert (embeds.min, embeds.opt, embeds.max) == ((1, 1, 64), (1, 64, 64), (4, 64, 64))
    embeds = decode.shapes["inputs_embeds"]
    assert (embeds.min, embeds.opt, embeds.max) == ((1, 1, 64), (1, 1, 64), (4, 1, 64))
    assert decode.shapes["past_key_values.0.key"].max == (4, 2, 64, 16)
    (both,) = decoder(sketch, number="one")
    assert both.use == "any" and both.shapes["inputs_embeds"].max == (4, 64, 64)


def test_two_profiles_allow_two_rows_so_that_the_weights_are_stored_once(sketch):
    assert [one.shapes["past_lengths"].max for one in decoder(sketch, rows=1)] == [(2,), (2,)]
    assert [one.shapes["past_lengths"].max for one in decoder(sketch, rows=1, number="one")] == [(1,)]


@pytest.mark.parametrize(
    "engine,weights,twice",
    [(489, 269, True), (284, 269, False), (346, 269, False), (238, 113, True), (145, 113, False), (8, 1, False)],
)
def test_an_engine_that_holds_its_weights_twice(engine, weights, twice):
    """Sizes of SmolLM2-135M's decoder by TensorRT-RTX 1.7.1, in MB; a small engine is mostly kernels."""
    assert holds_weights_twice(engine * MB, weights * MB) == twice


def test_buckets_end_where_the_model_does(sketch):
    contract = sketch.manifest.contract
    assert buckets(contract, [4096, 64, 64]) == [64, 128] and buckets(contract, [1024, 4096]) == [128]
    for wanted in ([], [0, 64]):
        with pytest.raises(TargetError, match="name at least one number of tokens"):
            buckets(contract, wanted)


def test_a_chunk_holds_what_must_be_read_together(sketch):
    long: GenerativeContract = msgspec.structs.replace(sketch.manifest.contract, context_length=8192)
    assert chunk(long, 4096) == 1024 and chunk(long, 512) == 512 and chunk(long, None) == 1024
    prompt = TokenInput(name="block_ids", kind="blocks", blocks="prompt")
    assert chunk(msgspec.structs.replace(long, token_inputs=[prompt]), 4096) == 4096
    images = TokenInput(name="block_ids", kind="blocks", blocks="images")
    picture = Modality(
        graphs=["vision_encoder"], batch="image", placeholder=FixedPlaceholder(image_token="<i>", tokens_per_image=1500)
    )
    assert chunk(msgspec.structs.replace(long, token_inputs=[images], modalities=[picture]), 4096) == 1500


def test_patches_come_in_whole_blocks(sketch):
    grid = Modality(graphs=["vision_encoder"], batch="patches", placeholder=GridPlaceholder(image_token="<i>", merge_size=3))
    bundle = with_contract(sketch, modalities=[grid])
    graph = entry("vision_encoder", pixel_values=("patches", 192))
    (found,) = graph_profiles(bundle, "vision_encoder", graph, max_batch=1, longest=128)
    sizes = found.shapes["pixel_values"]
    assert all(size[0] % 9 == 0 for size in (sizes.min, sizes.opt, sizes.max)) and sizes.min[0] == 9


def test_memory_is_so_many_images(sketch):
    memory = Memory(source="features", mask="tokens", hidden_size=64, entries_per_image=5)
    bundle = with_contract(sketch, memory=memory)
    graph = entry(**{"inputs_embeds": ("batch", "sequence", 64), "cross_key_values.0.key": ("batch", 2, "source", 16)})
    (found,) = graph_profiles(bundle, "cross_kv", graph, max_batch=2, longest=128)
    source = found.shapes["cross_key_values.0.key"]
    assert (source.min[2], source.opt[2], source.max[2]) == (1, 5, 20)
    _, prefill = decoder(bundle)
    assert prefill.shapes["media"].max == (4, 64, 4)
    one = dataclasses.replace(bundle, manifest=bundle.manifest)
    one.manifest.contract.modalities[0].most = 1
    (found,) = graph_profiles(one, "cross_kv", graph, max_batch=2, longest=128)
    assert found.shapes["cross_key_values.0.key"].max[2] == 5
    one.manifest.contract.modalities[0].most = None


def test_a_dimension_that_nobody_knows(sketch):
    with pytest.raises(TargetError, match="no sizes are known for the dimension wavelets of 'x'"):
        graph_profiles(sketch, "vision_encoder", entry("vision_encoder", x=("wavelets", 3)), max_batch=1, longest=8)


def test_only_what_is_dynamic_is_named(sketch):
    graph = entry("projector", image_hidden_states=("images", 4, 64), table=(4, 4))
    (found,) = graph_profiles(sketch, "projector", graph, max_batch=1, longest=8)
    assert set(found.shapes) == {"image_hidden_states"} and found.use == "any"
