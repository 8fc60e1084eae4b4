"""Rendered scenes with captions: the world that the demo checkpoint learns.

A scene is one to three equal objects on a plain background. Six attributes describe it (count, size, colour,
shape, position, background), and a small grammar turns them into captions. Everything here is a pure function of
its arguments and of a seed, so the same seed gives the same pixels and the same words.

Lengths are fractions of the picture's side unless a name says pixels; `y` grows downwards.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 32, 36), "green": (36, 158, 60), "blue": (36, 72, 214), "yellow": (246, 220, 40),
    "orange": (244, 134, 22), "purple": (134, 44, 166), "white": (248, 248, 248), "black": (18, 18, 18),
}  # fmt: skip
BACKGROUNDS: dict[str, Colour] = {
    "white": (240, 240, 240), "black": (24, 24, 24), "grey": (128, 128, 128), "blue": (54, 92, 200),
    "green": (60, 146, 76), "pink": (246, 164, 196), "yellow": (236, 214, 70),
}  # fmt: skip
SHAPES = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars",
    "cross": "crosses", "ring": "rings",
}  # fmt: skip
SIZES = {"small": (0.27, 0.28), "large": (0.38, 0.39)}  # an object's diameter, drawn evenly from this range
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
COUNTS = {1: "one", 2: "two", 3: "three"}
POSITIONS: dict[str, tuple[int, int]] = {  # (column, row) of a 3 x 3 board
    "top left": (0, 0), "top": (1, 0), "top right": (2, 0),
    "left": (0, 1), "centre": (1, 1), "right": (2, 1),
    "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2),
}  # fmt: skip
LAYOUTS: dict[int, tuple[tuple[Point, ...], ...]] = {  # object centres, in steps of one object and its gap
    1: (((0, 0),),),
    2: (((-0.5, 0), (0.5, 0)), ((0, -0.5), (0, 0.5))),
    3: (((0, -0.5), (-0.5, 0.5), (0.5, 0.5)), ((-0.5, -0.5), (0.5, -0.5), (0, 0.5))),
}
PREFIXES = ("", "", "a picture of ", "a photo of ", "an image of ")


@dataclass(frozen=True)
class Scene:
    """The six attributes of a scene: all that a full caption tells."""

    count: int
    size: str
    colour: str
    shape: str
    position: str
    background: str


def all_scenes() -> list[Scene]:
    """Every description in a fixed order; an object never has its background's colour."""
    attributes = itertools.product(COUNTS, SIZES, COLOURS, SHAPES, POSITIONS, BACKGROUNDS)
    return [Scene(*values) for values in attributes if values[2] != values[5]]


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all descriptions that training never sees, in any rendering or wording.

    The choice hangs on a hash of the description alone, so no seed can move a scene across the line.
    """
    digest = hashlib.sha256("|".join(map(str, astuple(scene))).encode()).digest()
    return digest[0] % 10 == 0


# ------------------------------------------------------------------ words


def noun_phrase(scene: Scene, rng: random.Random, with_size: bool = True) -> str:
    """For example "two small red circles" or "an orange star"."""
    words = [rng.choice(SIZE_WORDS[scene.size])] if with_size else []
    words += [scene.colour, scene.shape if scene.count == 1 else SHAPES[scene.shape]]
    article = "an" if words[0][0] in "aeiou" else "a"
    number = rng.choice((article, COUNTS[1])) if scene.count == 1 else COUNTS[scene.count]
    return " ".join([number, *words])


def position_phrase(position: str, rng: random.Random) -> str:
    """For example "at the top left" or "in the top left corner"."""
    if position == "centre":
        return rng.choice(("in the centre", "in the middle"))
    if " " in position:
        return rng.choice((f"at the {position}", f"in the {position} corner"))
    return f"on the {position}" if position in ("left", "right") else f"at the {position}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A full caption: every attribute, in one of the grammar's wordings."""
    what = rng.choice(PREFIXES) + noun_phrase(scene, rng)
    where = position_phrase(scene.position, rng)
    ground = f"on a {scene.background} background"
    return f"{what} {ground}, {where}" if rng.random() < 0.5 else f"{what} {where}, {ground}"


def short_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that leaves attributes out, as people's captions do: it always tells count, colour and shape."""
    what = rng.choice(PREFIXES) + noun_phrase(scene, rng, with_size=rng.random() < 0.3)
    rest = ("", position_phrase(scene.position, rng), f"on a {scene.background} background")
    return f"{what} {rng.choice(rest)}".rstrip()


