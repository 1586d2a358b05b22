"""The demo's world: clips of coloured shapes that move, turn, grow, shrink, change colour or cross, made by seed.

A scene is a few numbers and a caption; `drawing.py` draws its frames and its scribbles.
"""

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from numpy.random import Generator

SIZE, FRAMES = 128, 16
"""Width and height in pixels, and frames of a clip."""
KEYFRAMES = (0, 8, 15)
"""Indexes of the keyframes in the demo, in evaluations and in half of the training."""
HORIZON = 80
"""Start of the second colour of a two-tone ground, in pixels from the top."""
HELD_OUT_SEED = 1_000_000_000
"""Seeds from here on make scenes whose first shape is a combination that training never sees."""

Point = tuple[float, float]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (225, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 50),
    "green": (50, 190, 70),
    "blue": (60, 110, 240),
    "purple": (165, 60, 210),
    "white": (245, 245, 245),
}
GROUNDS: dict[str, Colour] = {
    "black": (12, 12, 12),
    "grey": (105, 105, 105),
    "navy": (12, 24, 70),
    "brown": (85, 55, 32),
    "olive": (72, 78, 22),
    "teal": (12, 84, 90),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
MOTIONS = ("moves", "turns", "grows", "shrinks", "changes", "crosses")
DIRECTIONS: dict[str, Point] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and right": (0.7, -0.7),
    "up and left": (-0.7, -0.7),
    "down and right": (0.7, 0.7),
    "down and left": (-0.7, 0.7),
}
WORDS = (
    *("a", "an", "and", "over", "ground", "to", "from"),
    *(*COLOURS, *GROUNDS, *SHAPES, *MOTIONS),
    *("right", "left", "up", "down", "clockwise", "counterclockwise", "cross"),
)
"""All words of captions."""


