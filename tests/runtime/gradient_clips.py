"""A clip that compression preserves, and the frames of a written video."""

from pathlib import Path

import av
import numpy as np
from sparsectrl_lcm.runtime import Clip
from sparsectrl_lcm.runtime.request import FittedKeyframe


def gradient_clip() -> Clip:
    """A smooth moving gradient, which compression preserves."""
    y, x = np.mgrid[:64, :96]
    frames = [np.stack([(x * 2 + 4 * t) % 192 + 30, y * 3, np.full_like(x, 90)], 2) for t in range(16)]
    keyframes = (
        FittedKeyframe(0, np.full((64, 96, 3), 255, np.uint8)),
        FittedKeyframe(9, np.zeros((64, 96, 3), np.uint8)),
    )
    return Clip(np.stack(frames).astype(np.uint8), seed=1, timings={}, keyframes=keyframes)


def decode(path: Path) -> tuple[av.container.InputContainer, list[np.ndarray]]:
    container = av.open(str(path))
    return container, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
