"""Rendered scenes with captions and questions: a small visual world with a held-out part.

A scene stands on a grid of cells (4 x 4, 4 x 2 or 2 x 4). It shows one thing, two things in a relation, two to four equal
things to count, or a handwritten digit (8 x 8 pixels of scikit-learn's ``load_digits``, so some pixels are real). All
randomness comes from the ``random.Random`` that is passed in, and nothing here needs torch.

Held out for testing, and never seen in training, neither drawn nor named:

- four (colour, shape) pairs, one per shape, each colour at most once (:data:`HELD_OUT_PAIRS`);
- one in eight of the (thing, relation, thing) and (number, colour, shape) compositions, chosen by CRC-32 of their caption;
- one in six of the digit images.
"""

from __future__ import annotations

import functools
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "test"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "red": (230, 20, 20),
    "green": (20, 190, 40),
    "blue": (30, 40, 235),
    "yellow": (245, 235, 20),
    "teal": (10, 140, 140),
    "brown": (150, 75, 10),
}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("zero", "one", "two", "three", "four")
HELD_OUT_PAIRS = frozenset({("teal", "circle"), ("black", "square"), ("yellow", "triangle"), ("red", "star")})
OPPOSITE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
SIDE = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
DESCRIBE = ("describe the image.", "describe the picture.", "what do you see?")

LLAVA_CELL, SMOLVLM_CELL = 16, 32
"""Edge of one grid cell in pixels: a 4 x 4 scene is 64 x 64 for LLaVA and CLIP, 128 x 128 for SmolVLM."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. ``dx``, ``dy`` (shift from the cell's centre) and ``radius`` are in 1/16 of a cell's edge."""

    shape: str
    colour: str
    column: int
    row: int
    dx: int = 0
    dy: int = 0
    radius: int = 6
    digit_image: int = -1

    @property
    def digit(self) -> int:
        """The digit 0..9 that is shown, or -1 for a drawn shape."""
        return int(_digits()[1][self.digit_image]) if self.digit_image >= 0 else -1

    @property
    def name(self) -> str:
        """Noun phrase without article: ``red circle`` or ``digit 7``."""
        return f"digit {self.digit}" if self.digit_image >= 0 else f"{self.colour} {self.shape}"

    @property
    def phrase(self) -> str:
        """Noun phrase with article: ``a red circle`` or ``the digit 7``."""
        return ("the " if self.digit_image >= 0 else "a ") + self.name


