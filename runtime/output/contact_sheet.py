"""Frames of clips in one picture: of one clip all frames with the keyframes above them, of several a row for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..request import FittedKeyframe

if TYPE_CHECKING:
    from PIL import Image

    from .clip import Clip

COLUMNS = 8
MAX_WIDTH = 2048
_GAP = 4
_LABEL = 14
_GROUND, _INK, _MARK = (24, 24, 27), (212, 212, 216), (250, 204, 21)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A picture [H, W, 3] in a row, and the label above it; those of keyframes are marked."""

    column: int
    pixels: NDArray[np.uint8]
    label: str
    marked: bool = False


def contact_sheet(frames: NDArray[np.uint8], keyframes: Sequence[FittedKeyframe] = ()) -> "Image.Image":
    """Lays out frames [F, H, W, 3] in rows of eight, with the keyframes of a row above it."""
    columns = min(COLUMNS, len(frames))
    pictures = {item.index: item.pixels for item in keyframes}
    rows = []
    for start in range(0, len(frames), columns):
        places = range(start, min(start + columns, len(frames)))
        above = [
            _Cell(place - start, pictures[place], f"keyframe {place}", marked=True)
            for place in places
            if place in pictures
        ]
        if above:
            rows.append(_row(above, columns))
        cells = [_Cell(place - start, frames[place], str(place), marked=place in pictures) for place in places]
        rows.append(_row(cells, columns))
    return stacked(rows)


def clip_row(clip: "Clip") -> "Image.Image":
    """One row of a clip for `stacked`: up to eight frames from its first to its last, with its seed above the first."""
    columns = min(COLUMNS, len(clip.frames))
    places = np.linspace(0, len(clip.frames) - 1, columns).round().astype(int)
    labels = [f"seed {clip.seed}", *map(str, places[1:])]
    cells = [_Cell(column, clip.frames[places[column]], label) for column, label in enumerate(labels)]
    return _row(cells, columns)


def stacked(rows: Sequence["Image.Image"]) -> "Image.Image":
    """Puts rows of the same width below each other."""
    from PIL import Image

    sheet = Image.new("RGB", (rows[0].width, _GAP + sum(row.height for row in rows)), _GROUND)
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(cells: Sequence[_Cell], columns: int) -> "Image.Image":
    from PIL import Image, ImageDraw

    height, width, _ = cells[0].pixels.shape
    scale = min(1.0, (MAX_WIDTH - _GAP) / columns / (width + _GAP))
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    row = Image.new("RGB", (_GAP + columns * (size[0] + _GAP), size[1] + _LABEL + _GAP), _GROUND)
    draw = ImageDraw.Draw(row)
    for cell in cells:
        left = _GAP + cell.column * (size[0] + _GAP)
        draw.text((left, 0), cell.label, fill=_MARK if cell.marked else _INK)
        row.paste(Image.fromarray(cell.pixels).resize(size, Image.Resampling.LANCZOS), (left, _LABEL))
    return row
