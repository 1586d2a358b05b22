"""Context windows: a clip longer than one run of the UNet is denoised in windows of its frames, blended at each step.

The windows of the last steps are consecutive frames that overlap, with weights that fall towards their ends (FreeNoise,
Qiu et al. 2023, arXiv:2310.15169, eq. 9). They alone would not know where the clip goes between distant keyframes. So
the windows of the first steps, which decide the layout, are spread between keyframes: each covers the whole span of up
to `SPREAD_KEYFRAMES` keyframes, holds these keyframes, and every nth of the frames between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SPREAD_KEYFRAMES = 3
"""Keyframes of a spread window: as many as the engines take and as clips of one window usually have."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Frames of a clip that run together.

    Attributes:
        frames: their indices in the clip, ascending, int64 [L].
        weights: the share of this window's prediction in each frame, float32 [L]; the shares of all windows with a
            frame add up to 1.
    """

    frames: NDArray[np.int64] = field(repr=False)
    weights: NDArray[np.float32] = field(repr=False)

    def count(self, places: Sequence[int]) -> int:
        """How many of the frames `places` are in this window."""
        return int(np.isin(self.frames, places).sum())

    def add(self, prediction: NDArray[np.float32], blended: NDArray[np.float32]) -> None:
        """Adds this window's share to the blended prediction of the clip.

        Args:
            prediction: of this window, [B, C, L, h, w].
            blended: of the clip, [B, C, F, h, w].
        """
        blended[:, :, self.frames] += prediction * self.weights[:, None, None]


Windows = tuple[Window, ...]
"""The windows of one step."""


def default_overlap(length: int) -> int:
    """Frames that consecutive windows of a length share if the request does not say."""
    return length // 2


def windows_of_steps(
    frames: int, length: int, overlap: int, keyframes: Sequence[int], steps: int
) -> tuple[Windows, ...]:
    """The windows of each step: spread ones in the first half of the steps, overlapping ones after them.

    Args:
        frames: frames of the clip.
        length: frames of a window; a clip of at most this many frames is one window at every step.
        overlap: frames that consecutive windows share at least, below `length`.
        keyframes: frames that have a keyframe, ascending.
        steps: number of steps.
    """
    if frames <= length:
        whole = _shares([np.arange(frames)], [np.ones(frames)])
        return (whole,) * steps
    spread = spread_windows(frames, length, overlap, keyframes)
    overlapping = overlapping_windows(frames, length, overlap)
    first = steps // 2
    return (spread,) * first + (overlapping,) * (steps - first)


def overlapping_windows(frames: int, length: int, overlap: int) -> Windows:
    """Consecutive frames: as few windows as share `overlap` frames or more, at even distances."""
    chosen = _consecutive(0, frames, length, overlap)
    return _shares(chosen, [_pyramid(length)] * len(chosen))


def spread_windows(frames: int, length: int, overlap: int, keyframes: Sequence[int]) -> Windows:
    """Windows that cover several keyframes each, and windows of consecutive frames before the first and after the last.

    Only keyframes make spread windows agree. So a clip with fewer than two has `overlapping_windows`.
    """
    if len(keyframes) < 2:
        return overlapping_windows(frames, length, overlap)
    first, last = keyframes[0], keyframes[-1]
    outside = _consecutive(0, max(first + 1, length), length, overlap) if first else []
    if last < frames - 1:
        outside += _consecutive(min(last, frames - length), frames, length, overlap)
    starts = range(0, len(keyframes) - 1, SPREAD_KEYFRAMES - 1)
    groups = [keyframes[start : start + SPREAD_KEYFRAMES] for start in starts]  # neighbours share a keyframe
    spread = [window for group in groups for window in _spread(group, length, frames)]
    weights = [_pyramid(length)] * len(outside) + [np.full(length, length / 2)] * len(spread)
    return _shares([*outside, *spread], weights)


def _consecutive(first: int, stop: int, length: int, overlap: int) -> list[NDArray[np.int64]]:
    """Windows of consecutive frames that cover `first` up to `stop`, at least `length` frames."""
    count = -(-(stop - first - overlap) // (length - overlap))
    starts = np.linspace(first, stop - length, count).round().astype(np.int64)
    return [start + np.arange(length) for start in starts]


def _pyramid(length: int) -> NDArray[np.float64]:
    """1, 2, 3 and so on to the middle, and back."""
    rise = np.arange(1, length + 1, dtype=np.float64)
    return np.minimum(rise, rise[::-1])


def _spread(keyframes: Sequence[int], length: int, frames: int) -> list[NDArray[np.int64]]:
    """The windows of one group of keyframes: these in each, and the frames between them in turn."""
    first, last = keyframes[0], keyframes[-1]
    if last - first < length:  # one window of consecutive frames, moved back if the clip ends before it
        return [min(first, frames - length) + np.arange(length)]
    others = np.setdiff1d(np.arange(first, last + 1), keyframes)
    each = length - len(keyframes)
    count = -(-len(others) // each)
    places = np.linspace(0, len(others) - count, each).round().astype(np.int64)
    return [
        np.sort(np.concatenate([others[places + number], np.array(keyframes, np.int64)])) for number in range(count)
    ]


def _shares(frames: Sequence[NDArray[np.int64]], weights: Sequence[NDArray[np.float64]]) -> Windows:
    """Windows whose weights are scaled to add up to 1 in each frame."""
    total = np.zeros(1 + max(int(window[-1]) for window in frames))
    for window, weight in zip(frames, weights, strict=True):
        total[window] += weight
    return tuple(
        Window(window, (weight / total[window]).astype(np.float32))
        for window, weight in zip(frames, weights, strict=True)
    )


def parts_of(count: int, size: int) -> list[slice]:
    """Consecutive parts of equal size that cover `count` items; the last is moved back if they do not divide."""
    return [slice(start, start + size) for start in (*range(0, count - size, size), count - size)]
