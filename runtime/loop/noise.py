"""Normal noise as torch's CPU generator draws it (within 4.8e-7), without torch.

Source: aten/src/ATen/native/cpu/DistributionTemplates.h (`normal_fill`) and ATen/core/DistributionsHelper.h. The
engine is MT19937 (Matsumoto and Nishimura 1998), which numpy provides. The transform is Box-Muller (1958).
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1

_BLOCK = 16
_CHUNK = 1 << 15
"""Values computed at a time; a multiple of the block whose intermediate arrays stay in the processor's cache."""
_BITS = np.uint32(0xFFFFFF)
_TWO_PI = np.float32(2 * np.pi)


class NoiseSource(Protocol):
    """Draws standard normal values."""

    def randn(self, shape: tuple[int, ...], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Values of a shape, written to `out` if it is given."""


class TorchGenerator:
    """Draws float32 values as `torch.Generator("cpu").manual_seed(seed)` does.

    Args:
        seed: 0 to 2**64 - 1; as in torch, the engine is seeded with the lower 32 bits.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed {seed} is out of range; allowed are 0 to {MAX_SEED}")
        self._engine = np.random.MT19937(0)
        np.random.RandomState(self._engine).seed(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: tuple[int, ...], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Standard normal values of the given shape, like `torch.randn(shape, generator=...)`.

        Args:
            shape: the shape.
            out: a contiguous array of this shape to write to.
        """
        values = np.empty(shape, np.float32) if out is None else out
        flat = values.reshape(-1)
        if flat.size >= _BLOCK:
            self._large(flat)
        else:
            self._small(flat)
        return values

    def _large(self, values: NDArray[np.float32]) -> None:
        """Blocks of 16: the first eight uniforms give the radii, the last eight the angles."""
        rest = values.size % _BLOCK
        whole = values[: values.size - rest]
        for start in range(0, whole.size, _CHUNK):
            self._blocks(whole[start : start + _CHUNK])
        if rest:  # torch draws the last 16 values again
            self._engine.random_raw(rest)
            self._blocks(values[-_BLOCK:])

    def _blocks(self, values: NDArray[np.float32]) -> None:
        """Box-Muller in float32, as torch computes it."""
        blocks = values.reshape(-1, 2, _BLOCK // 2)
        uniform = self._uniform(values.size).reshape(blocks.shape)
        radius = np.float32(1) - uniform[:, 0]
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        angle = uniform[:, 1] * _TWO_PI
        np.multiply(radius, np.cos(angle), out=blocks[:, 0])
        np.multiply(radius, np.sin(angle, out=angle), out=blocks[:, 1])

    def _small(self, values: NDArray[np.float32]) -> None:
        """Fewer than 16 values: drawn in pairs in double precision. The second of a pair is kept for the next value."""
        for index in range(values.size):
            if self._spare is None:
                angle, radius = self._uniform_double(), self._uniform_double()
                radius = np.sqrt(-2 * np.log1p(-radius))
                values[index] = radius * np.cos(2 * np.pi * angle)
                self._spare = radius * np.sin(2 * np.pi * angle)
            else:
                values[index], self._spare = self._spare, None

    def _uniform(self, size: int) -> NDArray[np.float32]:
        """24 random bits each, in [0, 1)."""
        bits = self._engine.random_raw(size).astype(np.uint32)
        bits &= _BITS
        uniform = bits.view(np.int32).astype(np.float32)  # all are positive, and signed integers convert faster
        uniform *= np.float32(2**-24)
        return uniform

    def _uniform_double(self) -> float:
        """53 random bits from two draws, in [0, 1)."""
        high, low = (int(value) for value in self._engine.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53
