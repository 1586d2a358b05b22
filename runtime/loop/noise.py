"""Normal noise as torch's CPU generator draws it (within 4.8e-7), without torch.

Source: aten/src/ATen/native/cpu/DistributionTemplates.h (`normal_fill`) and ATen/core/DistributionsHelper.h. The
engine is MT19937 (Matsumoto and Nishimura 1998), which numpy provides. The transform is Box-Muller (1958).
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1

_BLOCK = 16
_TWO_PI = np.float32(2 * np.pi)


class TorchGenerator:
    """Draws float32 values as `torch.Generator("cpu").manual_seed(seed)` does.

    Args:
        seed: 0 to 2**64 - 1; as in torch, the engine is seeded with the lower 32 bits.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed {seed} is out of range; allowed are 0 to {MAX_SEED}")
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._engine = np.random.MT19937()
        self._engine.state = state
        self._spare: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal values of the given shape, like `torch.randn(shape, generator=...)`."""
        size = prod(shape)
        values = self._large(size) if size >= _BLOCK else self._small(size)
        return values.reshape(shape)

    def _large(self, size: int) -> NDArray[np.float32]:
        """Blocks of 16: the first eight uniforms give the radii, the last eight the angles."""
        uniform = self._uniform(size)
        whole = size - size % _BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole != size:  # torch draws the last 16 values again
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _small(self, size: int) -> NDArray[np.float32]:
        """Fewer than 16 values: drawn in pairs in double precision. The second of a pair is kept for the next value."""
        values = np.empty(size, np.float32)
        for index in range(size):
            if self._spare is None:
                angle, radius = self._uniform_double(), self._uniform_double()
                radius = np.sqrt(-2 * np.log1p(-radius))
                values[index] = radius * np.cos(2 * np.pi * angle)
                self._spare = radius * np.sin(2 * np.pi * angle)
            else:
                values[index], self._spare = self._spare, None
        return values

    def _uniform(self, size: int) -> NDArray[np.float32]:
        """24 random bits each, in [0, 1)."""
        bits = self._engine.random_raw(size).astype(np.uint32) & np.uint32(0xFFFFFF)
        return bits.astype(np.float32) * np.float32(2**-24)

    def _uniform_double(self) -> float:
        """53 random bits from two draws, in [0, 1)."""
        high, low = (int(value) for value in self._engine.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Computes in float32 like torch: radius from the first half of each block, angle from the second."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = blocks[:, 1] * _TWO_PI
    values = np.empty_like(blocks)
    np.multiply(radius, np.cos(angle), out=values[:, 0])
    np.multiply(radius, np.sin(angle), out=values[:, 1])
    return values.reshape(-1)
