"""Weights in prompts, as users of other programs write them: `(word:1.3)`, `(word)`, `[word]`.

`(...)` multiplies the weight of what is inside by 1.1, `[...]` divides it by 1.1, `(...:1.3)` multiplies it by the
number. They may be nested. A backslash before a bracket or a backslash makes it plain text.
"""

import re
from collections.abc import Mapping
from math import isclose
from typing import NamedTuple

from ..errors import InvalidRequest, shown

FACTORS = {"(": 1.1, "[": 1 / 1.1}
"""What a pair of brackets multiplies the weight by."""
MAX_WEIGHT = 10.0
_OPENING = {")": "(", "]": "["}
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<opening>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<closing>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)


class Fragment(NamedTuple):
    """A part of a prompt and its weight."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[Fragment]:
    """Splits a prompt into fragments, such that neighbours have different weights.

    A bracket that is never closed holds up to the end; one that closes nothing is plain text.

    Source: the syntax of AUTOMATIC1111's stable-diffusion-webui.
    """
    pieces = list(_PIECE.finditer(prompt))
    factors = _factors(pieces)
    found: list[Fragment] = []
    inside: dict[str, list[float]] = {"(": [1.0], "[": [1.0]}  # the product of the open brackets' factors, after each
    opened = dict.fromkeys(FACTORS, 0)
    for place, piece in enumerate(pieces):
        text = piece[0]
        if piece["opening"]:
            opened[text] += 1
            inside[text].append(inside[text][-1] * factors[place])
        elif bracket := _closed(piece, opened):
            opened[bracket] -= 1
            inside[bracket].pop()
        else:
            found.append(Fragment(piece["escaped"] or text, inside["("][-1] * inside["["][-1]))
    return _joined(found)


def _factors(pieces: list[re.Match[str]]) -> dict[int, float]:
    """What each opening bracket multiplies the weight by, by its place among the pieces."""
    factors: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for place, piece in enumerate(pieces):
        if piece["opening"]:
            opened[piece[0]].append(place)
            factors[place] = FACTORS[piece[0]]
        elif bracket := _closed(piece, opened):
            start = opened[bracket].pop()
            if piece["weight"]:
                factors[start] = float(piece["weight"])
    return factors


def _closed(piece: re.Match[str], opened: Mapping[str, object]) -> str | None:
    """The kind of bracket that a piece closes, if one is open; None for text."""
    bracket = "(" if piece["weight"] else _OPENING.get(piece["closing"] or "")
    return bracket if bracket is not None and opened[bracket] else None


def check_weights(field: str, prompt: str) -> None:
    """Raises InvalidRequest if a weight in the prompt is not from 0 to `MAX_WEIGHT`."""
    for text, weight in parse_weights(prompt):
        if not 0 <= weight <= MAX_WEIGHT:
            what = shown(text if len(text) <= 40 else f"{text[:40]}...")
            remedy = f"give weights from 0 to {MAX_WEIGHT:g}, or write \\( and \\) for plain parentheses"
            raise InvalidRequest(field, f"the weight {weight:g} of {what} is not allowed", remedy)


def _joined(fragments: list[Fragment]) -> list[Fragment]:
    """Joins neighbours of the same weight."""
    joined: list[Fragment] = []
    for text, weight in fragments:
        if joined and isclose(joined[-1].weight, weight):
            joined[-1] = Fragment(joined[-1].text + text, weight)
        else:
            joined.append(Fragment(text, weight))
    return joined
