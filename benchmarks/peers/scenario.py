"""The prompts and the picture that every contender gets, and the jobs that the workers read."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .environments import PEERS
from .models import Model
from .worker import Job

TILES = {1: "one tile", 17: "split as SmolVLM does by default"}
_WORD = re.compile(r"^[Ġ▁]([a-z]{3,9})$")


def words(tokenizer: Any) -> list[str]:
    """Words that are one token each after a space, wherever they stand."""
    candidates = sorted({found.group(1) for token in tokenizer.get_vocab() if (found := _WORD.match(token))})
    kept = [word for word in candidates if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1]
    if len(kept) < 16:
        raise ValueError(f"the tokenizer has {len(kept)} words of one token; prompts of exact length need 16")
    return kept


class Prompts:
    """Texts of an exact number of tokens, each different. `session`: the bundle whose tokenizer and image rules count."""

    def __init__(self, session: Any, tokenizer: Any) -> None:
        self.session, self.words, self.random = session, words(tokenizer), random.Random(0)
        self.extra = len(self.ids(f" {self.words[0]}")) - 1

    def ids(self, text: str, image: Any = None) -> list[int]:
        """The tokens that the decoder sees, those of the image among them."""
        found = self.session.prepare(text, None if image is None else [image], raw=True)
        return [int(token) for token in found.decoder_ids]

    def text(self, tokens: int) -> dict[str, Any]:
        """A text prompt of `tokens` tokens, a start token included where the tokenizer adds one."""
        text = "".join(f" {word}" for word in self.random.choices(self.words, k=tokens - self.extra))
        ids = self.ids(text)
        if len(ids) != tokens:
            raise ValueError(f"a prompt of {tokens} tokens came out with {len(ids)}")
        return {"text": text, "ids": ids}

    def turn(self, tokens: int) -> dict[str, Any]:
        """What a second turn adds: `tokens` tokens, no start token."""
        text = "".join(f" {word}" for word in self.random.choices(self.words, k=tokens))
        return {"text": text, "ids": self.ids(text)[self.extra :]}

    def image(self, placeholder: str, image: Any, others: int) -> dict[str, Any]:
        """A prompt of an image and `others` tokens around it, the image's frame among them."""
        token = self.session.manifest.contract.modality("image").token_id
        count = len([one for one in self.ids(placeholder, image) if one != token])
        text = placeholder + "".join(f" {word}" for word in self.random.choices(self.words, k=max(others - count, 1)))
        ids = self.ids(text, image)
        return {"text": text, "ids": ids, "token_id": token}


def picture(side: int) -> Any:
    """A fixed square RGB picture: smooth colours, so that no decoder or resizer is favoured."""
    from PIL import Image

    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / (side - 1)
    waves = [np.sin(6 * x + 2 * y), np.cos(5 * y - x), np.sin(9 * x * y)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def make_job(model: Model, bundle: Path, build: str, tiles: int, runs: int, threads: int, short: bool, derived: Job) -> Job:
    """Writes the picture and its arrays into the model's folder; everything that all workers share. ValueError: see `Prompts`."""
    from tokenizers import Tokenizer

    from vlm_edge_runtime import load

    options = dict(model.one_tile or {}) if tiles == 1 else None
    image = picture(model.side)
    folder = model.folder / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / "picture.png")
    (folder / "picture.rgb").write_bytes(image.tobytes())
    kind = model.model_type
    counts = dict(zip(("short", "long", "longest"), model.lengths, strict=True))
    repeats = {"short": runs, "long": 1, "longest": 1 if short else min(runs, 2)}
    with load(bundle, build=build, threads=threads, image_options=options) as opened:
        session: Any = opened
        prompts = Prompts(session, Tokenizer.from_file(str(bundle / "tokenizer.json")))
        shown = prompts.image(model.placeholder, image, model.other_tokens)
        arrays = {
            name: np.asarray(value) for name, value in session.prepare(shown["text"], [image], raw=True).inputs[0].arrays.items()
        }
        turn = prompts.turn(model.other_tokens)
        texts = {name: [prompts.text(count) for _ in range(repeats[name])] for name, count in counts.items()}
    if kind == "smolvlm":
        arrays = as_batch(arrays)
    np.savez(folder / f"arrays-{tiles}.npz", **arrays)  # type: ignore[arg-type]
    seen = hashlib.sha256(image.tobytes())
    for name in sorted(arrays):
        seen.update(np.ascontiguousarray(arrays[name]).data)
    return {
        **derived,
        "model_type": kind,
        "checkpoint": str(model.checkpoint),
        "checkpoint_files": [
            str(file) for file in sorted(model.checkpoint.iterdir()) if file.suffix in (".safetensors", ".json")
        ],
        "folder": str(model.folder),
        "bundle": str(bundle),
        "image_options": options,
        "threads": threads,
        "runs": runs,
        "quick": short,
        "tiles": tiles,
        "splits": model.one_tile is not None,
        "tile_shape": list(arrays["pixel_values"].shape[-3:]),
        "new_tokens": 16 if short and model.new_tokens > 16 else model.new_tokens,
        "pre_tokenizer": "qwen2" if kind == "qwen2_vl" else "smollm",
        "python": sys.executable,
        "image": shown
        | {"picture": str(folder / "picture.png"), "raw": str(folder / "picture.rgb"), "size": list(image.size)}
        | {"arrays": str(folder / f"arrays-{tiles}.npz")},
        "inputs": seen.hexdigest()[:16],
        "turn": turn,
        "texts": texts,
    }


def identity(job: Job) -> str:
    """What all contenders share of a job, as a short hash: prompts, picture, lengths; not whose job it is."""
    shared = {name: value for name, value in job.items() if name not in ("variant", "environment", "python", "quick")}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def as_batch(arrays: dict[str, Any]) -> dict[str, Any]:
    """SmolVLM's arrays as transformers takes them: `pixel_values` [1, tiles, 3, height, width], all of their pixels valid."""
    pixels = arrays["pixel_values"].reshape(1, -1, *arrays["pixel_values"].shape[-3:]).astype(np.float32)
    return {"pixel_values": pixels, "pixel_attention_mask": np.ones((1, pixels.shape[1], *pixels.shape[-2:]), bool)}


def job_path(peer: str, variant: str, tiles: int, model: Model) -> Path:
    """Where a contender's job is."""
    return model.folder / "jobs" / f"{peer}-{variant}-{tiles}.json"


def write_job(job: Job, peer: str, variant: str, model: Model) -> Path:
    """The job of one contender as a file."""
    own: Job = {**job, "variant": variant, "environment": str(PEERS / peer)}
    path = job_path(peer, variant, job["tiles"], model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own))
    return path
