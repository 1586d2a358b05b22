"""Parses and checks an input: errors become fal's list of wrong fields."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from .advanced_options import KEY
from .clip_input import KEYFRAMES, Input
from .endpoint_input import input_model
from .errors import ServiceError, field_detail
from .extended_input import ExtendedInput

MOST_VALUES = 20_000
"""Most values in one body, counted by brackets and commas: more than any prompt has, and parsed in milliseconds."""
MOST_DETAILS = 20
"""Most wrong fields that a response lists: an object may have thousands of unknown keys."""
KINDS = {"literal_error": "one_of", "int_parsing_size": "int_parsing", "model_type": "dict_type"}
"""pydantic's error types that have another name in fal's protocol."""


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


def parse_input(
    value: Mapping[str, Any],
    prompt_characters: int,
    frames: int,
    extensions: bool = False,
    weights: Sequence[str] = (),
) -> Input:
    """Parses and checks an input.

    Args:
        value: the input, as JSON values.
        prompt_characters: longest prompt.
        frames: of the endpoint's clips.
        extensions: whether the fields of `ExtendedInput` count; they are ignored otherwise.
        weights: the names of weights that it may ask for.

    Raises:
        ServiceError: 422 that lists the wrong fields.
    """
    try:
        parsed = input_model(frames, extensions).model_validate(dict(value))
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
    wrong += _unknown_weights(parsed.advanced.weights, weights)
    if isinstance(parsed, ExtendedInput):
        wrong += late_keyframes(parsed, frames)
    taken: dict[int, int] = {}
    for slot, frame, _ in parsed.keyframes():
        if frame in taken:
            message = f"Frame {frame} has a keyframe already (keyframe_{taken[frame]}_index); each frame takes one"
            wrong.append(field_detail(f"keyframe_{slot}_index", message, "value_error", None, frame))
        taken.setdefault(frame, slot)
    if wrong:
        raise ServiceError(422, wrong)
    return parsed


def _unknown_weights(name: str | None, known: Sequence[str]) -> list[dict[str, Any]]:
    if name is None or name in known:
        return []
    listed = " or ".join(map(repr, known))
    message = f"Input should be {listed}" if known else "This endpoint has no other weights; leave it out"
    shown = name if _is_unicode(name) else None
    return [field_detail(f"{KEY}.weights", message, "one_of", {"expected": list(known)}, shown)]


def late_keyframes(given: ExtendedInput, frames: int) -> list[dict[str, Any]]:
    """Returns an error for each index beyond the clip, which has `frames` frames unless the input says otherwise."""
    last = (given.num_frames or frames) - 1
    message = f"Input should be less than or equal to {last}, the last frame"
    indices = {name: getattr(given, name) for name in (f"keyframe_{slot}_index" for slot in KEYFRAMES)}
    late = [(name, index) for name, index in indices.items() if index > last]
    return [field_detail(name, message, "less_than_equal", {"le": last}, index) for name, index in late]


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
