"""Training batches: scenes and easy-vqa as token ids, masks, pixels and per-cell targets.

Several conversations about one image share its (expensive) prefix: they are packed into one sequence behind the image, each
starting at the prefix's position and seeing the prefix and itself but not its neighbours. This equals training on them one
by one.
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from benchmarks.train import easyvqa, models, scenes

IGNORED = -100
KINDS = (*scenes.SHAPES, "digit", "rectangle")
Turns = list[tuple[str, str]]


@dataclass(slots=True)
class Batch:
    """One training step of a generating model; B sequences of L tokens with n image tokens each.

    ``targets`` are int64 (B, n) class numbers of what each image token shows: shape, colour and digit (0: nothing there) and
    its place on the grid; -100 is ignored.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention: Tensor
    """bool (B, 1, L, L), true where a query may look."""
    pixel_values: Tensor
    targets: dict[str, Tensor]

    def to(self, device: str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.position_ids.to(device),
            self.attention.to(device),
            self.pixel_values.to(device),
            {key: value.to(device) for key, value in self.targets.items()},
        )


class Encoder:
    """Turns conversations and images into what the saved processor would make of them, only faster."""

    def __init__(self, name: models.Name, processor: Any) -> None:
        self.name, self.processor = name, processor
        self._known: dict[str, list[int]] = {}
        images = processor.image_processor
        self._mean = np.asarray(images.image_mean, np.float32).reshape(3, 1, 1)
        self._std = np.asarray(images.image_std, np.float32).reshape(3, 1, 1)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of ``text`` without added special tokens."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def image_text(self, columns: int, rows: int) -> str:
        """Return the placeholder of an image of ``columns`` x ``rows`` cells, expanded as the processor does."""
        if self.name == "llava":
            return "<image>" * (columns * rows)
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        tokens = ("<fake_token_around_image>", "<image>", "<global-img>")
        return str(get_image_prompt_string(rows // 2, columns // 2, self.processor.image_seq_len, *tokens))

    def conversation(self, image: str, turns: Turns, text_first: bool = False) -> tuple[str, list[str]]:
        """Return the prefix that all conversations on an image share, and the rest as question, answer, question, ..."""
        (question, answer), *later = turns
        if self.name == "llava":
            prefix, pieces = f"<s>USER: {image}\n", [f"{question} ASSISTANT:", f" {answer}</s>"]
            for question, answer in later:
                pieces += [f"USER: {question} ASSISTANT:", f" {answer}</s>"]
            return prefix, pieces
        end, answers = "<end_of_utterance>", "<end_of_utterance>\nAssistant:"
        if text_first:
            prefix, pieces = "", [f"<|im_start|>User: {question}{image}{answers}", f" {answer}{end}"]
        else:
            prefix, pieces = f"<|im_start|>User:{image}", [f"{question}{answers}", f" {answer}{end}"]
        for question, answer in later:
            pieces += [f"\nUser: {question}{answers}", f" {answer}{end}"]
        return prefix, pieces

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return float32 (3, 64, 64) for LLaVA and CLIP, (tiles + 1, 3, 64, 64) for SmolVLM."""
        if self.name != "smolvlm":
            return self._normalise(image)
        edge = models.TILE
        corners = [(x, y) for y in range(0, image.height, edge) for x in range(0, image.width, edge)]
        tiles = [image.crop((x, y, x + edge, y + edge)) for x, y in corners]
        tiles.append(image.resize((edge, edge), Image.Resampling.LANCZOS))
        return np.stack([self._normalise(tile) for tile in tiles])

    def _normalise(self, image: Image.Image) -> np.ndarray:
        values = np.asarray(image, np.float32).transpose(2, 0, 1) * np.float32(1 / 255)
        return (values - self._mean) / self._std

    def cells(self, columns: int, rows: int) -> list[int]:
        """Return the cell number (row * columns + column) that each image token shows, -1 for the global view's."""
        if self.name != "smolvlm":
            return list(range(columns * rows))
        order = [
            (2 * tile_row + row) * columns + 2 * tile_column + column
            for tile_row in range(rows // 2)
            for tile_column in range(columns // 2)
            for row in range(2)
            for column in range(2)
        ]
        return order + [-1] * self.processor.image_seq_len

    def check(self) -> None:
        """Raise ``AssertionError`` unless ids and pixels equal those of the processor itself."""
        for example in scenes.held_out_examples(16, 1, "smolvlm" if self.name == "smolvlm" else "llava"):
            grid = example.image.width // self.cell, example.image.height // self.cell
            turns = [(example.prompt, example.answer), ("is there a digit?", "no")]
            messages = []
            for i, (question, answer) in enumerate(turns):
                content = [{"type": "text", "text": question}]
                messages.append({"role": "user", "content": [{"type": "image"}, *content] if i == 0 else content})
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            text = self.processor.apply_chat_template(messages)
            if self.name == "llava":
                text = text.removeprefix("<s>")
            real = self.processor(text=text, images=example.image, return_tensors="np")
            prefix, pieces = self.conversation(self.image_text(*grid), turns)
            ours = [token for piece in (prefix, *pieces) for token in self.ids(piece)]
            assert list(real["input_ids"][0])[: len(ours)] == ours, (text, prefix, pieces)
            assert np.abs(real["pixel_values"][0] - self.pixels(example.image)).max() < 1e-5

    @property
    def cell(self) -> int:
        """Edge of a grid cell in pixels."""
        return scenes.SMOLVLM_CELL if self.name == "smolvlm" else scenes.LLAVA_CELL


def cell_targets(scene: scenes.Scene, order: list[int]) -> dict[str, list[int]]:
    """Return class numbers of shape, colour and digit for the image tokens that show the cells in ``order``."""
    shape, colour, digit = {}, {}, {}
    names = tuple(scenes.COLOURS)
    for thing in scene.things:
        at = thing.row * scene.columns + thing.column
        shape[at] = KINDS.index(thing.shape) + 1
        colour[at] = names.index(thing.colour) + 1 if thing.colour else 0
        digit[at] = thing.digit + 1
    look = {"shape": shape, "colour": colour, "digit": digit}
    targets = {key: [IGNORED if at < 0 else found.get(at, 0) for at in order] for key, found in look.items()}
    return targets | {"place": [IGNORED if at < 0 else at for at in order]}


def easy_targets(image: Image.Image, pairs: Turns, cell: int) -> dict[str, list[int]]:
    """Return the same for an easy-vqa image: its one shape covers some cells, others only in part (ignored)."""
    answers = {answer for _, answer in pairs}
    shape = next((i for i, name in enumerate(KINDS, 1) if name in answers), IGNORED)
    colour = next((i for i, name in enumerate(scenes.COLOURS, 1) if name in answers), IGNORED)
    values = np.asarray(image, np.int16)
    inked = (np.abs(values - np.array(_paper(image))).max(-1) > 8).reshape(image.height // cell, cell, image.width // cell, cell)
    covered = inked.mean((1, 3)).flatten()
    targets = {
        key: [0 if part == 0 else number if part > 0.25 else IGNORED for part in covered]
        for key, number in (("shape", shape), ("colour", colour))
    }
    return targets | {"digit": [0] * len(covered), "place": list(range(len(covered)))}


def _paper(image: Image.Image) -> Any:
    """Return the background of an easy-vqa image: its most frequent colour."""
    colours: Any = image.getcolors(image.width * image.height)
    return max(colours, key=lambda found: found[0])[1]


def moved(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return an easy-vqa image flipped and shifted at random, its shape still whole and on the same paper."""
    for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        if rng.random() < 0.5:
            image = image.transpose(flip)
    paper = _paper(image)
    box = ImageChops.difference(image, Image.new("RGB", image.size, paper)).getbbox()
    if box is None:
        return image
    fresh = Image.new("RGB", image.size, paper)
    room = image.width - (box[2] - box[0]), image.height - (box[3] - box[1])
    fresh.paste(image.crop(box), (rng.randint(0, room[0]), rng.randint(0, room[1])))
    return fresh


class Stream:
    """An endless, seeded stream of batches for LLaVA (scenes and easy-vqa) or SmolVLM (scenes)."""

    def __init__(self, encoder: Encoder, seed: int, size: int, talks: int) -> None:
        self.encoder, self.size, self.talks = encoder, size, talks
        self.rng = random.Random(f"train-{encoder.name}-{seed}")
        self._published = easyvqa.by_image("train") if encoder.name == "llava" else {}

    def next(self) -> Batch:
        """Return the next batch; its images all have one size."""
        rng = self.rng
        columns, rows, text_first = 4, 4, False
        if self.encoder.name == "smolvlm":
            columns, rows = rng.choices(((4, 4), (4, 2), (2, 4)), (0.7, 0.15, 0.15))[0]
            text_first = rng.random() < 0.1
        order = self.encoder.cells(columns, rows)
        placeholder = self.encoder.image_text(columns, rows)
        sequences, pixels, targets = [], [], []
        for i in range(self.size):
            if self._published and i % 3 == 0:
                image, talks, target = self._easy()
            else:
                image, talks, target = self._scene(columns, rows, order, 1 if text_first else self.talks)
            pixels.append(self.encoder.pixels(image))
            targets.append(target)
            sequences.append([self.encoder.conversation(placeholder, turns, text_first) for turns in talks])
        stacked = {key: torch.tensor([target[key] for target in targets]) for key in targets[0]}
        return Batch(*self._pack(sequences), torch.from_numpy(np.stack(pixels)), stacked)

    def _scene(self, columns: int, rows: int, order: list[int], talks: int) -> tuple[Image.Image, list[Turns], dict[str, Any]]:
        rng = self.rng
        scene = scenes.sample(rng, "train", columns, rows)
        caption = (rng.choice(scenes.DESCRIBE), scene.caption)
        asked = scenes.questions(scene, rng, "train")
        rng.shuffle(asked)
        if rng.random() < 0.5:  # relations take longest to learn
            asked.sort(key=lambda pair: not pair[0].startswith("where is"))
        told: list[Turns] = [[caption], *([pair] for pair in asked[: talks - 1])]
        if talks == 1 and rng.random() < 0.6:
            told = [[asked[0]]]
        if rng.random() < 0.25:  # a second turn
            told[-1].append(rng.choice([pair for pair in (caption, *asked) if pair not in told[-1]]))
        return scene.render(self.encoder.cell), told, cell_targets(scene, order)

    def _easy(self) -> tuple[Image.Image, list[Turns], dict[str, Any]]:
        rng = self.rng
        number = rng.randrange(len(self._published))
        pairs = self._published[number]
        image = moved(easyvqa.image("train", number), rng)
        talks = [[pair] for pair in rng.sample(pairs, min(5, len(pairs)))]
        return image, talks, easy_targets(image, pairs, self.encoder.cell)

    def _pack(self, sequences: list[list[tuple[str, list[str]]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lay the conversations on each image behind its prefix; see the module's text."""
        rows = []
        for talks in sequences:
            prefix = self.encoder.ids(talks[0][0]) if talks[0][0] else []
            ids, labels = list(prefix), [IGNORED] * len(prefix)
            positions, part = list(range(len(prefix))), [0] * len(prefix)
            for number, (_, pieces) in enumerate(talks, 1):
                start = len(ids)
                for i, piece in enumerate(pieces):
                    tokens = self.encoder.ids(piece)
                    ids += tokens
                    labels += tokens if i % 2 else [IGNORED] * len(tokens)
                positions += range(len(prefix), len(prefix) + len(ids) - start)
                part += [number] * (len(ids) - start)
            rows.append((ids, labels, positions, part))
        length = max(len(row[0]) for row in rows)
        fills = (self.encoder.processor.tokenizer.pad_token_id, IGNORED, 0, -1)
        arrays = [np.full((len(rows), length), fill) for fill in fills]
        for i, row in enumerate(rows):
            for array, values in zip(arrays, row, strict=True):
                array[i, : len(values)] = values
        ids_, labels_, positions_, part_ = (torch.from_numpy(array) for array in arrays)
        query, key = part_[:, :, None], part_[:, None, :]
        seen = ((query == key) | (key == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        return ids_, labels_, positions_, seen[:, None]
