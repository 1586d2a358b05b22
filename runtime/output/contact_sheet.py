"""One picture of all frames of a clip, with the keyframes above their frames."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..request import FittedKeyframe

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 8
MAX_WIDTH = 2048
_GAP = 4
_LABEL = 14
_GROUND, _INK, _MARK = (24, 24, 27), (212, 212, 216), (250, 204, 21)


def contact_sheet(frames: NDArray[np.uint8], keyframes: Sequence[FittedKeyframe] = ()) -> "Image.Image":
    """Lays out frames [F, H, W, 3] in rows of eight, with the keyframes of a row above it."""
    from PIL import Image, ImageDraw

    count, height, width, _ = frames.shape
    columns = min(COLUMNS, count)
    scale = min(1.0, (MAX_WIDTH - _GAP) / columns / (width + _GAP))
    cell = (max(1, int(width * scale)), max(1, int(height * scale)))
    pictures = {item.index: item.pixels for item in keyframes}
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    strip = cell[1] + _LABEL + _GAP
    total = _GAP + sum(strip * (2 if pictures.keys() & set(row) else 1) for row in rows)
    sheet = Image.new("RGB", (_GAP + columns * (cell[0] + _GAP), total), _GROUND)
    draw = ImageDraw.Draw(sheet)

    def place(pixels: NDArray[np.uint8], column: int, top: int, label: str, ink: tuple[int, int, int]) -> None:
        left = _GAP + column * (cell[0] + _GAP)
        draw.text((left, top), label, fill=ink)
        sheet.paste(Image.fromarray(pixels).resize(cell, Image.Resampling.LANCZOS), (left, top + _LABEL))

    top = _GAP
    for row in rows:
        if pictures.keys() & set(row):
            for column, index in enumerate(row):
                if index in pictures:
                    place(pictures[index], column, top, f"keyframe {index}", _MARK)
            top += strip
        for column, index in enumerate(row):
            place(frames[index], column, top, str(index), _MARK if index in pictures else _INK)
        top += strip
    return sheet