@dataclass(frozen=True, slots=True)
class Scene:
    """Things on a grid of ``columns`` x ``rows`` cells; a relation scene lists the left or upper thing first."""

    things: tuple[Thing, ...]
    columns: int
    rows: int
    background: tuple[int, int, int]
    relation: str = ""

    @property
    def counted(self) -> bool:
        """Whether this is a scene of several equal things."""
        return len(self.things) > 1 and not self.relation

    @property
    def caption(self) -> str:
        """The one true description, e.g. ``a red circle left of a blue star``, ``three gray squares``, ``the digit 7``."""
        first = self.things[0]
        if self.relation:
            return f"{first.phrase} {self.relation} {self.things[1].phrase}"
        return f"{NUMBERS[len(self.things)]} {first.name}s" if self.counted else first.phrase

    @property
    def held_out(self) -> bool:
        """Whether this composition is reserved for testing (see the module's text)."""
        if any((t.colour, t.shape) in HELD_OUT_PAIRS for t in self.things):
            return True
        return len(self.things) > 1 and zlib.crc32(self.caption.encode()) % 8 == 0

    def render(self, cell: int = LLAVA_CELL) -> Image.Image:
        """Draw the scene in RGB, ``columns * cell`` wide and ``rows * cell`` high, in pixels."""
        image = Image.new("RGB", (self.columns * cell, self.rows * cell), self.background)
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            if thing.digit_image >= 0:
                _paste_digit(image, thing, cell)
            else:
                _draw_shape(draw, thing, cell)
        return image


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one image and its only right answer."""

    image: Image.Image
    prompt: str
    answer: str


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return ink 0..1 as (1797, 8, 8) float and labels (1797,) of the UCI handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16.0, data.target


@functools.cache
def _digit_ids(split: Split) -> tuple[int, ...]:
    return tuple(i for i in range(len(_digits()[1])) if (i % 6 == 5) == (split == "test"))


def _paste_digit(image: Image.Image, thing: Thing, cell: int) -> None:
    ink = Image.fromarray((_digits()[0][thing.digit_image] * 255).astype(np.uint8), mode="L")
    mask = ink.resize((cell, cell), Image.Resampling.NEAREST)
    image.paste((0, 0, 0), (thing.column * cell, thing.row * cell), mask)


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, cell: int) -> None:
    unit = cell / 16
    x, y = (thing.column * 16 + 8 + thing.dx) * unit, (thing.row * 16 + 8 + thing.dy) * unit
    r = thing.radius * unit
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif thing.shape == "square":
        draw.rectangle([x - r, y - r, x + r, y + r], fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        points = []
        for k in range(10):
            length, angle = (r * 1.15 if k % 2 == 0 else r * 0.45), -math.pi / 2 + k * math.pi / 5
            points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        draw.polygon(points, fill=fill)


def _thing(rng: random.Random, split: Split, place: tuple[int, int], digits: float) -> Thing:
    column, row = place
    if rng.random() < digits:
        return Thing("digit", "", column, row, digit_image=rng.choice(_digit_ids(split)))
    radius = rng.randint(5, 7)
    slack = min(2, 8 - radius)
    dx, dy = rng.randint(-slack, slack), rng.randint(-slack, slack)
    return Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), column, row, dx, dy, radius)


def _any_scene(rng: random.Random, split: Split, columns: int, rows: int) -> Scene:
    places = [(c, r) for r in range(rows) for c in range(columns)]
    background = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
    kind = rng.random()
    if kind < 0.2:
        return Scene((_thing(rng, split, rng.choice(places), 0.4),), columns, rows, background)
    if kind < 0.4:
        chosen = sorted(rng.sample(places, rng.randint(2, 4)), key=lambda p: (p[1], p[0]))
        first = _thing(rng, split, chosen[0], 0.0)
        equal = [_thing(rng, split, p, 0.0) for p in chosen]
        things = tuple(Thing(first.shape, first.colour, t.column, t.row, t.dx, t.dy, t.radius) for t in equal)
        return Scene(things, columns, rows, background)
    while True:
        a, b = rng.sample(places, 2)
        across, down = b[0] - a[0], b[1] - a[1]
        if not (abs(across) >= 2 * abs(down) or abs(down) >= 2 * abs(across)):
            continue  # near a diagonal neither word would be clearly right
        relation = "left of" if abs(across) > abs(down) else "above"
        if (across if relation == "left of" else down) < 0:
            a, b = b, a
        first, second = _thing(rng, split, a, 0.12), _thing(rng, split, b, 0.12)
        if first.name != second.name and "digit" not in (first.shape if second.shape == "digit" else ""):
            return Scene((first, second), columns, rows, background, relation)


def sample(rng: random.Random, split: Split = "train", columns: int = 4, rows: int = 4) -> Scene:
    """Draw one scene of ``split``; a test scene is a held-out composition or a lone held-out digit image."""
    while True:
        scene = _any_scene(rng, split, columns, rows)
        lone_digit = len(scene.things) == 1 and scene.things[0].shape == "digit"
        if scene.held_out == (split == "test") or (split == "test" and lone_digit):
            return scene


def questions(scene: Scene, rng: random.Random, split: Split = "train") -> list[tuple[str, str]]:
    """Return one question and answer of every kind that fits ``scene``, the caption not among them."""
    things, found = scene.things, []
    shapes = [t.shape for t in things]
    present = {(t.colour, t.shape) for t in things}
    thing = rng.choice(things)
    if scene.counted:
        found.append((f"what color are the {thing.shape}s?", thing.colour))
    elif thing.shape != "digit":
        if shapes.count(thing.shape) == 1:
            found.append((f"what color is the {thing.shape}?", thing.colour))
        if sum(t.colour == thing.colour for t in things) == 1:
            found.append((f"what shape is the {thing.colour} thing?", thing.shape))
    else:
        found.append(("which digit is shown?", str(thing.digit)))
    shape = rng.choice(SHAPES) if rng.random() < 0.4 or thing.shape == "digit" else thing.shape
    found.append((f"how many {shape}s are there?", NUMBERS[shapes.count(shape)]))
    found.append(("is there a digit?", "yes" if "digit" in shapes else "no"))
    asked = _asked_pair(thing, rng, split)
    found.append((f"is there a {asked[0]} {asked[1]}?", "yes" if asked in present else "no"))
    if scene.relation:
        first, second = things
        relation = scene.relation
        if rng.random() < 0.5:
            first, second, relation = second, first, OPPOSITE[relation]
        found.append((f"what is {relation} the {second.name}?", first.phrase))
        found.append((f"where is the {first.name} from the {second.name}?", SIDE[relation]))
    return found


def _asked_pair(thing: Thing, rng: random.Random, split: Split) -> tuple[str, str]:
    """Pick the pair of a yes/no question: half the time what is there, else something near it."""
    if thing.shape != "digit" and rng.random() < 0.5:
        return thing.colour, thing.shape
    while True:
        pair = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        if thing.shape != "digit" and rng.random() < 0.7:
            pair = (thing.colour, pair[1]) if rng.random() < 0.5 else (pair[0], thing.shape)
        if split == "test" or pair not in HELD_OUT_PAIRS:
            return pair


def examples(n: int, seed: int, split: Split, cell: int, grids: tuple[tuple[int, int], ...]) -> Iterator[Example]:
    """Yield ``n`` examples, captions and questions in turn; ``grids`` are (columns, rows) taken in rotation."""
    rng = random.Random(f"{split}-{seed}")
    for i in range(n):
        columns, rows = grids[i // 2 % len(grids)]
        scene = sample(rng, split, columns, rows)
        pair = (rng.choice(DESCRIBE), scene.caption) if i % 2 == 0 else rng.choice(questions(scene, rng, split))
        yield Example(scene.render(cell), *pair)


def held_out_examples(n: int, seed: int = 0, model: Literal["llava", "smolvlm"] = "llava") -> list[Example]:
    """Return ``n`` test examples at the size ``model`` takes: 64 x 64, or 128 x 128, 128 x 64 and 64 x 128."""
    if model == "llava":
        return list(examples(n, seed, "test", LLAVA_CELL, ((4, 4),)))
    return list(examples(n, seed, "test", SMOLVLM_CELL, ((4, 4), (4, 4), (4, 2), (2, 4))))


def held_out_captions(n: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Return ``n`` held-out (64 x 64 image, caption) pairs with captions that are all different; ``n`` at most 256."""
    if n > 256:
        raise ValueError(f"{n} different held-out captions were asked for; there are only a few hundred: ask for 256 at most")
    rng = random.Random(f"captions-{seed}")
    pairs: dict[str, Image.Image] = {}
    while len(pairs) < n:
        scene = sample(rng, "test")
        if scene.caption not in pairs:
            pairs[scene.caption] = scene.render()
    return [(image, caption) for caption, image in pairs.items()]
