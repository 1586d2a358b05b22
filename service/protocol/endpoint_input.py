"""The input of an endpoint: some of its fields depend on the length of the bundle's clips."""

from functools import cache
from typing import Any

from pydantic import create_model

from ...runtime.request import MAX_FRAMES
from .clip_input import Input, keyframe_index
from .extended_input import ExtendedInput, frames_asked_for


@cache
def input_model(frames: int, extensions: bool) -> type[Input]:
    """Returns the input of an endpoint.

    Args:
        frames: of a clip whose input does not say.
        extensions: whether inputs have the fields of `ExtendedInput`; the last frame then depends on the input.
    """
    base = ExtendedInput if extensions else Input
    last = None if extensions else frames - 1
    fields: dict[str, Any] = {
        "keyframe_0_index": (int, keyframe_index("first", 0, last)),
        "keyframe_1_index": (int, keyframe_index("second", frames // 2, last)),
        "keyframe_2_index": (int, keyframe_index("third", frames - 1, last)),
    }
    if extensions:
        fields["num_frames"] = (int | None, frames_asked_for(str(frames), max(frames, MAX_FRAMES)))
    return create_model(base.__name__, __base__=base, **fields)
