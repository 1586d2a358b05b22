"""Typical requests for the calibration of int8 engines, for `verify`, and to warm up."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .checked_request import CheckedRequest
from .cpu.executor import HostExecutor
from .cpu.sessions import Array, Sessions
from .errors import Cancelled
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .load_options import KEPT_BYTES
from .request import ClipRequest, Keyframe
from .request_checks import check_request

PROMPTS = (
    "a photo of a red lighthouse on the sea, waves, day turns to night",
    "a cartoon cat walks over a green meadow, bright colours",
    "close-up portrait of a dancer, studio light, film grain",
)
MAX_SIDE = 256
"""Pixels; keeps the calibration short. From here on the ranges of values hardly depend on the size."""
SMALL_SIDE, SMALL_FRAMES = 32, 4
"""Pixels and frames of the small clips that calibration runs besides."""
_SQUARE = 8
"""Pixels; the side of the squares of `picture`."""


def run_samples(
    bundle: Bundle,
    sessions: Sessions,
    size: ClipSize,
    on_clip: Callable[[Array], None] | None = None,
) -> None:
    """Runs the sample requests through `sessions`.

    Args:
        bundle: the bundle.
        sessions: run its graphs.
        size: of the clips.
        on_clip: called with the frames of each clip, uint8 [F, H, W, 3]; without it no frames are decoded.
    """
    executor = HostExecutor(bundle, sessions, KEPT_BYTES)
    for request in sample_requests(bundle, size):
        if on_clip is not None:
            on_clip(executor.run(request, None)[0])
            continue
        with suppress(Cancelled):
            executor.run(request, lambda done: done.stage != "denoise" or done.step < done.steps)


def sample_size(bundle: Bundle, max_side: int = MAX_SIDE) -> ClipSize:
    """The bundle's clip size, but with sides of at most `max_side` pixels, or the smallest side that it allows."""
    sizes = bundle.manifest.sizes
    most = max(sizes.multiple, max_side - max_side % sizes.multiple)
    width, height = (min(side, most) for side in (sizes.width, sizes.height))
    return ClipSize(width=width, height=height, frames=sizes.frames)


def small_size(bundle: Bundle) -> ClipSize:
    """The size of small, short clips.

    Some values are larger in them than in usual clips: most frames have a keyframe, the lowest level has few pixels.
    """
    size = sample_size(bundle, SMALL_SIDE)
    return size.model_copy(update={"frames": min(SMALL_FRAMES, size.frames)})


def sample_requests(bundle: Bundle, size: ClipSize) -> Iterator[CheckedRequest]:
    """Requests of a size: one without keyframes and one for each kind of keyframe, the last with guidance."""
    plain = list(plain_requests(bundle, size))
    for request in (*plain[:-1], replace(plain[-1], guidance_scale=1.5)):
        yield check_request(request, bundle.manifest)


def plain_requests(bundle: Bundle, size: ClipSize) -> Iterator[ClipRequest]:
    """Requests of a size without guidance: one without keyframes and one for each kind of keyframe."""
    for seed, kind in enumerate((None, *bundle.manifest.controlnets)):
        keyframes = [
            Keyframe(index, (picture if kind == "rgb" else scribble)(index / size.frames, size.width, size.height))
            for index in sorted({0, size.frames // 2, size.frames - 1})[: bundle.manifest.keyframe_slots]
        ]
        yield ClipRequest(
            PROMPTS[seed % len(PROMPTS)],
            keyframes if kind else (),
            kind or "scribble",
            negative_prompt="low quality, blurred",
            seed=seed,
            height=size.height,
            width=size.width,
            num_frames=size.frames,
        )


def scribble(place: float, width: int, height: int) -> NDArray[np.uint8]:
    """A white ring on black, uint8 [H, W, 3]; it moves to the right with `place`, 0 to 1."""
    _, _, distance = _from_centre(place, width, height)
    ring = np.abs(distance - height / 5) < max(height / 64, 1)
    return np.repeat((ring * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def picture(place: float, width: int, height: int) -> NDArray[np.uint8]:
    """A red disc on a gradient and on squares of random colours, uint8 [H, W, 3]; it moves to the right with `place`.

    The squares stand for the details of a photograph: the latents of a gradient alone are small.
    """
    x, y, distance = _from_centre(place, width, height)
    ground = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 160)], axis=2)
    colours = np.random.default_rng(0).integers(0, 256, (-(-height // _SQUARE), -(-width // _SQUARE), 3))
    squares = colours.repeat(_SQUARE, axis=0).repeat(_SQUARE, axis=1)[:height, :width]
    ground = np.where((y < height / 2)[:, :, None], ground, squares)
    return np.where((distance < height / 5)[:, :, None], np.array([220, 60, 40]), ground).astype(np.uint8)


def _from_centre(place: float, width: int, height: int) -> tuple[Array, Array, Array]:
    """Column, row and distance from the centre of the shape, for each pixel."""
    y, x = np.mgrid[:height, :width]
    return x, y, np.hypot(x - width * (0.25 + place / 2), y - height / 2)
