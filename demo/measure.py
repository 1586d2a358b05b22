"""What can be measured of a clip of the demo's world: where its shapes are, what they are, how still the ground is."""

from functools import cache

import numpy as np
from drawing import outline
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from world import COLOURS, HORIZON, SHAPES, SIZE, Scene, State

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]

CONTRAST = 45.0
"""How far a colour has to be from the ground's to belong to a shape, in levels."""
NEAR = 2
"""Pixels within which two edges are the same."""
RIM = 2
"""Pixels over which a shape fades into the ground."""
PERIODS = {"circle": 6, "square": 90, "triangle": 120, "star": 72, "cross": 90}
"""Degrees after which a turned shape looks the same."""
TURN = 6
"""Degrees between the angles at which shapes are tried; at 18, crosses pass for squares."""


def foreground(frame: Frame) -> Mask:
    """The pixels [H, W] that differ from the ground, whose colours are the medians of the frame's rim."""
    rim = np.ones((SIZE, SIZE), bool)
    rim[6:-6, 6:-6] = False
    mask = np.zeros((SIZE, SIZE), bool)
    for rows in (slice(0, HORIZON - 3), slice(HORIZON + 3, SIZE)):
        ground = np.median(frame[rows][rim[rows]].astype(float), axis=0)
        mask[rows] = np.linalg.norm(frame[rows] - ground, axis=-1) > CONTRAST
    for row in range(HORIZON - 3, HORIZON + 3):  # the horizon is blurred: what stands above and below goes on
        mask[row] = mask[HORIZON - 4] & mask[HORIZON + 3]
    return mask


def edges(mask: Mask) -> Mask:
    """The pixels of a mask that have a neighbour outside."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    return mask & ~inner


def near(mask: Mask, distance: int = NEAR) -> Mask:
    """The pixels at most so far from a mask's."""
    grown = np.zeros_like(mask)
    padded = np.pad(mask, distance)
    for y in range(-distance, distance + 1):
        for x in range(-distance, distance + 1):
            if x * x + y * y <= distance * distance:
                grown |= padded[distance + y :, distance + x :][:SIZE, :SIZE]
    return grown


def edge_f1(made: Frame, wanted: Frame) -> float:
    """F1 of the edges of the shapes in two frames, where `NEAR` counts as met."""
    ours, theirs = edges(foreground(made)), edges(foreground(wanted))
    if not ours.any() or not theirs.any():
        return 0.0
    precision, recall = (ours & near(theirs)).sum() / ours.sum(), (theirs & near(ours)).sum() / theirs.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def psnr(made: Frame, wanted: Frame) -> float:
    """In dB."""
    error = np.square(made.astype(float) - wanted).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def parts(frame: Frame, scene: Scene, index: int) -> list[Mask]:
    """The pixels of each of a scene's shapes: of two shapes, what is nearer to the colour of each.

    Where a shape fades into the ground its rim may be nearer to the other's colour: that is left out.
    """
    mask = foreground(frame)
    if len(scene.shapes) == 1:
        return [mask]
    wanted = np.array([shape.at(index).colour for shape in scene.shapes])
    nearest = np.linalg.norm(frame[:, :, None] - wanted, axis=-1).argmin(-1)
    return [_without_rims(mask & (nearest == place)) for place in range(len(wanted))]


def _without_rims(mask: Mask) -> Mask:
    """What hangs together with a pixel that is `RIM` away from all that is outside."""
    kept = mask & ~near(~mask, RIM)
    while (grown := near(kept, 1) & mask).sum() > kept.sum():
        kept = grown
    return kept


def centre(mask: Mask) -> NDArray[np.float64] | None:
    """The mean of a mask's pixels, [x, y]; None where there are too few to be a shape."""
    if mask.sum() < 40:
        return None
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def colour_of(frame: Frame, mask: Mask) -> NDArray[np.float64]:
    """The median colour within a mask, away from its edge."""
    inner = mask & ~near(edges(mask), 1)
    return np.median(frame[inner if inner.any() else mask].astype(float), axis=0)


def name_of(colour: NDArray[np.float64]) -> str:
    """The nearest of the world's colours."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - COLOURS[name])))


def kind_of(mask: Mask) -> str:
    """The shape that covers a mask best, of all shapes of its area at any angle."""
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
    """A shape of `root` squared pixels around the middle."""
    angle = np.deg2rad(degrees)
    image = Image.new("1", (SIZE, SIZE))
    unit = State((0.0, 0.0), 1.0, float(angle), (0.0, 0.0, 0.0))
    corners = np.array(outline(kind, unit))
    x, y = corners.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    placed = corners * root / np.sqrt(area) + SIZE / 2
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in placed], fill=1)
    return np.asarray(image)


def still_ground(frames: NDArray[np.uint8]) -> Mask:
    """Where a drawn clip [F, H, W, 3] shows ground in all frames, well away from shapes."""
    return ~near(np.logical_or.reduce([foreground(frame) for frame in frames]), 4)


def flicker(frames: NDArray[np.uint8], ground: Mask) -> float:
    """The mean change from frame to frame within a mask, in levels."""
    return float(np.abs(np.diff(frames.astype(float), axis=0))[:, ground].mean()) if ground.any() else 0.0
