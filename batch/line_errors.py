"""What is wrong with a line, from pydantic's error: the field, the reason and what to write instead."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from pydantic_core import ErrorDetails

from ..runtime.errors import InvalidRequest, shown
from ..service.protocol.clip_input import INPUT_FIELDS

FIELDS = INPUT_FIELDS | {"num_frames": "frames"}
"""Options of the pipeline whose field in a line has another name."""
_ID = "up to 100 letters, digits, spaces and _ . + -, with a letter, digit or _ first and no space or . last"
_LIMITS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
_ALLOWED = "Input should be "


def line_error(error: ErrorDetails, fields: Mapping[str, Sequence[str]]) -> InvalidRequest:
    """Returns an error of pydantic as this package words its errors.

    Args:
        error: pydantic's.
        fields: the names of the fields of a line, under an empty name, and of each object in it.
    """
    field, kind = ".".join(map(str, error["loc"])) or "line", error["type"]
    if kind == "extra_forbidden":
        return InvalidRequest(field, "there is no such field", _instead(field, fields))
    if kind == "missing":
        return InvalidRequest(field, "it is missing", "add it")
    return InvalidRequest(field, f"{shown(error['input'])} is not allowed", f"give {_allowed(field, error)}")


def _instead(field: str, fields: Mapping[str, Sequence[str]]) -> str:
    if field == "output_format":
        return "give --format to the command, for all clips"
    if field in FIELDS:
        return f"use {FIELDS[field]}"
    parent, _, name = field.rpartition(".")
    names = fields[parent.partition(".")[0]]
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"the fields are {', '.join(names)}"


def _allowed(field: str, error: ErrorDetails) -> str:
    if field == "id":
        return _ID
    if error["type"] in _LIMITS:
        words, limit = _LIMITS[error["type"]]
        return f"{words} {error['ctx'][limit]}"
    if error["type"] == "model_type":
        return "an object"
    return re.split(", (?:got|unable)", error["msg"].removeprefix(_ALLOWED))[0]
