"""The bundle's manifest as types: what `manifest.json` may say, and nothing else (unknown keys are refused).

A family adds its own `*Contract` here: the rule by which the runtime joins that family's graphs. Everything geometric that
depends on an image (grids, tile counts, rotary positions) is named by a tagged struct and computed on the host.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA_VERSION = 1

Dim = int | str
"""A fixed size, or the name of a dynamic dimension (`batch`, `sequence`, `past`, `images`, `patches` …)."""


class _Struct(msgspec.Struct, forbid_unknown_fields=True):
    """Strict base: a manifest with an unknown key is from another schema and is refused."""


class TensorSpec(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph. `dtype` is a numpy name (`float32`, `int64`, `bool` …)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


class FileRef(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle: path relative to the bundle's root, its SHA-256 (hex) and size in bytes."""

    file: str
    sha256: str
    bytes: int


class GraphEntry(_Struct, kw_only=True):
    """One compiled graph: its ONNX file, the external data it reads, and its signature.

    `role` is one of `vision_encoder`, `projector`, `embed_tokens`, `decoder`, `text_encoder`, … ; it is also the file stem.
    `precision` is what the weights are stored in: fp32, fp16, int8 (activations too), int8w (weights only), int4.
    """

    role: str
    model: FileRef
    data: list[FileRef] = []
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: str = "fp32"
    nodes: int = 0
    parameters: int = 0


class KVLayout(_Struct, kw_only=True):
    """KV cache: one key and one value tensor `[batch, kv_heads, sequence, head_dim]` per layer.

    In the portable decoder past and present grow by concatenation. In a build with `shared_buffer` the cache has a fixed
    capacity, past and present are bound to one buffer, and the new entries are written in place.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    shared_buffer: bool = False


class FixedPlaceholder(_Struct, kw_only=True, tag="fixed", tag_field="kind"):
    """Every image becomes the same number of image tokens (LLaVA: `<image>` × tokens_per_image)."""

    image_token: str
    tokens_per_image: int


class TilePlaceholder(_Struct, kw_only=True, tag="tiles", tag_field="kind"):
    """Idefics3/SmolVLM: an image is split into rows × columns tiles and one global view, each framed by its own tokens.

    One tile: `{fake_token}{row_column_format.format(row=1, column=1)}{image_token × tokens_per_tile}`; rows end with a
    newline; the global view is `\\n{fake_token}{global_token}{image_token × tokens_per_tile}{fake_token}`.
    An image that was not split is the global view alone, without the newline before it.
    """

    image_token: str
    fake_token: str
    global_token: str
    row_column_format: str = "<row_{row}_col_{column}>"
    tokens_per_tile: int


class GridPlaceholder(_Struct, kw_only=True, tag="grid", tag_field="kind"):
    """Qwen2-VL: `<|image_pad|>` × (t · h · w / merge_size²), from the grid of patches the image was cut into."""

    image_token: str
    merge_size: int


Placeholder = FixedPlaceholder | TilePlaceholder | GridPlaceholder


class SequentialPositions(_Struct, kw_only=True, tag="sequential", tag_field="kind"):
    """position_ids `[batch, sequence]` = 0, 1, 2 … over the tokens of a row."""


class MRopePositions(_Struct, kw_only=True, tag="mrope", tag_field="kind"):
    """Qwen2-VL's M-RoPE: position_ids `[3, batch, sequence]` (time, height, width); text advances all three together,

    an image occupies a t × h × w block starting at the next free position (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """

    merge_size: int
    image_token_id: int
    vision_start_token_id: int


Positions = SequentialPositions | MRopePositions


class ProjectorContract(_Struct, kw_only=True, tag="projector", tag_field="family"):
    """vision_encoder → projector → features replace the embeddings of the image tokens, in order → decoder.

    `vision_outputs_rows`: one image yields how many leading rows of the vision encoder's batch: `image` (one row per
    image), `tile` (rows = tiles of one image), `patches` (no batch; the whole image is one row of patches).
    """

    image_token_id: int
    placeholder: Placeholder
    positions: Positions
    vision_batch: Literal["image", "tile", "patches"]
    kv: KVLayout
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    pad_token_id: int
    bos_token_id: int | None = None


class SoftmaxSimilarity(_Struct, kw_only=True, tag="softmax", tag_field="kind"):
    """CLIP: logits = logit_scale · image·textᵀ over unit-length embeddings; probabilities by softmax over the texts."""

    logit_scale: float


class SigmoidSimilarity(_Struct, kw_only=True, tag="sigmoid", tag_field="kind"):
    """SigLIP: logits = logit_scale · image·textᵀ + logit_bias; each pair's probability by a sigmoid of its own."""

    logit_scale: float
    logit_bias: float


Similarity = SoftmaxSimilarity | SigmoidSimilarity


class DualEncoderContract(_Struct, kw_only=True, tag="dual_encoder", tag_field="family"):
    """vision_encoder → `image_embeds`, text_encoder → `text_embeds` (both *not* yet normalised to unit length).

    `text_padding`: CLIP pads to the longest text and masks; SigLIP always pads to `text_length` and has no mask.
    """

    embedding_dim: int
    similarity: Similarity
    text_length: int
    text_padding: Literal["longest", "max_length"]
    pad_token_id: int


Contract = ProjectorContract | DualEncoderContract


class Source(_Struct, kw_only=True):
    """Where the checkpoint came from. `revision` is a hub commit, or the SHA-256 over a local folder's weight files."""

    name: str
    revision: str
    architecture: str


class Check(_Struct, kw_only=True):
    """One comparison: largest absolute and relative difference and smallest cosine over all cases, with the verdict."""

    verdict: Literal["PASS", "AMBIGUOUS", "FAIL"]
    subject: str
    metric: dict[str, float] = {}
    tolerance: dict[str, float] = {}
    cases: int = 0
    note: str = ""


class ParityRecord(_Struct, kw_only=True):
    """All comparisons that were made for the portable graphs or for one build, newest run only."""

    verdict: Literal["PASS", "AMBIGUOUS", "FAIL"]
    reference: str
    created: str
    checks: list[Check]


class Build(_Struct, kw_only=True):
    """One lowered form of the portable graphs, in `builds/{name}/`.

    `precision` names each graph's precision; `options` holds what the build was made with (block size, calibration, …).
    `kv` replaces the contract's layout when the lowering changed it.
    """

    name: str
    target: str
    backend: str
    precision: dict[str, str]
    graphs: dict[str, GraphEntry]
    options: dict[str, str | int | float | bool] = {}
    kv: KVLayout | None = None
    created: str = ""
    versions: dict[str, str] = {}
    parity: ParityRecord | None = None


class Manifest(_Struct, kw_only=True):
    """`manifest.json`, whole."""

    schema_version: int = SCHEMA_VERSION
    name: str
    model_type: str
    source: Source
    versions: dict[str, str]
    created: str
    contract: Contract
    files: list[FileRef]
    graphs: dict[str, GraphEntry]
    builds: dict[str, Build] = {}
    parity: ParityRecord | None = None

    @property
    def family(self) -> str:
        """The fusion family's name, from the contract's tag."""
        return str(self.contract.__struct_config__.tag)
