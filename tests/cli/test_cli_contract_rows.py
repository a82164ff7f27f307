"""What `inspect` says of a contract."""

from vlm_edge.cli.contract_rows import contract_rows
from vlm_edge_runtime.bundle.manifest import (
    DualEncoderContract,
    FixedPlaceholder,
    GenerativeContract,
    KVLayout,
    Memory,
    Modality,
    PromptFormat,
    SequentialPositions,
    SoftmaxSimilarity,
    TokenInput,
)


def test_every_part_has_a_row():
    contract = GenerativeContract(
        family="made_up",
        modalities=[
            Modality(graphs=["vision_encoder", "qformer"], batch="image", token_id=7,
                     placeholder=FixedPlaceholder(image_token="<image>", tokens_per_image=4), most=1),
            Modality(kind="audio", graphs=["audio_encoder"], batch="tile", joins="memory"),
        ],
        positions=SequentialPositions(),
        kv=KVLayout(layers=2, kv_heads=2, head_dim=16),
        hidden_size=64,
        vocab_size=80,
        context_length=128,
        eos_token_ids=[2, 3],
        pad_token_id=0,
        prompt=PromptFormat(template="{images}\n{text}"),
        memory=Memory(source="features", mask="tokens", hidden_size=32),
        token_inputs=[TokenInput(name="block_ids", kind="blocks", blocks="prefix")],
    )  # fmt: skip
    rows = list(contract_rows(contract))
    found = dict(rows)
    assert found["image"].startswith(
        "vision_encoder → qformer; one row each; features take the places of its tokens; placeholder"
    )
    assert "<image>" in found["image"] and "token 7" in found["image"] and "most 1" in found["image"]
    assert found["audio"] == "audio_encoder; a row per tile or frame; features are what cross-attention reads"
    assert found["cross-attention"] == "features, 32 wide, what each token may see"
    assert "block_ids: tokens of one block see each other in both directions (prefix)" in found["input per token"]
    assert found["prompt"] == "template '{images}\\n{text}'", "what has its default is left out"
    assert found["eos token ids"] == "2, 3" and found["positions"] == "sequential"
    assert "bos token id" not in found and "family" not in found and len(rows) == len(found)


def test_a_dual_encoder():
    contract = DualEncoderContract(
        embedding_dim=64, similarity=SoftmaxSimilarity(logit_scale=10.0), text_length=8, text_padding="longest", pad_token_id=0
    )
    found = dict(contract_rows(contract))
    assert found["similarity"] == "softmax (logit_scale=10.0)" and found["text_length"] == "8"
