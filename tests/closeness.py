"""How close frames have to be to those of a reference in fp32."""

import numpy as np


def assert_close(frames: np.ndarray, expected: np.ndarray, about: object = "") -> None:
    """Fails if a value differs by more than one level, or more than one in a hundred by one level.

    Values between two levels may be rounded either way. Rounding down instead would change half of them.
    """
    assert frames.shape == expected.shape, about
    off = np.abs(frames.astype(int) - expected)
    assert off.max() <= 1, about
    assert off.mean() <= 0.01, about