def class_prompts(colour: str, shape: str) -> list[str]:
    """The zero-shot prompts of one (colour, shape) class; their embeddings are averaged, as CLIP's are."""
    article = "an" if colour[0] in "aeiou" else "a"
    nouns = [f"{article} {colour} {shape}"] + [f"{COUNTS[n]} {colour} {SHAPES[shape]}" for n in (2, 3)]
    return [prefix + noun for prefix in dict.fromkeys(PREFIXES) for noun in nouns]


# ------------------------------------------------------------------ pixels


def spokes(radii: tuple[float, ...], corners: int) -> list[Point]:
    """A polygon about the origin, first corner on top, whose corners' distances run through `radii`."""
    turns = [2 * math.pi * i / corners for i in range(corners)]
    distances = itertools.cycle(radii)
    return [(r * math.sin(turn), -r * math.cos(turn)) for turn, r in zip(turns, distances, strict=False)]


def cross(half_bar: float = 0.16) -> list[Point]:
    """A cross of two bars: one arm's three corners, turned a quarter four times."""
    arm = [(-half_bar, -0.5), (half_bar, -0.5), (half_bar, -half_bar)]
    corners = list(arm)
    for _ in range(3):
        arm = [(-y, x) for x, y in arm]
        corners += arm
    return corners


OUTLINES: dict[str, list[Point]] = {  # polygons of diameter 1 about the origin; a ring's is its outer edge
    "circle": spokes((0.5,), 48),
    "square": [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)],
    "triangle": [(0.0, -0.5), (0.52, 0.42), (-0.52, 0.42)],
    "star": spokes((0.56, 0.22), 10),
    "cross": cross(),
    "ring": spokes((0.5,), 48),
}


def centres(scene: Scene, diameter: float, rng: random.Random) -> list[Point]:
    """Where the objects' centres go: a tight group, pushed to its cell of the 3 x 3 board, with a little jitter."""
    layout = rng.choice(LAYOUTS[scene.count])
    step, margin = diameter + 0.03, 0.04
    group = []
    for axis, cell in enumerate(POSITIONS[scene.position]):
        offsets = [point[axis] * step for point in layout]
        low, high = margin + diameter / 2 - min(offsets), 1 - margin - diameter / 2 - max(offsets)
        middle = low + (high - low) * cell / 2 + rng.uniform(-0.01, 0.01)
        group.append([middle + offset for offset in offsets])
    return list(zip(*group, strict=True))


def jittered(colour: Colour, rng: random.Random) -> Colour:
    """A colour near this one, so that no attribute hangs on one exact value."""
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in colour)  # type: ignore[return-value]


def place(points: list[Point], centre: Point, scale: float, angle: float, pixels: int) -> list[Point]:
    """A unit polygon scaled, turned by `angle` (radians) and moved, in canvas pixels."""
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    return [((centre[0] + x * cos - y * sin) * pixels, (centre[1] + x * sin + y * cos) * pixels) for x, y in points]


def render(scene: Scene, seed: int, pixels: int = 224, oversample: int = 4) -> Image.Image:
    """Draw a scene as an RGB picture of `pixels` x `pixels`.

    It is drawn `oversample` times as large and averaged down, which smooths the edges; then a slight tilt of the
    light is laid over it, so that no background is exactly flat.
    """
    rng = random.Random(f"{seed}|{astuple(scene)}")
    side = pixels * oversample
    ground, ink = jittered(BACKGROUNDS[scene.background], rng), jittered(COLOURS[scene.colour], rng)
    diameter = rng.uniform(*SIZES[scene.size])
    picture = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(picture)
    for centre in centres(scene, diameter, rng):
        angle = rng.uniform(-0.08, 0.08)
        draw.polygon(place(OUTLINES[scene.shape], centre, diameter, angle, side), fill=ink)
        if scene.shape == "ring":  # a ring is a circle with a hole
            draw.polygon(place(OUTLINES["circle"], centre, 0.56 * diameter, angle, side), fill=ground)
    return tilt_light(picture.reduce(oversample), rng)


def tilt_light(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Brighten one side of the picture and darken the other, by at most 6 % at the edges."""
    width, height = picture.size
    across, down = rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
    light = 1 + across * np.linspace(-1, 1, width)[None, :] / 2 + down * np.linspace(-1, 1, height)[:, None] / 2
    pixels = np.asarray(picture, dtype=np.float32) * light[..., None].astype(np.float32)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
