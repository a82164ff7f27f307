"""Everything that a model takes besides text: one store per modality, by the contract."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import vlm_edge_runtime.preprocess as preprocess
from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, Modality
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.errors import BundleError, PromptError
from vlm_edge_runtime.preprocess import ImageProcessor
from vlm_edge_runtime.text import Tokenizer

from .inputs import ARGUMENTS
from .lru import ByteLRU
from .media import Array, Encode, Encoded, Features, MediaStore, Medium, Reader
from .modality_graphs import ModalityGraphs
from .packing import geometry_arrays, packed
from .prefetched import Prefetched
from .readers import ImageReader, VectorReader, VideoReader


class Modalities:
    """The stores of a contract's modalities. Their features share one budget of bytes with whatever else is put into `kept`.

    `keep`: names of arrays that memory graphs read beside the features.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        contract: GenerativeContract,
        image_processor: Callable[[], ImageProcessor],
        *,
        budget: int,
        keep: Collection[str] = (),
    ) -> None:
        if not contract.modalities:
            raise BundleError(f"{bundle.path} takes no images: it is not a vision-language model.")
        self._path = bundle.path
        self._by_kind: dict[str, Modality] = {modality.kind: modality for modality in contract.modalities}
        self.kept: ByteLRU[str, Any] = ByteLRU(budget)
        self._instructions = {
            kind: _Instructions(bundle, modality) for kind, modality in self._by_kind.items() if modality.instruction is not None
        }
        self._stores: dict[str, MediaStore] = {}
        for kind, modality in self._by_kind.items():
            graphs = ModalityGraphs(engine, bundle.graphs, modality.graphs, keep)
            self._stores[kind] = MediaStore(
                _reader(bundle, modality, image_processor),
                self._encoder(modality, graphs.how(modality.batch), _width(contract, modality)),
                variant=bundle.build_name,
                kept=self.kept,
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the model takes, in the contract's order."""
        return tuple(self._by_kind)

    def modality(self, kind: str) -> Modality:
        """The modality of a kind. Raises PromptError naming what the model takes."""
        if kind not in self._by_kind:
            takes = ", ".join(ARGUMENTS[each] for each in self._by_kind)
            raise PromptError(f"{self._path} takes no {ARGUMENTS[kind]}, only {takes}: leave them out.")
        return self._by_kind[kind]

    def open(self, kind: str, source: Any) -> Medium:
        """Opens and measures one input. Raises PromptError, ImageError."""
        if isinstance(source, Prefetched):
            source = source.only()
        if isinstance(source, Medium):
            kind = source.kind
        self.modality(kind)
        return self._stores[kind].open(source)

    def arrays(self, medium: Medium) -> dict[str, Array]:
        """What the processor makes of a medium (and of its instruction), by name: the first graphs' inputs."""
        return self._complete(medium, dict(self._stores[medium.kind].processor(medium.source).arrays))

    def encoded(self, kind: str, sources: Sequence[Any], instruction: str, between: Callable[[], None]) -> list[Medium]:
        """Inputs of one kind with their features, for this object's use. Raises as `open`."""
        media = [self.instructed(self.open(kind, source), instruction) for source in sources]
        features = self.features(media, between).features
        return [replace(one, features=features[one.key], arrays=None, owner=self._stores[kind]) for one in media]

    def instructed(self, medium: Medium, text: str) -> Medium:
        """The medium as seen with an instruction, where its modality reads one."""
        if medium.kind not in self._instructions or medium.instruction == text:
            return medium
        return replace(medium, instruction=text, features=None)

    def features(self, media: Sequence[Medium], between: Callable[[], None] = lambda: None) -> Encoded:
        """Features of every medium, each content encoded at most once. `between` is called between graph runs."""
        found: dict[str, Features] = {}
        encoded = 0
        for kind, store in self._stores.items():
            part = store.features([medium for medium in media if medium.kind == kind], between)
            found |= part.features
            encoded += part.encoded
        return Encoded(found, encoded)

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return self.kept.bytes

    def clear(self) -> None:
        """Forgets everything."""
        for store in self._stores.values():
            store.clear()

    def _complete(self, medium: Medium, arrays: dict[str, Array]) -> dict[str, Array]:
        arrays |= geometry_arrays(self._by_kind[medium.kind].geometry, medium.layout)
        if medium.kind in self._instructions:
            arrays |= self._instructions[medium.kind].arrays(medium.instruction or "")
        return arrays

    def _encoder(self, modality: Modality, run: Encode, width: int | None) -> Encode:
        def encode(media: list[Medium], between: Callable[[], None]) -> list[Features]:
            for medium in media:
                assert medium.arrays is not None  # the store fills them before it encodes
                medium.arrays = self._complete(medium, dict(medium.arrays))
            found = zip(media, run(media, between), strict=True)
            return [_joining(modality, _packed(modality, medium, features), width) for medium, features in found]

        return encode


class _Instructions:
    """The instruction of a modality in the tokens of its own tokenizer."""

    def __init__(self, bundle: Bundle, modality: Modality) -> None:
        assert modality.instruction is not None
        self._instruction = modality.instruction
        self._tokenizer = Tokenizer(bundle.read_bytes(self._instruction.tokenizer))

    def arrays(self, text: str) -> dict[str, Array]:
        """int64 `[1, instruction]` ids and mask under the names the graphs read."""
        batch = self._tokenizer.encode_batch([text], "longest", self._instruction.max_length)
        prefix = self._instruction.prefix
        return {f"{prefix}input_ids": batch.input_ids, f"{prefix}attention_mask": batch.attention_mask}


def instruction_names(modality: Modality) -> tuple[str, ...]:
    """The inputs that an instruction fills."""
    if modality.instruction is None:
        return ()
    return (f"{modality.instruction.prefix}input_ids", f"{modality.instruction.prefix}attention_mask")


def _reader(bundle: Bundle, modality: Modality, image_processor: Callable[[], ImageProcessor]) -> Reader:
    if modality.kind == "image":
        return ImageReader(image_processor())
    if modality.kind == "video":
        return VideoReader(preprocess.load_video_processor(bundle))
    return VectorReader(modality.kind, _own_input(bundle.graphs, modality))


def _own_input(graphs: Mapping[str, GraphEntry], modality: Modality) -> Any:
    """The one input of the first graph that is not the instruction's: what audio features and states are given as."""
    own = [spec for spec in graphs[modality.graphs[0]].inputs if spec.name not in instruction_names(modality)]
    if len(own) != 1:
        names = ", ".join(spec.name for spec in own)
        raise BundleError(
            f"graph '{modality.graphs[0]}' of modality {modality.kind} reads {names}; a modality of vectors has one input."
        )
    return own[0]


def _width(contract: GenerativeContract, modality: Modality) -> int | None:
    """How wide the features must be; None for token ids."""
    if modality.joins == "codes":
        return None
    return contract.memory.hidden_size if modality.joins == "memory" and contract.memory else contract.hidden_size


def _packed(modality: Modality, medium: Medium, features: Features) -> Features:
    return replace(features, values=packed(modality.placeholder, features.values, medium.layout))


def _joining(modality: Modality, features: Features, width: int | None) -> Features:
    """Features in rows: float32 `[tokens, hidden]`, or token ids int64 `[tokens]`; so are those that lie beside them."""
    if width is None:
        return replace(features, values=np.ascontiguousarray(features.values.reshape(-1), dtype=np.int64))
    values = np.ascontiguousarray(features.values, dtype=np.float32).reshape(-1, features.values.shape[-1])
    if values.shape[-1] != width:
        reads = "the decoder takes" if modality.joins == "tokens" else "its memory is"
        raise BundleError(f"{modality.kind} features are {values.shape[-1]} wide, {reads} {width}.")
    return replace(features, values=values)
