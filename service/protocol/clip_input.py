"""The endpoint's input and output as fal publishes them, and the checks of an input."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema

from .advanced_options import KEY, AdvancedOptions
from .errors import ServiceError, field_detail

KEYFRAMES = (0, 1, 2)
LAST = 15
"""Index of the last frame."""
MOST_VALUES = 20_000
"""Most values in one body, counted by brackets and commas: more than any prompt has, and parsed in milliseconds."""
MOST_DETAILS = 20
"""Most wrong fields that a response lists: an object may have thousands of unknown keys."""
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""Seeds that torch's generators accept. A negative seed means the seed plus 2**64."""

KINDS = {"literal_error": "one_of", "int_parsing_size": "int_parsing", "model_type": "dict_type"}
"""pydantic's error types that have another name in fal's protocol."""


class Input(BaseModel):
    """The input of the endpoint. Unknown keys are ignored. The published schema has fal's fields alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, title="AnimatediffLCMInput")

    prompt: str = Field(
        description="The prompt to use for generating the image. Be as descriptive as possible for best results.",
        examples=["Masterpiece, best quality, a panda drinking coffee"],
    )
    negative_prompt: str = Field("", description="What the clip should not show; counts with a guidance scale of 2.")
    controlnet_type: Literal["scribble", "rgb"] = Field(
        "scribble", description="The type of controlnet to use for generating the video, which the keyframes are for."
    )
    num_inference_steps: int = Field(4, ge=1, le=12, description="Steps of LCM; more take longer.")
    guidance_scale: int = Field(
        1, ge=0, le=2, title="Classifier-Free Guidance scale (CFG)", description="How closely to stick to the prompt."
    )
    seed: int | None = Field(
        None, ge=MIN_SEED, le=MAX_SEED, description="The same seed and input give the same clip.", examples=[42]
    )
    keyframe_0_index: int = Field(0, ge=0, le=LAST, description="The frame of the first keyframe.", examples=[0])
    keyframe_0_image_url: str | None = Field(None, description="URL or data URI of the first keyframe.")
    keyframe_1_index: int = Field(0, ge=0, le=LAST, description="The frame of the second keyframe.", examples=[8])
    keyframe_1_image_url: str | None = Field(None, description="URL or data URI of the second keyframe.")
    keyframe_2_index: int = Field(0, ge=0, le=LAST, description="The frame of the third keyframe.", examples=[15])
    keyframe_2_image_url: str | None = Field(None, description="URL or data URI of the third keyframe.")
    sparsectrl_lcm: SkipJsonSchema[AdvancedOptions | None] = None

    def keyframes(self) -> list[tuple[int, int, str]]:
        """Returns slot, frame and URL of the given keyframes. An empty URL means none."""
        given = ((slot, getattr(self, f"keyframe_{slot}_image_url")) for slot in KEYFRAMES)
        return [(slot, getattr(self, f"keyframe_{slot}_index"), url) for slot, url in given if url]

    @property
    def advanced(self) -> AdvancedOptions:
        """The options that fal lacks."""
        return self.sparsectrl_lcm or AdvancedOptions()

    def stored(self) -> dict[str, Any]:
        """Returns the given fields as JSON values, from which `model_validate` makes this input again."""
        return self.model_dump(exclude_unset=True)

    def options(self) -> dict[str, Any]:
        """Returns the keywords of `VideoPipeline.generate`, except the keyframes."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "controlnet": self.controlnet_type,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": None if self.seed is None else self.seed % 2**64,
            **self.advanced.given(),
        }


class File(BaseModel):
    """A file that can be downloaded."""

    url: str = Field(description="The URL where the file can be downloaded from.")
    content_type: str = Field(description="The mime type of the file.", examples=["video/mp4"])
    file_name: str = Field(description="The name of the file.", examples=["clip.mp4"])
    file_size: int = Field(description="The size of the file in bytes.", examples=[404019])


class Output(BaseModel):
    """The output of the endpoint."""

    model_config = ConfigDict(title="AnimatediffLCMOutput")

    video: File = Field(description="Generated video file.")
    seed: int = Field(description="The seed that was used.", examples=[42])


def parse_json(body: bytes) -> dict[str, Any]:
    """Returns the object in the body of a request. An empty body is an empty object.

    Raises:
        ServiceError: 422: `json_invalid`, `dict_type` if the body is not an object, `too_long` if it has more than
            `MOST_VALUES` values.
    """
    if not body.strip():
        return {}
    # the parser blocks the whole process: one second for each 15 million small values
    if sum(body.count(begin) for begin in (b"{", b"[", b",")) > MOST_VALUES:
        raise ServiceError(422, [field_detail(None, f"More than {MOST_VALUES} values", "too_long")])
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        detail = {"loc": ["body"], "msg": f"JSON decode error: {reason}", "type": "json_invalid"}
        raise ServiceError(422, [detail]) from None
    if not isinstance(value, dict):
        raise ServiceError(422, [field_detail(None, "Input should be a valid dictionary", "dict_type")])
    return value


def parse_input(value: Mapping[str, Any], prompt_characters: int) -> Input:
    """Parses and checks an input.

    Args:
        value: the input, as JSON values.
        prompt_characters: longest prompt.

    Raises:
        ServiceError: 422 that lists the wrong fields.
    """
    try:
        parsed = Input.model_validate(dict(value))
    except ValidationError as error:
        found = error.errors(include_url=False)[:MOST_DETAILS]
        raise ServiceError(422, [_detail(dict(item)) for item in found]) from None
    wrong = []
    for name in ("prompt", "negative_prompt"):
        if len(getattr(parsed, name)) > prompt_characters:
            message = f"String should have at most {prompt_characters} characters"
            wrong.append(field_detail(name, message, "string_too_long", {"max_length": prompt_characters}))
    urls = [f"keyframe_{slot}_image_url" for slot, *_ in parsed.keyframes()]
    for name in ("prompt", "negative_prompt", *urls):
        if not _is_unicode(getattr(parsed, name)):
            wrong.append(field_detail(name, "Input should be valid Unicode", "string_unicode"))
    start, end = parsed.advanced.control_guidance_start, parsed.advanced.control_guidance_end
    if start >= end:
        message = f"Input should be less than control_guidance_end ({end:g})"
        wrong.append(field_detail(f"{KEY}.control_guidance_start", message, "less_than", {"lt": end}, start))
    taken: dict[int, int] = {}
    for slot, frame, _ in parsed.keyframes():
        if frame in taken:
            message = f"Frame {frame} has a keyframe already (keyframe_{taken[frame]}_index); each frame takes one"
            wrong.append(field_detail(f"keyframe_{slot}_index", message, "value_error", None, frame))
        taken.setdefault(frame, slot)
    if wrong:
        raise ServiceError(422, wrong)
    return parsed


def _detail(error: dict[str, Any]) -> dict[str, Any]:
    kind = KINDS.get(error["type"], error["type"])
    message = "Input should be a valid dictionary" if kind == "dict_type" else error["msg"]
    context: dict[str, Any] = {
        name: value for name, value in error.get("ctx", {}).items() if isinstance(value, str | int | float)
    }
    if kind == "one_of":
        context = {"expected": re.findall("'(.+?)'", str(context.get("expected", "")))}
    value = error.get("input")
    field = ".".join(str(part) for part in error["loc"]) or None
    odd = kind in ("missing", "string_unicode") or (isinstance(value, float) and not math.isfinite(value))
    shown = value if isinstance(value, str | int | float) and not odd else None
    return field_detail(field, message, kind, {} if kind == "dict_type" else context, shown)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()  # in C: a loop in Python would block the server for seconds
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")
