"""What a decoder's cross-attention reads, and the initial value of a recurrent state: made once per content, bound to a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Decoder, Engine
from vlm_edge_runtime.engines.decoder_inputs import DecoderInputs
from vlm_edge_runtime.errors import BundleError, ContextLengthError, PromptError

from .lru import ByteLRU
from .media import Array, Features, Medium, digest, number
from .modality_graphs import wanted
from .token_rows import TokenRow

Arrays = dict[str, Array]
FEATURES = "encoder_hidden_states"
MASK = "encoder_attention_mask"
_NO_MEDIA = "no media"


class MemoryGraphs:
    """The graphs between features and the decoder's static inputs: `encoder` and `cross_kv`, where the bundle has them.

    `reads`: names that these graphs take besides features, masks and embeddings.
    """

    def __init__(self, bundle: Bundle, engine: Engine, contract: GenerativeContract, inputs: DecoderInputs) -> None:
        self._path = bundle.path
        self._engine = engine
        self._contract = contract
        self._inputs = inputs
        self._graphs = bundle.graphs
        self._roles = [role for role in ("encoder", "cross_kv") if role in bundle.graphs]
        self.memory = contract.memory
        if self.memory is not None and self.memory.source == "encoder" and "encoder" not in bundle.graphs:
            raise BundleError(f"{bundle.path} has no graph 'encoder', whose output its decoder reads: export it again.")
        if self.memory is not None and self.memory.source == "encoder" and not contract.prompt.start_tokens:
            raise BundleError(f"{bundle.path} does not say which tokens its decoder begins with: export it again.")
        self.reads = frozenset(spec.name for role in self._roles for spec in bundle.graphs[role].inputs) | set(inputs.bound)

    @property
    def binds(self) -> bool:
        """Whether the decoder reads anything but tokens."""
        return bool(self._inputs.bound)

    @property
    def recurrent(self) -> bool:
        """Whether the decoder has a state that cannot be cut back."""
        return bool(self._inputs.recurrent)

    def check(self, media: Sequence[Medium], source: TokenRow | None) -> None:
        """Raises PromptError where a row lacks what the decoder cannot do without, ContextLengthError for the encoder."""
        memory = self.memory
        if memory is None:
            return
        if memory.source == "features" and not memory.entries_per_image and not media:
            raise PromptError(f"{self._path} writes about images only: give an image with the prompt.")
        if source is not None and not len(source):
            raise PromptError("the prompt is empty: there is nothing to answer.")
        if source is not None and memory.source_length is not None and len(source) > memory.source_length:
            raise ContextLengthError(
                f"the prompt has {len(source)} tokens, {source.media_tokens} of them from images; the encoder takes up to "
                f"{memory.source_length}: shorten the prompt, or send fewer or smaller images."
            )

    def key(self, media: Sequence[Medium], source: TokenRow | None) -> str:
        """What a row's memory is kept by: the contents of its media, and the encoder's prompt."""
        told = [medium.key for medium in media]
        if source is not None:
            told += [digest(source.content_ids().tobytes())]
        return "memory/" + digest("\n".join(told or [_NO_MEDIA]).encode())

    def inputs(
        self,
        media: Sequence[Medium],
        source: TokenRow | None,
        features: Mapping[str, Features],
        decoder: Decoder,
        between: Callable[[], None],
    ) -> Arrays:
        """One row's arrays for `DecoderState.bind`, without the batch dimension."""
        given = self._given(media, features)
        if self.memory is not None and self.memory.source == "encoder" and source is not None:
            between()
            given = self._encoded(source, features, decoder, given)
        if "cross_kv" in self._roles:
            between()
            if self._wants("cross_kv", MASK) and FEATURES in given:
                given[MASK] = np.ones(given[FEATURES].shape[:2], np.int64)
            made = self._run("cross_kv", given)
            source_tokens = given.get(FEATURES)
            given = {**given, **made}
            if source_tokens is not None:
                given.setdefault(FEATURES, source_tokens)
        return self._bound(given)

    def _given(self, media: Sequence[Medium], features: Mapping[str, Features]) -> Arrays:
        """The features of all media one after another, `[1, source, hidden]`, and what lies beside them.

        They go by `encoder_hidden_states`, and each modality's own by the name of its last graph's output.
        """
        memory = self.memory
        if memory is None:
            return {}
        found: Arrays = {}
        joined = [features[medium.key].values for medium in media]
        if not joined and memory.source == "features":
            # Entries of one image that no token sees.
            joined = [np.zeros((memory.entries_per_image, memory.hidden_size), np.float32)]
        if joined:
            found[FEATURES] = np.concatenate(joined)[None]
        for modality in self._contract.modalities:
            own = [features[medium.key] for medium in media if medium.kind == modality.kind]
            if own:
                found[self._graphs[modality.graphs[-1]].outputs[0].name] = np.concatenate([one.values for one in own])[None]
                for name in own[0].others.keys() & self.reads:
                    found[name] = np.concatenate([one.others[name] for one in own])
        return found

    def _encoded(self, source: TokenRow, features: Mapping[str, Features], decoder: Decoder, given: Arrays) -> Arrays:
        """Runs graph `encoder` over the prompt: its inputs by name, its output is the memory."""
        ids = source.ids[None]
        feeds: Arrays = {**given, "input_ids": ids, "attention_mask": np.ones(ids.shape, np.int64)}
        feeds["position_ids"] = np.arange(len(source), dtype=np.int64)[None]
        if self._wants("encoder", "inputs_embeds"):
            feeds["inputs_embeds"] = source.embed(decoder, 0, len(source), features)[None]
        if FEATURES in given:
            feeds[MASK] = np.ones(given[FEATURES].shape[:2], np.int64)
        made = self._run("encoder", feeds)
        if FEATURES not in made:
            raise BundleError(f"graph 'encoder' gives {', '.join(made)}, no {FEATURES}: export the bundle again.")
        return {**given, **made}

    def _bound(self, given: Mapping[str, Array]) -> Arrays:
        found: Arrays = {}
        for name, spec in self._inputs.bound.items():
            if name in given:
                array = given[name][0]
            elif name == MASK and FEATURES in given:
                array = np.ones(given[FEATURES].shape[1], np.int64)
            elif name in self._inputs.recurrent:
                array = np.zeros([int(size) for size in spec.shape[1:]], spec.dtype)
            else:
                raise BundleError(f"the decoder reads {name!r}, which no graph of {self._path} gives: export it again.")
            found[name] = np.ascontiguousarray(array, dtype=spec.dtype)
        return found

    def _wants(self, role: str, name: str) -> bool:
        return any(spec.name == name for spec in self._graphs[role].inputs)

    def _run(self, role: str, given: Mapping[str, Array]) -> Arrays:
        graph = self._engine.graph(role)
        return graph.run(wanted(role, graph.inputs, given))


class MemoryStore:
    """Keeps what `MemoryGraphs` makes, by content, within the budget of `kept`."""

    def __init__(self, graphs: MemoryGraphs, kept: ByteLRU[str, Arrays]) -> None:
        self.graphs = graphs
        self._kept = kept

    def get(self, key: str) -> Arrays | None:
        """A row's arrays, if they are still there."""
        return self._kept.get(key)

    def put(self, key: str, arrays: Arrays) -> None:
        """Keeps a row's arrays."""
        self._kept.put(key, arrays, size(arrays))


def size(arrays: Mapping[str, Array]) -> int:
    """Bytes of arrays."""
    return sum(array.nbytes for array in arrays.values())


def salt(key: str) -> int:
    """What the content ids of a row with this memory are mixed with: its entries are of no use beside another memory."""
    return number(key)
