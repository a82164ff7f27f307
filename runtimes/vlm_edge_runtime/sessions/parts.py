"""What the calls of one session share, and how it is put together from a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.decode.options import GenerationDefaults
from vlm_edge_runtime.engines.base import Decoder, Engine
from vlm_edge_runtime.engines.decoder_inputs import DecoderInputs
from vlm_edge_runtime.preprocess import ImageProcessor
from vlm_edge_runtime.text import Tokenizer

from .kv_plan import KVPlan
from .memory import MemoryGraphs, MemoryStore
from .modalities import Modalities
from .prefix_cache import PrefixCache
from .prompts import PromptBuilder
from .token_inputs import TokenInputs

ATTENTION = "attention"
"""The decoder's further output that `return_attention` gives."""
IMAGE_OPTIONS = ("guidance_scale", "generation_kwargs")
"""What `generation_config.json` of a model that writes images says of those; its text is generated without."""


@dataclass(slots=True, frozen=True)
class Parts:
    """The session's parts. `path` is the bundle's; `gives_attention`: whether the decoder has an output `attention`;

    `verifies`: whether it gives the logits of several tokens at once.
    """

    path: Path
    contract: GenerativeContract
    engine: Engine
    prompts: PromptBuilder
    modalities: Modalities
    memory: MemoryStore
    token_inputs: TokenInputs
    kept: PrefixCache
    plan: KVPlan
    defaults: GenerationDefaults
    gives_attention: bool
    verifies: bool

    @property
    def decoder(self) -> Decoder:
        """The decoder, loaded on first use."""
        return self.engine.decoder()


def assemble(
    bundle: Bundle,
    engine: Engine,
    contract: GenerativeContract,
    image_processor: Callable[[], ImageProcessor],
    *,
    plan: KVPlan,
    image_cache_bytes: int,
    prefix_cache_bytes: int | None,
    tokenizer: Tokenizer | None = None,
) -> Parts:
    """The parts of a session; no graph is loaded yet. `prefix_cache_bytes` None keeps no KV caches.

    `tokenizer`: the bundle's, where it has been read already. Raises BundleError for a bundle whose parts do not fit together.
    """
    # The portable signature: a build's decoder has inputs of its engine's besides.
    inputs = DecoderInputs("decoder", bundle.manifest.graphs["decoder"].inputs)
    memory = MemoryGraphs(bundle, engine, contract, inputs)
    modalities = Modalities(bundle, engine, contract, image_processor, budget=image_cache_bytes, keep=memory.reads)
    token_inputs = TokenInputs(contract.token_inputs, inputs.tokens)
    prompts = PromptBuilder(bundle, contract, modalities, memory, token_inputs, tokenizer)
    config = bundle.read_json("generation_config.json") if bundle.has_file("generation_config.json") else {}
    if contract.image_output is not None:
        config = {key: value for key, value in config.items() if key not in IMAGE_OPTIONS}
    return Parts(
        path=bundle.path,
        contract=contract,
        engine=engine,
        prompts=prompts,
        modalities=modalities,
        memory=MemoryStore(memory, modalities.kept),
        token_inputs=token_inputs,
        kept=PrefixCache(
            lambda batch, capacity: engine.decoder().allocate(batch, capacity),
            plan.entry_bytes,
            prefix_cache_bytes or 0,
            enabled=prefix_cache_bytes is not None and not memory.recurrent,
        ),
        plan=plan,
        defaults=GenerationDefaults(
            config, contract.eos_token_ids, contract.vocab_size, lambda text: prompts.tokenizer.encode(text, False)
        ),
        gives_attention=any(
            spec.name == ATTENTION for entry in bundle.graphs.values() if entry.role == "decoder" for spec in entry.outputs
        ),
        # A plan; recurrent state would have to be taken back with a refused draft.
        verifies=any(one.role == "decoder" and one.format == "plan" for one in bundle.graphs.values()) and not memory.recurrent,
    )
