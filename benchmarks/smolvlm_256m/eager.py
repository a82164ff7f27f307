"""transformers' eager generate, float32: `python -m benchmarks.smolvlm_256m.eager CHECKPOINT {steady|cold} TILES RUNS`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = float(os.environ.get("BENCH_BEGAN", time.time()))

from .scenario import NEW_TOKENS, PROMPT, folder_mb, median_seconds, peak_rss_mb, picture, report  # noqa: E402 (clock first)


def main(checkpoint: Path, mode: str, split: bool, runs: int) -> None:
    """Measures one scenario and prints it."""
    import torch
    from transformers import Idefics3Processor, SmolVLMForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer

    torch.set_grad_enabled(False)
    model = SmolVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = Idefics3Processor.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = None
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []
            self.prompt_seen = False

        def put(self, value: Any) -> None:
            if self.prompt_seen:
                self.times.append(time.perf_counter())
            self.prompt_seen = True

        def end(self) -> None:
            pass

    def inputs() -> Any:
        return processor(images=[picture()], text=text, images_kwargs={"do_image_splitting": split}, return_tensors="pt")

    def answer(new_tokens: int) -> tuple[float, float]:
        clock = Clock()
        began = time.perf_counter()
        model.generate(**inputs(), max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        rest = clock.times[-1] - clock.times[0]
        return clock.times[0] - began, (len(clock.times) - 1) / rest if rest else 0.0

    if mode == "cold":
        answer(1)
        report(cold_s=time.time() - BEGAN)
        return
    sample = inputs()
    vision = {key: sample[key] for key in ("pixel_values", "pixel_attention_mask") if key in sample}
    tiles = sample["pixel_values"].shape[1]
    vision_s = median_seconds(lambda: model.model.get_image_features(**vision), runs)
    answer(2)
    ttfts, rates = zip(*(answer(NEW_TOKENS) for _ in range(runs)), strict=True)
    report(
        tiles=tiles,
        prompt_tokens=sample["input_ids"].shape[1],
        vision_ms_per_tile=1e3 * vision_s / tiles,
        ttft_s=sorted(ttfts)[len(ttfts) // 2],
        decode_tps=sorted(rates)[len(rates) // 2],
        rss_mb=peak_rss_mb(),
        size_mb=folder_mb(checkpoint / "model.safetensors"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "split", int(sys.argv[4]))
