"""The requests that are measured."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.example_requests import scribble

PROMPT = "a photo of a red lighthouse on the sea, day turns to night"
SEED = 42


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What the cost of a request depends on; sides in pixels."""

    width: int
    height: int
    frames: int
    steps: int = 4
    guidance: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def scribbles(width: int, height: int, frames: int) -> dict[int, NDArray[np.uint8]]:
    """Keyframes for the first frame, the middle and the last, by their index."""
    indexes = sorted({0, frames // 2, frames - 1})
    return {index: scribble(index / max(1, frames - 1), width, height) for index in indexes}
