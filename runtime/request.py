"""A request, checked once at the edge; everything behind it may rely on its values."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from secrets import randbits
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest, shown
from .format.manifest import DECODERS, MAX_SIDE, Manifest, Sizes
from .images import fit, load_picture
from .loop.noise import MAX_SEED

MAX_STEPS = 12
MAX_GUIDANCE = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Keyframe:
    """A picture and the frame of the clip that it shows.

    Attributes:
        index: the frame, from 0.
        image: a path, the bytes of an image file, a Pillow image, or an array [H, W(, 1 | 3 | 4)]; any size.
    """

    index: int
    image: Any = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class FittedKeyframe:
    """A keyframe in the clip's size: uint8 [height, width, 3]."""

    index: int
    pixels: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One clip to make; `guidance` is on above 1."""

    prompt: str
    negative_prompt: str
    keyframes: tuple[FittedKeyframe, ...]
    controlnet: str | None
    steps: int
    guidance_scale: float
    seed: int
    height: int
    width: int
    frames: int
    decoder: str = "full"

    @property
    def decoder_graph(self) -> str:
        """The graph that makes the frames."""
        return DECODERS[self.decoder]

    @property
    def guidance(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.guidance_scale > 1

    def latent_shape(self, sizes: Sizes) -> tuple[int, int, int, int, int]:
        """[1, 4, F, h, w]."""
        factor = sizes.vae_scale_factor
        return (1, sizes.latent_channels, self.frames, self.height // factor, self.width // factor)


def validate(
    manifest: Manifest,
    *,
    prompt: Any,
    keyframes: Any,
    controlnet: Any,
    negative_prompt: Any,
    num_inference_steps: Any,
    guidance_scale: Any,
    seed: Any,
    height: Any,
    width: Any,
    num_frames: Any,
    decoder: Any,
) -> Request:
    """Checks every field against what `manifest` allows.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
    """
    sizes = manifest.sizes
    frames = _integer("num_frames", sizes.frames if num_frames is None else num_frames, 1, sizes.max_frames)
    height = _side("height", sizes.height if height is None else height, sizes.multiple)
    width = _side("width", sizes.width if width is None else width, sizes.multiple)
    pictures = _keyframes(keyframes, frames, manifest.keyframe_slots)
    if controlnet not in manifest.controlnets and (pictures or controlnet not in ("scribble", "rgb")):
        allowed = ", ".join(manifest.controlnets) or "none: this bundle was exported without SparseCtrl"
        raise InvalidRequest("controlnet", f"{controlnet!r} is not in this bundle", f"allowed are {allowed}")
    request = Request(
        prompt=_text("prompt", prompt),
        negative_prompt=_text("negative_prompt", negative_prompt),
        keyframes=(),
        controlnet=controlnet if pictures else None,
        steps=_integer(
            "num_inference_steps", num_inference_steps, 1, min(MAX_STEPS, manifest.scheduler.original_inference_steps)
        ),
        guidance_scale=_guidance(guidance_scale),
        seed=randbits(32) if seed is None else _integer("seed", seed, 0, MAX_SEED),
        height=height,
        width=width,
        frames=frames,
        decoder=_decoder(manifest, decoder),
    )
    fitted = (
        FittedKeyframe(index, fit(load_picture(image, f"keyframe {index}"), width, height)) for index, image in pictures
    )
    return replace(request, keyframes=tuple(fitted))  # pictures last: they take the longest


def _keyframes(keyframes: Any, frames: int, slots: int) -> list[tuple[int, Any]]:
    if keyframes is None:
        return []
    if not isinstance(keyframes, Sequence) or not all(isinstance(item, Keyframe) for item in keyframes):
        raise InvalidRequest(
            "keyframes", f"{type(keyframes).__name__} is not allowed", "give a list of Keyframe(index, image)"
        )
    if len(keyframes) > slots:
        raise InvalidRequest("keyframes", f"{len(keyframes)} were given", f"allowed are at most {slots}")
    pictures: dict[int, Any] = {}
    for item in keyframes:
        index = _integer("keyframe index", item.index, 0, frames - 1)
        if index in pictures:
            raise InvalidRequest("keyframes", f"index {index} was given twice", "each frame takes one keyframe")
        pictures[index] = item.image
    return sorted(pictures.items(), key=lambda item: item[0])


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(name, f"{value!r} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(name, f"{value!r} is not valid Unicode", "give text as UTF-8") from None
    return value


def _integer(name: str, value: Any, low: int, high: int) -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        raise InvalidRequest(name, f"{shown(value)} is not allowed", f"give a whole number from {low} to {high}")
    return number


def _side(name: str, value: Any, multiple: int) -> int:
    high = MAX_SIDE - MAX_SIDE % multiple
    side = _integer(name, value, multiple, high)
    if side % multiple:
        raise InvalidRequest(name, f"{side} is not allowed", f"give a multiple of {multiple} from {multiple} to {high}")
    return side


def _decoder(manifest: Manifest, value: Any) -> str:
    allowed = manifest.decoders
    if not isinstance(value, str) or value not in allowed:
        tiny = "" if "tiny" in allowed else "; for tiny export the bundle with --tiny-decoder"
        raise InvalidRequest("decoder", f"{value!r} is not in this bundle", f"allowed are {', '.join(allowed)}{tiny}")
    return value


def _guidance(value: Any) -> float:
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else float("nan")
    if not 0 <= number <= MAX_GUIDANCE:  # as is every comparison with nan
        raise InvalidRequest(
            "guidance_scale", f"{shown(value)} is not allowed", f"give a number from 0 to {MAX_GUIDANCE:g}"
        )
    return float(number)