@dataclass(frozen=True, slots=True)
class State:
    """A shape in one frame: centre and radius in pixels, angle in radians, colour in levels."""

    centre: Point
    radius: float
    angle: float
    colour: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape, with its values at the first and at the last frame; between them everything is linear."""

    kind: str
    colours: tuple[str, str]
    centres: tuple[Point, Point]
    radii: tuple[float, float]
    angles: tuple[float, float]

    def at(self, frame: int) -> State:
        """Returns its state in a frame."""
        end = frame / (FRAMES - 1)
        start = 1 - end
        (x0, y0), (x1, y1) = self.centres
        first, last = (COLOURS[name] for name in self.colours)
        return State(
            centre=(start * x0 + end * x1, start * y0 + end * y1),
            radius=start * self.radii[0] + end * self.radii[1],
            angle=start * self.angles[0] + end * self.angles[1],
            colour=tuple(start * a + end * b for a, b in zip(first, last, strict=True)),  # type: ignore[arg-type]
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """A clip before it is drawn.

    Attributes:
        motion: one of `MOTIONS`.
        caption: what a user would write to ask for it.
        shapes: back to front.
        grounds: one colour, or one above and one below the horizon.
    """

    motion: str
    caption: str
    shapes: tuple[Shape, ...]
    grounds: tuple[str, ...]


def scene(seed: int) -> Scene:
    """Makes the scene of a seed. From `HELD_OUT_SEED` on, its first shape is a combination that no lower seed gives."""
    rng = np.random.default_rng(seed)
    while True:
        motion = str(rng.choice(MOTIONS, p=(0.4, 0.14, 0.12, 0.12, 0.12, 0.1)))
        kinds = [str(kind) for kind in rng.permutation(SHAPES)]
        colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
        if motion == "turns" and kinds[0] == "circle":
            continue
        held_out = is_held_out(colours[0], kinds[0], motion)
        if motion == "crosses":
            held_out = held_out or (is_held_out(colours[1], kinds[1], motion) and seed < HELD_OUT_SEED)
        if held_out == (seed >= HELD_OUT_SEED):
            return _scene(rng, motion, kinds, colours)


def is_held_out(colour: str, kind: str, motion: str) -> bool:
    """Whether training never shows this combination. It shows each of the three values in other combinations."""
    places = list(COLOURS).index(colour), SHAPES.index(kind), MOTIONS.index(motion)
    return (places[0] + 2 * places[1] + 3 * places[2]) % 8 == 0


def _scene(rng: Generator, motion: str, kinds: list[str], colours: list[str]) -> Scene:
    grounds = tuple(str(name) for name in rng.permutation(list(GROUNDS))[: 1 + int(rng.random() < 0.4)])
    first = _article(colours[0]) + f" {colours[0]} {kinds[0]}"
    if motion == "crosses":
        second = _article(colours[1]) + f" {colours[1]} {kinds[1]}"
        shapes, does = _crossing(rng, kinds, colours), f"{first} and {second} cross"
    else:
        shape, does = _alone(rng, motion, kinds[0], colours)
        shapes, does = (shape,), f"{first} {does}"
    caption = f"{does} over a {' and '.join(grounds)} ground"
    return Scene(motion, caption.replace("over a o", "over an o"), shapes, grounds)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _alone(rng: Generator, motion: str, kind: str, colours: list[str]) -> tuple[Shape, str]:
    """Makes one shape, and the verb of its caption."""
    radius, angle = float(rng.uniform(15, 24)), float(rng.uniform(-0.4, 0.4))
    drift = float(rng.uniform(0, 2 * pi)), float(rng.uniform(0, 14))
    vector = (cos(drift[0]) * drift[1], sin(drift[0]) * drift[1])
    radii, angles, pair = (radius, radius), (angle, angle), (colours[0], colours[0])
    if motion == "moves":
        name = str(rng.choice(list(DIRECTIONS)))
        length = float(rng.uniform(28, 60))
        vector = (DIRECTIONS[name][0] * length, DIRECTIONS[name][1] * length)
        does = f"moves {name}"
    elif motion == "turns":
        turn = float(rng.uniform(0.5, 1.0) * pi / 2 * rng.choice((-1, 1)))
        angles = (angle, angle + turn)
        does = f"turns {'clockwise' if turn > 0 else 'counterclockwise'}"
    elif motion in ("grows", "shrinks"):
        small, large = float(rng.uniform(12, 15)), float(rng.uniform(22, 28))
        radii = (small, large) if motion == "grows" else (large, small)
        does = motion
    else:
        pair = (colours[0], colours[1])
        does = f"changes from {pair[0]} to {pair[1]}"
    return Shape(kind, pair, _placed(rng, vector, 1.2 * max(radii)), radii, angles), does


def _crossing(rng: Generator, kinds: list[str], colours: list[str]) -> tuple[Shape, Shape]:
    """Makes two shapes that pass each other, the second in front; the first goes right or down."""
    radius, apart = float(rng.uniform(13, 18)), float(rng.uniform(8, 24))
    length = float(rng.uniform(50, 70))
    middle = SIZE / 2 + rng.uniform(-12, 12, 2)
    made = []
    upright = bool(rng.random() < 0.3)
    for side, kind, colour in ((1, kinds[0], colours[0]), (-1, kinds[1], colours[1])):
        along, across = side * length / 2, side * apart / 2
        ends = [(-along, across), (along, across)]
        points = [(y, x) if upright else (x, y) for x, y in ends]
        centres = tuple((float(middle[0] + x), float(middle[1] + y)) for x, y in points)
        angle = float(rng.uniform(-0.4, 0.4))
        made.append(Shape(kind, (colour, colour), centres, (radius, radius), (angle, angle)))  # type: ignore[arg-type]
    return made[0], made[1]


def _placed(rng: Generator, vector: Point, margin: float) -> tuple[Point, Point]:
    """Returns start and end of a move along a vector within the frame."""
    start = []
    for step in vector:
        low, high = margin + max(0, -step), SIZE - margin - max(0, step)
        start.append(float(rng.uniform(min(low, high), max(low, high))))
    return (start[0], start[1]), (start[0] + vector[0], start[1] + vector[1])
