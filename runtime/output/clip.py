"""The result of a request."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..request import FittedKeyframe


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Frames and how they came to be.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB.
        seed: the seed used, drawn at random when none was given.
        timings: seconds per stage: load (opening graphs at their first use), inputs (on a GPU), text, keyframes,
            control, denoise, decode, total. A stage that was kept from an earlier request is missing.
        keyframes: the keyframes as the model saw them.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    seed: int
    timings: dict[str, float]
    keyframes: tuple[FittedKeyframe, ...] = field(default=(), repr=False)

    def save(self, path: str | os.PathLike[str], fps: float = 8) -> Path:
        """Writes the clip; the file appears only when it is complete.

        Args:
            path: `.mp4` (H.264), `.webm` (VP9), `.gif`, `.webp`, `.png` (contact sheet), or a folder (one PNG a frame).
            fps: frames per second, 1 to 60; for `.gif` 1 to 50.

        Raises:
            OutputError: the path cannot be written.
            InvalidRequest: the ending or the frame rate is not known.
        """
        from .writers import save

        return save(self, Path(path), fps)
