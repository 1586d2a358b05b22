"""The windows of long clips: which frames run together at each step, and with which weights."""

import numpy as np
import pytest
from sparsectrl_lcm.runtime.loop.conditioning import window_feeds
from sparsectrl_lcm.runtime.loop.windows import (
    SPREAD_KEYFRAMES,
    Windows,
    overlapping_windows,
    parts_of,
    spread_windows,
    windows_of_steps,
)

KEYFRAMES: list[tuple[int, ...]] = [(), (5,), (0, 16), (3, 9, 11, 16), tuple(range(0, 17, 2))]


def check(windows: Windows, frames: int, length: int) -> None:
    """Each window has `length` ascending frames of the clip; the weights of each frame add up to 1."""
    total = np.zeros(frames)
    for window in windows:
        assert len(window.frames) == length
        assert (np.diff(window.frames) > 0).all()
        assert (window.weights > 0).all()
        total[window.frames] += window.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("keyframes", KEYFRAMES)
def test_windows_cover_every_frame_once_in_all(keyframes: tuple[int, ...]) -> None:
    for frames in (17, 30, 64, 128):
        for length in (4, 7, 16):
            for overlap in {0, 1, length // 2, length - 1}:
                for windows in windows_of_steps(frames, length, overlap, keyframes, 2):
                    check(windows, frames, length)


def test_a_clip_of_one_window_is_left_as_it_is() -> None:
    for frames in (1, 16):
        (window,), *others = windows_of_steps(frames, 16, 8, (), 3)
        assert window.frames.tolist() == list(range(frames))
        assert (window.weights == 1).all()
        assert len(others) == 2


def test_the_first_half_of_the_steps_has_spread_windows() -> None:
    for steps, spread in ((1, 0), (2, 1), (4, 2), (5, 2), (12, 6)):
        windows = windows_of_steps(64, 16, 8, (0, 63), steps)
        assert len(windows) == steps
        assert [np.ptp(step[0].frames) > 15 for step in windows] == [True] * spread + [False] * (steps - spread)


def test_consecutive_windows_share_the_overlap() -> None:
    windows = overlapping_windows(64, 16, 4)
    assert [int(window.frames[0]) for window in windows] == [0, 12, 24, 36, 48]
    assert windows[0].frames.tolist() == list(range(16))
    np.testing.assert_allclose(windows[0].weights[12:], [4 / 5, 3 / 5, 2 / 5, 1 / 5], atol=1e-6)
    for frames, overlap in ((33, 4), (50, 8), (17, 15)):
        starts = [int(window.frames[0]) for window in overlapping_windows(frames, 16, overlap)]
        assert starts[-1] == frames - 16, "the last window ends with the clip"
        assert max(np.diff(starts)) <= 16 - overlap


def test_spread_windows_hold_the_keyframes_that_they_cover() -> None:
    keyframes = (0, 16, 32, 48, 63)
    windows = spread_windows(64, 16, 8, keyframes)
    for window in windows:
        inside = [frame for frame in keyframes if window.frames[0] <= frame <= window.frames[-1]]
        assert window.count(keyframes) == len(inside) == SPREAD_KEYFRAMES
        assert np.diff(window.frames).max() <= 3, "no gap is larger than the others"
    assert {(int(window.frames[0]), int(window.frames[-1])) for window in windows} == {(0, 32), (32, 63)}


def test_only_keyframes_spread_windows() -> None:
    """Windows before the first keyframe, after the last, and in clips with fewer than two, are consecutive frames."""
    for keyframes in ((), (30,)):
        starts, expected = (
            [int(window.frames[0]) for window in windows]
            for windows in (spread_windows(64, 16, 8, keyframes), overlapping_windows(64, 16, 8))
        )
        assert starts == expected
    windows = spread_windows(100, 16, 4, (20, 50))
    apart = [window for window in windows if np.ptp(window.frames) > 15]
    assert all((window.frames[0], window.frames[-1]) == (20, 50) for window in apart)
    together = [int(window.frames[0]) for window in windows if np.ptp(window.frames) == 15]
    assert together == [0, 5, 50, 61, 73, 84], "up to the first keyframe, and from the last"


def test_keyframes_that_lie_close_take_consecutive_frames() -> None:
    windows = spread_windows(20, 8, 4, (0, 3, 6, 9, 12, 15, 19))
    assert [window.frames.tolist() for window in windows] == [
        list(range(8)),
        list(range(6, 14)),
        list(range(12, 20)),
    ]


def test_parts_have_one_size() -> None:
    assert [(part.start, part.stop) for part in parts_of(10, 4)] == [(0, 4), (4, 8), (6, 10)]
    assert [(part.start, part.stop) for part in parts_of(8, 4)] == [(0, 4), (4, 8)]
    assert [(part.start, part.stop) for part in parts_of(3, 3)] == [(0, 3)]


def test_a_window_takes_only_its_own_keyframes() -> None:
    pictures = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) + 1  # three keyframes, and the blank one
    index = np.full(20, 3)
    index[[2, 9, 15]] = 0, 1, 2
    feeds = {"conditioning": pictures, "conditioning_mask": np.array([1, 1, 1, 0], np.float32), "frame_index": index}
    part = window_feeds(feeds, np.arange(8, 12), keyframes=2)
    assert part["conditioning"].reshape(-1).tolist() == [2, 4, 4]
    assert part["conditioning_mask"].tolist() == [1, 0, 0]
    assert part["frame_index"].tolist() == [2, 0, 2, 2]
    whole = window_feeds(feeds, np.arange(20), keyframes=3)
    assert all((whole[name] == feeds[name]).all() for name in feeds)
