"""The bundle's manifest as types: what `manifest.json` may say, and nothing else (unknown keys are refused).

A contract is the rule by which the runtime joins a bundle's graphs. Families that write share one, put together from parts (what
enters, where it joins, what the decoder reads besides tokens). Everything geometric that depends on an image (grids, tile
counts, rotary positions) is named by a tagged struct and computed on the host.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .engine_profile import EngineProfile
from .image_output import ImageOutput
from .placeholders import CropsPlaceholder as CropsPlaceholder
from .placeholders import FencedPlaceholder as FencedPlaceholder
from .placeholders import FixedPlaceholder as FixedPlaceholder
from .placeholders import GridPlaceholder as GridPlaceholder
from .placeholders import Placeholder as Placeholder
from .placeholders import PrefixPlaceholder as PrefixPlaceholder
from .placeholders import TilePlaceholder as TilePlaceholder
from .positions import MRopePositions as MRopePositions
from .positions import Positions as Positions
from .positions import SequentialPositions as SequentialPositions
from .vision_layout import Geometry

SCHEMA_VERSION = 3
"""3: builds may hold engines (`Build.engines`). A manifest of an older schema is read as it is."""

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
    `format`: an ONNX file, or the plan of a decoder that the native kernels run (`model` is then all there is, `nodes` counts its
    steps).
    """

    role: str
    model: FileRef
    data: list[FileRef] = []
    format: Literal["onnx", "plan"] = "onnx"
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: str = "fp32"
    nodes: int = 0
    parameters: int = 0


