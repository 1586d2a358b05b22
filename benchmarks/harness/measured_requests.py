"""The measured requests: prompt, seed, size and keyframes."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.example_requests import scribble

PROMPT = "a photo of a red lighthouse on the sea, day turns to night"
SEED = 42


@dataclass(frozen=True, slots=True)
class RequestSize:
    """The values that the cost of a request depends on. Width and height are in pixels."""

    width: int
    height: int
    frames: int
    steps: int = 4
    guidance: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def keyframe_indexes(frames: int) -> list[int]:
    """The first frame, the middle one and the last, without repeats in a short clip."""
    return sorted({0, frames // 2, frames - 1})


def scribbles(width: int, height: int, frames: int) -> dict[int, NDArray[np.uint8]]:
    """The keyframes of a clip by frame index, each uint8 [H, W, 3]."""
    return {index: scribble(index / max(1, frames - 1), width, height) for index in keyframe_indexes(frames)}
