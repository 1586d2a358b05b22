"""What is wrong with a line, from pydantic's error: the field, the reason and what to write instead."""

import re

from pydantic_core import ErrorDetails

from ..runtime.errors import InvalidRequest, shown
from ..service.protocol.clip_input import INPUT_FIELDS

FIELDS = INPUT_FIELDS | {"num_frames": "frames"}
"""Options of the pipeline whose field in a line has another name."""
_ID = "up to 100 letters, digits, spaces and _ . + -, with a letter, digit or _ first and no space or . last"
_LIMITS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
_ALLOWED = "Input should be "


def line_error(error: ErrorDetails) -> InvalidRequest:
    """Returns the error of a line's field in the words of the other errors."""
    field, kind = ".".join(map(str, error["loc"])) or "line", error["type"]
    if kind == "extra_forbidden":
        return InvalidRequest(field, "there is no such field", _instead(field))
    if kind == "missing":
        return InvalidRequest(field, "it is missing", "add it")
    return InvalidRequest(field, f"{shown(error['input'])} is not allowed", f"give {_allowed(field, error)}")


def _instead(field: str) -> str:
    if field == "output_format":
        return "give --format to the command, for all clips"
    return f"use {FIELDS[field]}" if field in FIELDS else "docs/batch.md lists them"


def _allowed(field: str, error: ErrorDetails) -> str:
    if field == "id":
        return _ID
    if error["type"] in _LIMITS:
        words, limit = _LIMITS[error["type"]]
        return f"{words} {error['ctx'][limit]}"
    if error["type"] == "model_type":
        return "an object"
    return re.split(", (?:got|unable)", error["msg"].removeprefix(_ALLOWED))[0]
