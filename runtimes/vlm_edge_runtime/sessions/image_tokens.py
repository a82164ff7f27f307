"""Writing an image, token by token, under guidance; see `CodebookOutput` for what the graphs give and take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.image_output import CodebookOutput
from vlm_edge_runtime.decode.option_values import MAX_SEED, any_seed, integer, number
from vlm_edge_runtime.engines.base import Engine, SamplingParams
from vlm_edge_runtime.errors import CapabilityError, ContextLengthError, OptionError
from vlm_edge_runtime.text import Message, position_ids

from .inputs import Given
from .parts import Parts

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class ImageKeywords(TypedDict, total=False):
    """How an image is written.

    `guidance_scale`: how far it is led away from what no prompt would give; 1 runs no unconditional prompt, None is the
    checkpoint's own. `temperature`: 0 takes the likeliest code each time; 1 by default. `top_k`, `top_p`: 0 and 1 are off.
    `seed`: 0 … 2⁶⁴ − 1; None draws a fresh one.
    """

    guidance_scale: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None


@dataclass(slots=True, frozen=True)
class GeneratedImage:
    """An image that the model wrote: as a picture, and the codes it was made from, in reading order.

    `seed` is what reproduces it.
    """

    image: Image.Image
    codes: list[int]
    seed: int


def guided(conditional: Floats, unconditional: Floats, scale: float) -> Floats:
    """Guidance of logits as they are (Parti, arXiv 2206.10789, section 3.2): unconditional + scale · (conditional − …)."""
    return np.asarray(unconditional + (conditional - unconditional) * np.float32(scale), np.float32)


def image_prompt(parts: Parts, prompt: str | Sequence[Message], raw: bool) -> Ids:
    """The prompt's tokens, and the token that an image begins with. Raises CapabilityError, PromptError."""
    output = _output(parts)
    nothing: Given = {}
    row = parts.prompts.row(prompt, nothing, raw=raw)
    return np.append(row.tokens.ids, np.int64(output.begin_token))


def write_image(parts: Parts, ids: Ids, between: Callable[[int], None], options: ImageKeywords) -> GeneratedImage:
    """One image after the tokens `ids`. `between(codes so far)` is called before each step and may raise to stop.

    Raises ContextLengthError where prompt and image do not fit, OptionError, DeviceError.
    """
    output = _output(parts)
    if unknown := set(options) - set(ImageKeywords.__annotations__):
        known = ", ".join(sorted(ImageKeywords.__annotations__))
        raise OptionError(f"unknown image option {', '.join(map(repr, sorted(unknown)))}; known are: {known}.")
    given = {key: value for key, value in options.items() if value is not None}
    scale = number("guidance_scale", given.get("guidance_scale", output.guidance_scale), 0.0)
    seed = integer("seed", given.get("seed", any_seed()), 0, MAX_SEED)
    sampling = SamplingParams(
        temperature=number("temperature", given.get("temperature", 1.0), 0.0),
        top_k=min(integer("top_k", given.get("top_k", 0), 0), output.codes),
        top_p=number("top_p", given.get("top_p", 1.0), 0.0, 1.0, open_low=True),
        seed=seed,
    )
    sampler = _native.Sampler(output.codes, sampling)
    total = len(ids) + output.tokens
    if total > parts.plan.context_length:
        raise ContextLengthError(
            f"the prompt has {len(ids)} tokens and an image {output.tokens}; the context holds {parts.plan.context_length}: "
            "shorten the prompt."
        )
    prompts = [ids]
    if scale != 1:
        prompts.append(np.where(np.isin(ids, output.kept_tokens), ids, output.blank_token))
    decoder, engine = parts.decoder, parts.engine
    head, embed = engine.graph("image_head"), engine.graph("image_embed")
    positions, following = position_ids(parts.contract.positions, ids)
    state = decoder.allocate(len(prompts), total)
    codes: list[int] = []
    try:
        between(0)
        for row, each in enumerate(prompts):
            state.prefill(row, decoder.embed(each), positions)
        while True:
            hidden = np.stack([state.outputs(row)["hidden_states"] for row in range(len(prompts))])
            logits = np.asarray(head.run({"hidden_states": hidden[:, None]})["image_logits"][:, -1], np.float32)
            scores = guided(logits[0], logits[1], scale) if len(prompts) > 1 else logits[0]
            codes.append(sampler.choose(np.ascontiguousarray(scores))[0])
            if len(codes) == output.tokens:
                break
            between(len(codes))
            embeds = np.asarray(embed.run({"image_codes": np.array([[codes[-1]]], np.int64)})["inputs_embeds"][0], np.float32)
            position = np.array([following + len(codes) - 1], np.int64)
            for row in range(len(prompts)):
                state.prefill(row, embeds, position)
    finally:
        state.close()
    return GeneratedImage(to_picture(pixels_of(engine, codes), output), codes, seed)


def pixels_of(engine: Engine, codes: Sequence[int]) -> Floats:
    """What graph `image_detokenizer` makes of an image's codes: float32 `[3, height, width]`."""
    found = engine.graph("image_detokenizer").run({"image_codes": np.asarray([codes], np.int64)})
    return np.asarray(found["pixels"][0], np.float32)


def to_picture(pixels: Floats, output: CodebookOutput) -> Image.Image:
    """Channels between 0 and 255, cut off to whole numbers as transformers' processor does."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (output.mean, output.std))
    levels = np.clip((pixels * std + mean) * np.float32(255), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def _output(parts: Parts) -> CodebookOutput:
    if parts.contract.image_output is None:
        raise CapabilityError(f"{parts.path} writes text only: its model has no image output.")
    return parts.contract.image_output
