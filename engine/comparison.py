"""How far results are from those of the portable graphs, and how far they may be. Needs numpy alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, log10

import numpy as np
from numpy.typing import NDArray

from ..runtime.cpu.sessions import Array

QUANTILE = 0.99
EQUAL_PSNR = 100.0
"""dB, for frames that are equal; no other difference of 8-bit frames is that small at the sizes of a clip."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The distance of an array from the expected one.

    Attributes:
        largest: the largest difference, relative to the largest expected value.
        quantile: 99% of all differences are at most this; relative to the largest expected value.
        cosine: cosine of the angle between both arrays, 1 if they point in the same direction.
        levels: the mean difference of uint8 frames, in levels of 255; None for other arrays.
        psnr: peak signal-to-noise ratio of uint8 frames in dB; None for other arrays.
    """

    largest: float
    quantile: float
    cosine: float
    levels: float | None = None
    psnr: float | None = None

    @property
    def error(self) -> float:
        """The mean difference in levels for frames, else the largest relative difference."""
        return self.largest if self.levels is None else self.levels


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest allowed difference; for `cosine` and `psnr` the smallest allowed value.

    `largest`, `quantile` and `cosine` are for outputs other than frames, `levels` and `psnr` for frames.
    """

    largest: float
    quantile: float
    cosine: float
    levels: float
    psnr: float

    def exceeded(self, found: Difference) -> tuple[str, ...]:
        """The names of the measures that are out of bounds."""
        if found.levels is not None and found.psnr is not None:
            checks = {"levels": found.levels <= self.levels, "psnr": found.psnr >= self.psnr}
        else:
            checks = {
                "largest": found.largest <= self.largest,
                "quantile": found.quantile <= self.quantile,
                "cosine": found.cosine >= self.cosine,
            }
        return tuple(name for name, holds in checks.items() if not holds)


BOUNDS = {
    "fp32": Bounds(largest=1e-3, quantile=2e-4, cosine=0.999999, levels=0.1, psnr=50.0),
    "fp16": Bounds(largest=1e-2, quantile=4e-3, cosine=0.9999, levels=3.0, psnr=30.0),
    "bf16": Bounds(largest=5e-2, quantile=2e-2, cosine=0.999, levels=3.0, psnr=30.0),
    "fp8": Bounds(largest=0.3, quantile=0.15, cosine=0.99, levels=8.0, psnr=22.0),
    "int8": Bounds(largest=0.2, quantile=0.1, cosine=0.99, levels=6.0, psnr=25.0),
}
"""By precision. They hold for outputs of single graphs, for frames of a decoder and for whole clips."""


def measure(actual: Array, expected: Array) -> Difference:
    """Compares an array with the expected one.

    The difference is infinite if the shapes differ or a value is not finite.

    Args:
        actual: the array; of any float type, or uint8 for frames.
        expected: what it should be.
    """
    frames = expected.dtype == np.uint8
    if actual.shape != expected.shape or (frames and actual.dtype != np.uint8) or not np.isfinite(actual).all():
        return Difference(inf, inf, -1.0, *((255.0, 0.0) if frames else ()))
    wanted, found = expected.astype(np.float64), actual.astype(np.float64)
    off = np.abs(found - wanted)
    scale = max(float(np.abs(wanted).max(initial=0)), 1e-12)
    largest, quantile = float(off.max(initial=0)) / scale, float(np.quantile(off, QUANTILE)) / scale
    cosine = _cosine(found, wanted)
    if not frames:
        return Difference(largest, quantile, cosine)
    return Difference(largest, quantile, cosine, float(off.mean()), _psnr(off))


def worst(found: Iterable[Difference]) -> Difference:
    """Each measure at its worst over several arrays, all of them frames or none."""
    first, *others = found
    for other in others:
        first = Difference(
            max(first.largest, other.largest),
            max(first.quantile, other.quantile),
            min(first.cosine, other.cosine),
            None if first.levels is None or other.levels is None else max(first.levels, other.levels),
            None if first.psnr is None or other.psnr is None else min(first.psnr, other.psnr),
        )
    return first


def errors(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """`Difference.error` of each output, by name."""
    return {name: measure(actual[name], values).error for name, values in expected.items()}


def _cosine(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """The cosine; 1 if both arrays are zero, 0 if one is."""
    lengths = float(np.linalg.norm(found)), float(np.linalg.norm(wanted))
    if not all(lengths):
        return 1.0 if lengths[0] == lengths[1] else 0.0
    return min(float(np.vdot(found, wanted)) / lengths[0] / lengths[1], 1.0)


def _psnr(off: NDArray[np.float64]) -> float:
    mean_square = float(np.square(off).mean())
    return min(20 * log10(255) - 10 * log10(mean_square), EQUAL_PSNR) if mean_square else EQUAL_PSNR
