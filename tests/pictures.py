"""Random pictures as keyframes."""

import numpy as np
from PIL import Image


def pictures(count: int, width: int, height: int, seed: int = 0) -> list[Image.Image]:
    """Draws random RGB pictures."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
