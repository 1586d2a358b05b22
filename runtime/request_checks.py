"""Checks a request once, against the limits of a bundle, and fits its keyframes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .checked_request import CheckedRequest
from .errors import InvalidRequest, shown
from .field_checks import integer as _integer
from .field_checks import number as _number
from .field_checks import one_of as _one_of
from .field_checks import switch as _switch
from .field_checks import text as _text
from .format.clip_layout import ClipSize
from .format.manifest import MAX_SIDE, Manifest, Sizes
from .images import RESAMPLES, fit, had_transparency, is_animated, load_picture, normalize_scribble, scribble_doubt
from .loop.noise import MAX_SEED
from .loop.prompt_syntax import check_weights
from .loop.windows import default_overlap
from .request import (
    MAX_CONDITIONING_SCALE,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_STEPS,
    MIN_CONTEXT_LENGTH,
    ClipRequest,
    FittedKeyframe,
    Keyframe,
    random_seed,
)
from .request_warnings import warn


def _one_piece(size: ClipSize) -> bool:
    return True


def check_request(
    request: ClipRequest,
    manifest: Manifest,
    in_one_piece: Callable[[ClipSize], bool] = _one_piece,
    weights: tuple[str, ...] = (),
) -> CheckedRequest:
    """Checks every field against the limits of `manifest`, and fits the keyframes to the clip's size.

    Keyframes that guide no step are checked and left out.

    Args:
        request: what is asked for.
        manifest: the bundle's.
        in_one_piece: whether the backend can make clips of a size without context windows.
        weights: names of the weights that it may ask for.

    Raises:
        InvalidRequest: a value is not allowed; names the field, its value and what is allowed.
    """
    if not isinstance(request, ClipRequest):
        raise InvalidRequest("request", f"{type(request).__name__} is not allowed", "give a ClipRequest")
    sizes, asked = manifest.sizes, request
    frames = _integer("num_frames", _given(asked.num_frames, sizes.frames), 1, max(sizes.max_frames, MAX_FRAMES))
    height = _side("height", _given(asked.height, sizes.height), sizes.multiple)
    width = _side("width", _given(asked.width, sizes.width), sizes.multiple)
    pictures = _keyframes(asked.keyframes, frames)
    max_steps = min(MAX_STEPS, manifest.scheduler.original_inference_steps)
    checked = CheckedRequest(
        keyframes=(),
        controlnet=_controlnet(manifest, asked.controlnet, bool(pictures)),
        prompt=_text("prompt", asked.prompt),
        negative_prompt=_text("negative_prompt", asked.negative_prompt),
        steps=_integer("num_inference_steps", asked.num_inference_steps, 1, max_steps),
        guidance_scale=_number("guidance_scale", asked.guidance_scale, MAX_GUIDANCE),
        seed=random_seed() if asked.seed is None else _integer("seed", asked.seed, 0, MAX_SEED),
        height=height,
        width=width,
        frames=frames,
        decoder=_decoder(manifest, asked.decoder),
        conditioning_scale=_number("conditioning_scale", asked.conditioning_scale, MAX_CONDITIONING_SCALE),
        control_guidance_start=_number("control_guidance_start", asked.control_guidance_start, 1),
        control_guidance_end=_number("control_guidance_end", asked.control_guidance_end, 1),
        clip_skip=_integer("clip_skip", asked.clip_skip, 0, manifest.text_layers - 1),
        prompt_weights=_switch("prompt_weights", asked.prompt_weights),
        long_prompts=_switch("long_prompts", asked.long_prompts),
        weights=_weights(asked.weights, weights),
    )
    if checked.prompt_weights:
        check_weights("prompt", checked.prompt)
        check_weights("negative_prompt", checked.negative_prompt)
    _check_control(checked)
    checked = _in_windows(checked, asked, sizes, in_one_piece)
    _check_pictures(asked)
    fitted = [_fitted(index, image, checked, asked) for index, image in pictures]
    whole = replace(checked, keyframes=tuple(fitted))  # last, since pictures take the longest
    return whole if _keyframes_guide(whole) else replace(checked, controlnet=None)


def _check_control(checked: CheckedRequest) -> None:
    start, end = checked.control_guidance_start, checked.control_guidance_end
    if start >= end and start == 0:
        raise InvalidRequest("control_guidance_end", f"{end:g} is not above the start, {start:g}")
    if start >= end:
        raise InvalidRequest("control_guidance_start", f"{start:g} is not below the end, {end:g}")


def _in_windows(
    checked: CheckedRequest, asked: ClipRequest, sizes: Sizes, in_one_piece: Callable[[ClipSize], bool]
) -> CheckedRequest:
    """The request with its context windows, if it needs them or asks for them."""
    length, overlap = asked.context_length, asked.context_overlap
    if length is not None:
        length = _integer("context_length", length, MIN_CONTEXT_LENGTH, sizes.max_frames)
    elif checked.frames > sizes.max_frames or not in_one_piece(checked.clip_size):
        length = max(sizes.frames, min(MIN_CONTEXT_LENGTH, sizes.max_frames))
    longest = checked.frames if length is None else length
    if overlap is not None:
        overlap = _integer("context_overlap", overlap, 0, longest - 1)
    if length is None or length >= checked.frames:
        return checked
    return replace(
        checked, context_length=length, context_overlap=default_overlap(length) if overlap is None else overlap
    )


def _keyframes_guide(checked: CheckedRequest) -> bool:
    """Whether the keyframes of a request guide any step. If its steps are too few for that, it warns."""
    start, end = checked.control_guidance_start, checked.control_guidance_end
    if checked.keyframes and not checked.controlled_steps:
        told = f"keyframes guide none of the {checked.steps} steps: none lies within {start:g} to {end:g}"
        warn("keyframes that guide no step", told)
    return checked.conditioning_scale > 0 and bool(checked.controlled_steps)


def _check_pictures(asked: ClipRequest) -> None:
    _one_of("resample", asked.resample, RESAMPLES)
    _switch("normalize_scribbles", asked.normalize_scribbles)


def _fitted(index: int, image: Any, checked: CheckedRequest, asked: ClipRequest) -> FittedKeyframe:
    """Fits a picture to the clip. Warns of animations, and of scribbles that are probably not white lines on black."""
    picture = load_picture(image, f"keyframe {index}")
    if is_animated(picture):
        warn("animated keyframe", f"keyframe {index} is an animation, of which only the first frame is used")
    pixels = fit(picture, checked.width, checked.height, asked.resample)
    if checked.controlnet == "scribble":
        if asked.normalize_scribbles:
            pixels = normalize_scribble(pixels)
        if doubt := scribble_doubt(pixels, had_transparency(picture)):
            warn("odd scribble", f"keyframe {index} {doubt}; a scribble is white lines on black")
    return FittedKeyframe(index, pixels)


def _given(value: int | None, default: int) -> Any:
    """The value, of any type, or the bundle's default if it is None."""
    return default if value is None else value


