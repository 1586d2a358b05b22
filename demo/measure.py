"""Measures clips of the demo's world: the places, kinds and colours of shapes, and the flicker of the ground."""

from functools import cache

import numpy as np
from drawing import outline
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from world import COLOURS, HORIZON, SHAPES, SIZE, Scene, State

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]

CONTRAST = 45.0
"""Distance in levels from the ground's colour beyond which a pixel belongs to a shape."""
NEAR = 2
"""Distance in pixels within which two edges match."""
RIM = 2
"""Width in pixels of the rim where a shape fades into the ground."""
PERIODS = {"circle": 6, "square": 90, "triangle": 120, "star": 72, "cross": 90}
"""Degrees of rotation after which a shape looks the same."""
TURN = 6
"""Step in degrees between the angles at which shapes are compared; at 18, crosses pass for squares."""


def foreground(frame: Frame) -> Mask:
    """Returns the pixels [H, W] that differ from the ground. Its colours are medians of the frame's rim."""
    rim = np.ones((SIZE, SIZE), bool)
    rim[6:-6, 6:-6] = False
    mask = np.zeros((SIZE, SIZE), bool)
    for rows in (slice(0, HORIZON - 3), slice(HORIZON + 3, SIZE)):
        ground = np.median(frame[rows][rim[rows]].astype(float), axis=0)
        mask[rows] = np.linalg.norm(frame[rows] - ground, axis=-1) > CONTRAST
    for row in range(HORIZON - 3, HORIZON + 3):  # the horizon is blurred: it is shape if the rows above and below are
        mask[row] = mask[HORIZON - 4] & mask[HORIZON + 3]
    return mask


def edges(mask: Mask) -> Mask:
    """Returns the pixels of a mask with a neighbour outside."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    return mask & ~inner


def near(mask: Mask, distance: int = NEAR) -> Mask:
    """Returns the pixels within `distance` of a mask."""
    grown = np.zeros_like(mask)
    padded = np.pad(mask, distance)
    for y in range(-distance, distance + 1):
        for x in range(-distance, distance + 1):
            if x * x + y * y <= distance * distance:
                grown |= padded[distance + y :, distance + x :][:SIZE, :SIZE]
    return grown


def edge_f1(made: Frame, wanted: Frame) -> float:
    """Returns the F1 of the shapes' edges in two frames; edges within `NEAR` match."""
    ours, theirs = edges(foreground(made)), edges(foreground(wanted))
    if not ours.any() or not theirs.any():
        return 0.0
    precision, recall = (ours & near(theirs)).sum() / ours.sum(), (theirs & near(ours)).sum() / theirs.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def psnr(made: Frame, wanted: Frame) -> float:
    """Returns the PSNR in dB."""
    error = np.square(made.astype(float) - wanted).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def parts(frame: Frame, scene: Scene, index: int) -> list[Mask]:
    """Returns the pixels of each shape of a scene. With two shapes, a pixel belongs to the shape of the nearer colour.

    The rim, where a shape fades into the ground, may be nearer to the other shape's colour; it is left out.
    """
    mask = foreground(frame)
    if len(scene.shapes) == 1:
        return [mask]
    wanted = np.array([shape.at(index).colour for shape in scene.shapes])
    nearest = np.linalg.norm(frame[:, :, None] - wanted, axis=-1).argmin(-1)
    return [_without_rims(mask & (nearest == place)) for place in range(len(wanted))]


def _without_rims(mask: Mask) -> Mask:
    """Returns the parts of a mask that are connected to a pixel further than `RIM` from the outside."""
    kept = mask & ~near(~mask, RIM)
    while (grown := near(kept, 1) & mask).sum() > kept.sum():
        kept = grown
    return kept


def centre(mask: Mask) -> NDArray[np.float64] | None:
    """Returns the mean of a mask's pixels, [x, y]; None if they are too few to be a shape."""
    if mask.sum() < 40:
        return None
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def colour_of(frame: Frame, mask: Mask) -> NDArray[np.float64]:
    """Returns the median colour within a mask, away from its edge."""
    inner = mask & ~near(edges(mask), 1)
    return np.median(frame[inner if inner.any() else mask].astype(float), axis=0)


def name_of(colour: NDArray[np.float64]) -> str:
    """Returns the name of the nearest of the world's colours."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - COLOURS[name])))


def kind_of(mask: Mask) -> str:
    """Returns the kind of shape that best covers a mask, at its area and any angle."""
    middle = centre(mask)
    if middle is None:
        return "nothing"
    crop = _centred(mask, middle)
    root = round(float(np.sqrt(crop.sum())), 0)
    scores = {}
    for kind in SHAPES:
        for angle in range(0, PERIODS[kind], TURN):
            template = _template(kind, angle, root)
            scores[kind, angle] = (crop & template).sum() / (crop | template).sum()
    return max(scores, key=lambda key: scores[key])[0]


def _centred(mask: Mask, middle: NDArray[np.float64]) -> Mask:
    shift = np.round(SIZE / 2 - middle).astype(int)
    return np.roll(mask, (shift[1], shift[0]), (0, 1))


@cache
def _template(kind: str, degrees: int, root: float) -> Mask:
    """Draws a shape with an area of `root` squared pixels in the middle."""
    angle = np.deg2rad(degrees)
    image = Image.new("1", (SIZE, SIZE))
    unit = State((0.0, 0.0), 1.0, float(angle), (0.0, 0.0, 0.0))
    corners = np.array(outline(kind, unit))
    x, y = corners.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    placed = corners * root / np.sqrt(area) + SIZE / 2
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in placed], fill=1)
    return np.asarray(image)


def shows(frame: Frame, scene: Scene, index: int) -> list[tuple[bool, bool]]:
    """Whether a frame shows the asked colour, and the asked kind, of each shape of a scene."""
    found = []
    for mask, shape in zip(parts(frame, scene, index), scene.shapes, strict=True):
        asked = name_of(np.array(shape.at(index).colour))
        is_there = centre(mask) is not None
        found.append((is_there and name_of(colour_of(frame, mask)) == asked, is_there and kind_of(mask) == shape.kind))
    return found


def still_ground(frames: NDArray[np.uint8]) -> Mask:
    """Returns the pixels of a drawn clip [F, H, W, 3] that are ground in all frames, more than 4 pixels from shapes."""
    return ~near(np.logical_or.reduce([foreground(frame) for frame in frames]), 4)


def flicker(frames: NDArray[np.uint8], ground: Mask) -> float:
    """Returns the mean change from frame to frame within a mask, in levels."""
    return float(np.abs(np.diff(frames.astype(float), axis=0))[:, ground].mean()) if ground.any() else 0.0
