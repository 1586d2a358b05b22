"""The result of a request."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..request import FittedKeyframe


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """The frames of a clip, and how they were made.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB.
        seed: the seed that was used; drawn at random if none was given.
        timings: seconds per stage: load (opening graphs at their first use), inputs (on a GPU), text, keyframes,
            control, denoise, decode, capture (on a GPU, of the first requests of a kind), total. A stage whose result
            was kept from an earlier request is missing.
        keyframes: the keyframes in the clip's size, as the model got them.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    seed: int
    timings: dict[str, float]
    keyframes: tuple[FittedKeyframe, ...] = field(default=(), repr=False)

    def save(self, path: str | os.PathLike[str], fps: float = 8) -> Path:
        """Writes the clip; the file appears only when it is complete.

        Args:
            path: `.mp4` (H.264), `.webm` (VP9), `.gif`, `.webp`, `.png` (contact sheet), or a folder (a PNG per frame).
            fps: frames per second, 1 to 60; for `.gif` 1 to 50.

        Raises:
            OutputError: the path cannot be written.
            InvalidRequest: the ending is unknown, or the frame rate is not allowed.
        """
        from .writers import save

        return save(self, Path(path), fps)
