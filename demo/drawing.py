"""Draws scenes of the demo's world: frames in colour, and scribbles, white outlines on black."""

from collections.abc import Sequence
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from world import FRAMES, GROUNDS, HORIZON, SIZE, Point, Scene, State

DETAIL = 4
"""Scale at which frames are drawn, before each DETAIL x DETAIL block is averaged to a pixel."""
LINE = 2
"""Width of a scribble's line in pixels."""
_OUTER = {"circle": 1.0, "square": 1.2, "triangle": 1.3, "star": 1.35, "cross": 1.2}
"""Distance of the farthest point from the centre at radius 1, so that shapes of one radius look equally large."""


def outline(kind: str, state: State) -> list[Point]:
    """Returns the corners of a shape, in pixels."""
    outer = _OUTER[kind] * state.radius
    if kind == "cross":
        arm = 0.38
        plan = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
        corners = plan + [(-x, -y) for x, y in plan]
        polar = [(np.hypot(x, y) * outer / np.hypot(arm, 1), np.arctan2(y, x)) for x, y in corners]
    else:
        count = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[kind]
        first = -pi / 4 if kind == "square" else -pi / 2
        polar = [
            (outer * (0.5 if kind == "star" and corner % 2 else 1), first + 2 * pi * corner / count)
            for corner in range(count)
        ]
    x, y = state.centre
    return [(float(x + r * cos(a + state.angle)), float(y + r * sin(a + state.angle))) for r, a in polar]


def frame(scene: Scene, index: int) -> NDArray[np.uint8]:
    """Draws one frame [SIZE, SIZE, 3] uint8."""
    image = Image.new("RGB", (SIZE * DETAIL, SIZE * DETAIL), GROUNDS[scene.grounds[0]])
    draw = ImageDraw.Draw(image)
    if len(scene.grounds) > 1:
        draw.rectangle((0, HORIZON * DETAIL, SIZE * DETAIL, SIZE * DETAIL), fill=GROUNDS[scene.grounds[1]])
    for shape in scene.shapes:
        state = shape.at(index)
        corners = _scaled(outline(shape.kind, state))
        draw.polygon(corners, fill=tuple(round(level) for level in state.colour))  # type: ignore[arg-type]
    return np.asarray(image.reduce(DETAIL))


def clip(scene: Scene) -> NDArray[np.uint8]:
    """Draws all frames [FRAMES, SIZE, SIZE, 3] uint8."""
    return np.stack([frame(scene, index) for index in range(FRAMES)])


def scribble(scene: Scene, index: int, scale: int = 1) -> NDArray[np.uint8]:
    """Draws the visible outlines of the shapes in one frame, white on black.

    Args:
        scene: the scene to draw.
        index: of the frame in the clip.
        scale: factor on the size of a frame, a divisor of `DETAIL`.

    Returns:
        [scale*SIZE, scale*SIZE] uint8.
    """
    image = Image.new("L", (SIZE * DETAIL, SIZE * DETAIL))
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        corners = _scaled(outline(shape.kind, shape.at(index)))
        draw.polygon(corners, fill=0)
        draw.line([*corners, *corners[:2]], fill=255, width=LINE * DETAIL, joint="curve")
    return np.asarray(image.reduce(DETAIL // scale))


def _scaled(corners: Sequence[Point]) -> list[Point]:
    return [(x * DETAIL, y * DETAIL) for x, y in corners]
