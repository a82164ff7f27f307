"""transformers on the same shape with random weights in half precision: eager, and torch.compile with a static cache."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .models import SHAPES, config_of


def measured(
    known: str, device: str, prompt_tokens: int, new_tokens: int, runs: int, compiled: bool = False, backend: str = "inductor"
) -> dict[str, Any]:
    """Medians over `runs` of one tile and a prompt of `prompt_tokens`. The pixels are given: no image preprocessing is counted.

    `known`: the JSON file beside the hollow bundle. The time of a token is what an answer of `new_tokens` takes longer than one
    of a single token, by its number of further tokens.
    """
    import torch
    from transformers import SmolVLMForConditionalGeneration

    torch.set_grad_enabled(False)
    facts = json.loads(Path(known).read_text())
    shape, special = SHAPES[facts["shape"]], facts["special"]
    dtype = torch.float16 if device == "cuda" else torch.float32
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = SmolVLMForConditionalGeneration(config_of(shape, special)).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": special["pad_token_id"]}
    if compiled:
        model.forward = torch.compile(model.forward, mode=None if backend != "inductor" else "reduce-overhead", backend=backend)
        options |= {"cache_implementation": "static", "disable_compile": True}  # compiled above, once
    given = _inputs(
        torch, shape.image_tokens, shape.vision["image_size"], special, shape.vocabulary, prompt_tokens, device, dtype
    )

    def answer(tokens: int) -> None:
        model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, **options)

    pixels = {name: given[name] for name in ("pixel_values", "pixel_attention_mask")}
    loaded = time.perf_counter() - began
    first = _seconds(torch, device, lambda: answer(new_tokens))
    vision = [_seconds(torch, device, lambda: model.model.get_image_features(**pixels)) for _ in range(runs + 1)][1:]
    answer(1)
    pairs = [
        (_seconds(torch, device, lambda: answer(1)), _seconds(torch, device, lambda: answer(new_tokens))) for _ in range(runs)
    ]
    ttft = statistics.median(one for one, _ in pairs)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_s": ttft,
        "preprocess_s": 0.0,
        "vision_s": statistics.median(vision),
        "prefill_s": ttft - statistics.median(vision),
        "tpot_s": statistics.median((many - one) / (new_tokens - 1) for one, many in pairs),
        "load_s": loaded,
        "first_s": first,
        "dtype": str(dtype),
        "runs": runs,
    }


def _inputs(
    torch: Any, image_tokens: int, size: int, special: dict[str, int], vocabulary: int, tokens: int, device: str, dtype: Any
) -> dict[str, Any]:
    """One tile's tokens in front of random text."""
    text = torch.randint(5, vocabulary // 2, (1, tokens - image_tokens))
    image = torch.full((1, image_tokens), special["image_token_id"])
    ids = torch.cat([image, text], dim=1).to(device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, 3, size, size, device=device, dtype=dtype),
        "pixel_attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool, device=device),
    }


def _seconds(torch: Any, device: str, work: Callable[[], Any]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