class KVLayout(_Struct, kw_only=True):
    """KV cache: one key and one value tensor `[batch, kv_heads, sequence, head_dim]` per layer.

    In the portable decoder past and present grow by concatenation. In a build with `shared_buffer` the cache has a fixed
    capacity, past and present are bound to one buffer, and the new entries are written in place.

    `scale_block`: with `dtype` int8, numbers of a head that share a scale; the scales are tensors of their own beside keys and
    values, `past_key_values.{i}.key_scale` and `.value_scale` float16 `[batch, kv_heads · blocks of a head, sequence, 1]`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    shared_buffer: bool = False
    scale_block: int = 0

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token of one row: keys and values of all layers, and their scales."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[self.dtype]
        scales = 2 * -(-self.head_dim // self.scale_block) if self.scale_block else 0
        return 2 * self.layers * self.kv_heads * (self.head_dim * width + scales)


class Instruction(_Struct, kw_only=True):
    """InstructBLIP: the prompt's text also enters a modality's graphs, in the tokens of a tokenizer of its own.

    `tokenizer`: that tokenizer's file in the bundle. The graphs read `{prefix}input_ids` and `{prefix}attention_mask`, int64
    `[batch, instruction]`. Features then depend on the text as well as on the image.
    """

    tokenizer: str
    prefix: str = "qformer_"
    max_length: int


class Modality(_Struct, kw_only=True):
    """How one kind of input becomes something the decoder can read.

    `graphs`: roles that run one after another; each takes what it names among the processor's arrays and earlier outputs.
    `batch`: one input yields how many leading rows of the first graph's batch: `image` (one row), `tile` (rows are the tiles of
    one image, or the frames of one video), `patches` (no batch; the whole input is one row of patches).
    `joins`: `tokens` (the last graph's features take the places of the modality's tokens, in order), `memory` (they are what
    cross-attention reads; see Memory) or `codes` (the last graph gives token ids, which take the places of the tokens).
    `token_id`, `placeholder`: what stands for it in the prompt; None where nothing does.
    `least`, `most`: how many inputs of this kind one prompt must and may have (None is no limit).
    `geometry`: index arrays that the host computes from the grid of patches and the graphs take beside the processor's arrays.
    """

    kind: Literal["image", "video", "audio", "state"] = "image"
    graphs: list[str]
    batch: Literal["image", "tile", "patches"]
    joins: Literal["tokens", "memory", "codes"] = "tokens"
    token_id: int | None = None
    placeholder: Placeholder | None = None
    least: int = 0
    most: int | None = None
    geometry: list[Geometry] = []
    instruction: Instruction | None = None


class Memory(_Struct, kw_only=True):
    """What the decoder's cross-attention reads. Computed once per row, before the first token.

    `source`: `features` (those of the modalities that join as memory, one after another) or `encoder` (graph `encoder` runs over
    the prompt's embeddings, features merged in; the decoder then begins with `PromptFormat.start_tokens`).
    An encoder with an embedding of its own takes `input_ids` `[batch, source]` in place of `inputs_embeds`; one that reads
    features by cross-attention takes those of modalities that join as memory, by the name of their last graph's output
    `[batch, entries, width]`.
    Graph `cross_kv`, where the bundle has one, maps them to the decoder's static inputs; an output `state.{i}` is the initial
    value of a recurrent state. Without it the decoder reads `encoder_hidden_states` itself.
    `mask`: `none` (every row's source has one length), `source` (`encoder_attention_mask` int64 `[batch, source]`) or
    `tokens` (each token sees images of its own: a TokenInput of kind `media`).
    `entries_per_image`: where each token sees images of its own, how many entries one image has; a prompt without an image is
    given the entries of one that no token sees. `source_length`: how many entries the encoder takes at most; None where it
    takes any number.
    """

    source: Literal["features", "encoder"]
    mask: Literal["none", "source", "tokens"]
    hidden_size: int
    entries_per_image: int = 0
    source_length: int | None = None


class TokenInput(_Struct, kw_only=True):
    """A decoder input with a value for every token: `name` `[batch, sequence, …]`.

    `kind`: `blocks` (int64: tokens of one block, numbered from 1, see each other in both directions; 0 is causal), `features`
    (float32: further outputs of a modality's last graph at its tokens, zero elsewhere: Qwen3-VL's deepstack) or `media` (which
    images of the memory a token sees). `decode`: what a generated token gets: zeros, or what the prompt's last token had.
    `blocks`: what one block is: each unbroken run of one image's tokens (`images`), the whole prompt (`prompt`), or the tokens of
    a PrefixPlaceholder (`prefix`). `rule`: the name of the function that says which images a token sees
    (sessions/media_rules.py), `end` the token after which none is seen; for kind `media` alone.
    """

    name: str
    kind: Literal["blocks", "features", "media"]
    decode: Literal["zero", "last"] = "zero"
    blocks: Literal["images", "prompt", "prefix"] = "images"
    rule: str = ""
    end: int | None = None


class PromptFormat(_Struct, kw_only=True):
    """How a plain text and its images become a prompt where there is no chat template, as the model's processor does in code.

    `template`: `{images}` stands for one placeholder per image, `{text}` for the text. `add_special_tokens`: whether the
    tokenizer adds its own around the result. `apart`: the placeholders that the prompt begins with are no part of the text, and
    stand before the tokenizer's own special tokens (BLIP-2). `start_tokens`: token ids that the decoder begins with: before the
    prompt where the decoder reads it (`start` "before"), only where that prompt is empty (`start` "instead"), or alone where an
    encoder reads the prompt. `replacements`: a task word → the text that takes the place of the whole prompt it stands in;
    `{input}` there stands for the rest of the prompt without outer white space, and without `{input}` there must be no rest.
    """

    template: str = "{images}{text}"
    add_special_tokens: bool = True
    apart: bool = False
    start_tokens: list[int] = []
    start: Literal["before", "instead"] = "before"
    replacements: dict[str, str] = {}


class ActionTokens(_Struct, kw_only=True):
    """Actions as tokens (RT-2, arXiv 2307.15818, section 3.2): each dimension is cut into `bins` of equal width, a token each.

    Bin b is the token `first_token` + b; an action is one token per dimension, in order, between `low` and `high` of each.
    """

    first_token: int
    bins: int
    low: list[float]
    high: list[float]


class GenerativeContract(_Struct, kw_only=True, tag="generative", tag_field="contract"):
    """A model whose decoder writes: images (and other modalities) → features → decoder → tokens.

    `family` names the fusion family for people; nothing is decided by it. The decoder graph's inputs besides `inputs_embeds`,
    `attention_mask`, `position_ids` and the cache are told apart by their dimensions: one with a `sequence` has a value per
    token (see TokenInput), `state.{i}` is recurrent (`present_state.{i}` follows it), any other is static for a row.
    `contrast`: how it also compares images with texts (CoCa), where it does.
    """

    family: str
    modalities: list[Modality]
    positions: Positions
    kv: KVLayout
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    pad_token_id: int
    bos_token_id: int | None = None
    prompt: PromptFormat = msgspec.field(default_factory=PromptFormat)
    memory: Memory | None = None
    token_inputs: list[TokenInput] = []
    actions: ActionTokens | None = None
    image_output: ImageOutput | None = None
    contrast: DualEncoderContract | None = None

    def modality(self, kind: str) -> Modality | None:
        """The modality of that kind, if the model has it."""
        return next((one for one in self.modalities if one.kind == kind), None)


class SoftmaxSimilarity(_Struct, kw_only=True, tag="softmax", tag_field="kind"):
    """CLIP: logits = logit_scale · image·textᵀ over unit-length embeddings; probabilities by softmax over the texts."""

    logit_scale: float


class SigmoidSimilarity(_Struct, kw_only=True, tag="sigmoid", tag_field="kind"):
    """SigLIP: logits = logit_scale · image·textᵀ + logit_bias; each pair's probability by a sigmoid of its own."""

    logit_scale: float
    logit_bias: float


Similarity = SoftmaxSimilarity | SigmoidSimilarity


class DualEncoderContract(_Struct, kw_only=True, tag="dual_encoder", tag_field="contract"):
    """vision_encoder → `image_embeds`, text_encoder → `text_embeds` (both *not* yet normalised to unit length).

    `text_padding`: CLIP pads to the longest text and masks; SigLIP always pads to `text_length` and has no mask.
    `end_token_id`: a token that ends every text, after what the tokenizer adds; it counts among `text_length`.
    `image_graphs`: roles that run one after another from `pixel_values` to `image_embeds`; within a GenerativeContract they go
    on from what the image modality's graphs give.
    """

    family: str = "dual_encoder"
    embedding_dim: int
    similarity: Similarity
    text_length: int
    text_padding: Literal["longest", "max_length"]
    pad_token_id: int
    end_token_id: int | None = None
    image_graphs: list[str] = msgspec.field(default_factory=lambda: ["vision_encoder"])


Contract = GenerativeContract | DualEncoderContract


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


class EngineEntry(_Struct, kw_only=True):
    """One compiled engine: a cache of what a graph of the build became for some GPUs, never the artefact itself.

    `graph` is the key of its graph in `Build.graphs` (or in the portable ones, where the build took that unchanged); `role` is
    what it is to the runtime; a decoder has one engine per context bucket, and `capacity` is the number of cache entries it was
    made for. `sm`: the compute capabilities that it runs on (86 is 8.6). `platform`: operating system and architecture, as
    `linux-x86_64`. `graph_sha256`: what it was compiled from (`engine_files.graph_digest`). `key`: SHA-256 over that, the
    settings, the builder's version and `sm`; an engine whose key is not what the graph asks for now is stale. `profiles` in the
    order in which the engine numbers them. `aliases`: output → the input whose memory it must be given (a cache updated in
    place).
    """

    role: str
    graph: str
    file: FileRef
    sm: list[int]
    builder: Literal["tensorrt", "tensorrt-rtx"]
    builder_version: str
    platform: str
    graph_sha256: str
    key: str
    capacity: int | None = None
    profiles: list[EngineProfile] = []
    aliases: dict[str, str] = {}


class Build(_Struct, kw_only=True):
    """One lowered form of the portable graphs, in `builds/{name}/`.

    `precision` names each graph's precision; `options` holds what the build was made with (block size, calibration, …).
    `kv` replaces the contract's layout when the lowering changed it. `graphs` are by role; a decoder whose cache has a static
    size has one graph per context bucket instead, `decoder.c1024` … . `engines`: what was compiled from them so far; empty where
    the target's engines are made on the device.
    """

    name: str
    target: str
    backend: str
    precision: dict[str, str]
    graphs: dict[str, GraphEntry]
    engines: list[EngineEntry] = []
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
        """The fusion family's name."""
        return self.contract.family

    @property
    def session(self) -> str:
        """The contract's tag: which session runs it."""
        return str(self.contract.__struct_config__.tag)
