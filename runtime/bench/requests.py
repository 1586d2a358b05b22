"""The requests that are measured."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def scribble(place: float, width: int, height: int) -> NDArray[np.uint8]:
    """A white ring on black, uint8 [H, W, 3]; it moves to the right with `place`, 0 to 1."""
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(x - width * (0.25 + place / 2), y - height / 2)
    ring = np.abs(radius - height / 5) < height / 64
    return np.repeat((ring * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def scribbles(width: int, height: int, frames: int) -> dict[int, NDArray[np.uint8]]:
    """Keyframes for the first frame, the middle and the last, by their index."""
    indexes = sorted({0, frames // 2, frames - 1})
    return {index: scribble(index / max(1, frames - 1), width, height) for index in indexes}