def _controlnet(manifest: Manifest, value: Any, with_keyframes: bool) -> str | None:
    """The kind of the keyframes. Without keyframes any known kind is accepted, even one that the bundle lacks."""
    kinds = manifest.controlnets if with_keyframes else (*manifest.controlnets, "scribble", "rgb")
    if not isinstance(value, str) or value not in kinds:
        allowed = ", ".join(manifest.controlnets) or "none: this bundle was exported without SparseCtrl"
        raise InvalidRequest("controlnet", f"{shown(value)} is not in this bundle", f"allowed are {allowed}")
    return value if with_keyframes else None


def _keyframes(keyframes: Any, frames: int) -> list[tuple[int, Any]]:
    if keyframes is None:
        return []
    items = keyframes if isinstance(keyframes, Sequence) else [keyframes]
    wrong = [type(item).__name__ for item in items if not isinstance(item, Keyframe)]
    if wrong or items is not keyframes:
        what = f"{wrong[0] if wrong else 'a Keyframe alone'} is not allowed"
        raise InvalidRequest("keyframes", what, "give a list of Keyframe(index, image)")
    pictures: dict[int, Any] = {}
    for item in keyframes:
        index = _integer("keyframe index", item.index, -frames, frames - 1) % frames  # -1 is the last frame
        if index in pictures:
            raise InvalidRequest("keyframes", f"index {index} was given twice", "each frame takes one keyframe")
        pictures[index] = item.image
    return sorted(pictures.items(), key=lambda item: item[0])


def _weights(value: Any, known: tuple[str, ...]) -> str | None:
    if value is None:
        return None
    return _one_of("weights", value, known, "leave it out, as this pipeline was loaded with no other weights")


def _side(name: str, value: Any, multiple: int) -> int:
    high = MAX_SIDE - MAX_SIDE % multiple
    side = _integer(name, value, multiple, high)
    if side % multiple:
        raise InvalidRequest(name, f"{side} is not allowed", f"give a multiple of {multiple} from {multiple} to {high}")
    return side


def _decoder(manifest: Manifest, value: Any) -> str:
    allowed = manifest.decoders
    if not isinstance(value, str) or value not in allowed:
        tiny = "" if "tiny" in allowed else "; to get tiny, export the bundle with a tiny decoder"
        remedy = f"allowed are {', '.join(allowed)}{tiny}"
        raise InvalidRequest("decoder", f"{shown(value)} is not in this bundle", remedy)
    return value
