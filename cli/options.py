"""Reading the values of options, and naming them."""

import re

from ..runtime.errors import InvalidRequest

OPTIONS = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "controlnet": "--controlnet",
    "keyframes": "--keyframe",
    "keyframe index": "--keyframe index",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "height": "--size height",
    "width": "--size width",
    "seed": "--seed",
    "num_frames": "--frames",
    "decoder": "--decoder",
    "precision": "--precision",
    "device": "--device",
    "threads": "--threads",
    "fps": "--fps",
    "output": "--output",
}
"""What sets each field of a request."""


def parse_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Width and height of `512x512`.

    Raises:
        InvalidRequest: not two whole numbers.
    """
    if text is None:
        return None, None
    width, separator, height = text.lower().partition("x")
    if not (separator and re.fullmatch(r"\d{1,9}", width) and re.fullmatch(r"\d{1,9}", height)):
        raise InvalidRequest(f"--size {text!r} is not allowed; give WIDTHxHEIGHT in pixels, as 512x512")
    return int(width), int(height)


def name_option(message: str) -> str:
    """An error's message, which may begin with a field of a request, with the option in its place."""
    field, separator, rest = message.partition(": ")
    return f"{OPTIONS.get(field, field)}{separator}{rest}"
