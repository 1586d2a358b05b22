"""A caller's request with its defaults, and its keyframes.

`checked_request` checks a request once against the limits of a bundle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import randbits
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_STEPS = 12
MAX_GUIDANCE = 30.0
MAX_CONDITIONING_SCALE = 10.0
MAX_FRAMES = 128
"""Frames of a clip that is made in context windows."""
MIN_CONTEXT_LENGTH = 4
"""Frames of a context window."""


@dataclass(frozen=True, slots=True, eq=False)
class Keyframe:
    """A picture and the frame of the clip that it shows.

    Attributes:
        index: the frame, from 0; -1 is the last, -2 the one before it.
        image: a path, an open binary file, the bytes of an image file, a Pillow image, or an array
            [H, W(, 1 | 3 | 4)]; any size. A file is read from its beginning, when the request is checked.
    """

    index: int
    image: Any = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class ClipRequest:
    """A caller's request. The names and defaults are those of `VideoPipeline.generate`, which explains them.

    Nothing is checked here, since the allowed values depend on the bundle.
    """

    prompt: str
    keyframes: Sequence[Keyframe] = ()
    controlnet: str = "scribble"
    negative_prompt: str = ""
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    decoder: str = "full"
    normalize_scribbles: bool = False
    resample: str = "lanczos"
    conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    clip_skip: int = 0
    prompt_weights: bool = False
    long_prompts: bool = False
    context_length: int | None = None
    context_overlap: int | None = None
    weights: str | None = None


def random_seed() -> int:
    """A seed for a request that has none."""
    return randbits(32)


@dataclass(frozen=True, slots=True, eq=False)
class FittedKeyframe:
    """A keyframe in the clip's size: uint8 [height, width, 3]."""

    index: int
    pixels: NDArray[np.uint8] = field(repr=False)
