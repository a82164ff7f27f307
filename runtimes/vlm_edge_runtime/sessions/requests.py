"""From a call's arguments to a run: everything that can be refused is refused here, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm_edge_runtime.decode.cancel import CancelLike
from vlm_edge_runtime.decode.options import GenerationOptions
from vlm_edge_runtime.errors import CapabilityError, ContextLengthError, OptionError, PromptError
from vlm_edge_runtime.text import Message

from .inputs import Given
from .parts import Parts
from .prompts import PromptRow
from .run import Run


def open_run(
    parts: Parts,
    rows: Sequence[tuple[str | Sequence[Message], Given]],
    raw: bool,
    cancel: CancelLike | None,
    began: float,
    options: Mapping[str, Any],
    return_attention: bool,
) -> Run:
    """A run of a batch of prompts with their inputs. Raises what `VisionLanguageModel.generate` names."""
    if return_attention and not parts.gives_attention:
        raise CapabilityError(f"{parts.path}: the decoder's graph has no output 'attention' to return.")
    resolved = parts.defaults.resolve(len(rows), options)
    if return_attention and (resolved.beams is not None or resolved.in_python):
        raise OptionError("return_attention does not go with beams, guidance or the rarer filters: leave one of them out.")
    resolved = _with_lookup(parts, resolved, return_attention)
    if resolved.controls.guided and parts.contract.memory is not None:
        raise OptionError(
            f"guidance_scale={resolved.controls.guidance_scale:g}: {parts.path} reads images by cross-attention, for which "
            "there is no unconditional side: leave it out."
        )
    prompts = [parts.prompts.row(prompt, given, raw=raw) for prompt, given in rows]
    _check_memories(parts, prompts)
    for number, prompt in enumerate(prompts):
        _check_length(parts, prompt, resolved, f"prompt {number + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt")
    return Run(parts, prompts, resolved, began=began, cancel=cancel, return_attention=return_attention)


def _with_lookup(parts: Parts, options: GenerationOptions, return_attention: bool) -> GenerationOptions:
    """Speculation where it can be had; refused otherwise when the caller asks for it."""
    if options.lookup is None or (parts.verifies and not return_attention):
        return options
    if not options.lookup.asked:
        return replace(options, lookup=None)
    asked = f"prompt_lookup_num_tokens={options.lookup.num_tokens}"
    if return_attention:
        raise OptionError(f"{asked} does not go with return_attention: leave one of them out.")
    raise CapabilityError(
        f"{asked}: the decoder loaded from {parts.path} gives the logits of the last token only, with which drafts cannot be "
        f"checked; load a build whose decoder runs on native kernels (`vlm-edge build {parts.path} --target cpu-int4` makes one "
        "where the decoder has them), or leave it out."
    )


def _check_memories(parts: Parts, prompts: Sequence[PromptRow]) -> None:
    """Without a mask over it, every row's memory has one length."""
    memory = parts.contract.memory
    counts = {len(prompt.memory_media) for prompt in prompts}
    if memory is not None and memory.source == "features" and memory.mask == "none" and len(counts) > 1:
        raise PromptError(
            f"the prompts of one batch have {min(counts)} to {max(counts)} images, and {parts.path} reads equally many for "
            "all: ask them one by one."
        )


def _check_length(parts: Parts, prompt: PromptRow, options: GenerationOptions, which: str) -> None:
    length, room, model = len(prompt), parts.plan.context_length, parts.contract.context_length
    tokens = len(prompt.history)
    new_tokens = options.new_tokens(tokens, room, length - tokens)
    if new_tokens >= 1 and length + new_tokens <= room:
        return
    images, image_tokens = len(prompt.tokens.media), prompt.tokens.media_tokens
    of_these = f", {image_tokens} of them from {images} image{'s' * (images > 1)}" if image_tokens else ""
    larger = f", or load the bundle with a context_length of up to {model}" if room < model else ""
    raise ContextLengthError(
        f"{which} has {length} tokens{of_these}, and {max(new_tokens, 1)} new ones were asked for: that is "
        f"{length + max(new_tokens, 1)}, the context has {room}. Ask for fewer new tokens (max_new_tokens), shorten the "
        f"prompt, or send fewer or smaller images{larger}."
    )
