"""Weights in prompts, as users of other programs write them: `(word:1.3)`, `(word)`, `[word]`.

`(...)` multiplies the weight of what is inside by 1.1, `[...]` divides it by 1.1, `(...:1.3)` multiplies it by the
number. They may be nested. A backslash before a bracket or a backslash makes it plain text.
"""

import re
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
    found: list[Fragment] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # for each open bracket, the number of fragments before it

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        found[start:] = [Fragment(text, weight * factor) for text, weight in found[start:]]

    for piece in _PIECE.finditer(prompt):
        text = piece[0]
        if piece["opening"]:
            opened[text].append(len(found))
        elif piece["weight"] and opened["("]:
            close("(", float(piece["weight"]))
        elif piece["closing"] and opened[_OPENING[text]]:
            close(_OPENING[text], FACTORS[_OPENING[text]])
        else:
            found.append(Fragment(piece["escaped"] or text, 1.0))
    for bracket, factor in FACTORS.items():
        while opened[bracket]:
            close(bracket, factor)
    return _joined(found)


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
        if joined and joined[-1].weight == weight:
            joined[-1] = Fragment(joined[-1].text + text, weight)
        else:
            joined.append(Fragment(text, weight))
    return joined
