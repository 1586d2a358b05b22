"""Warns of requests that a bundle's model was not trained for."""

import re
from textwrap import shorten

from .checked_request import CheckedRequest
from .format.manifest import TrainingRecord
from .loop.prompt_syntax import parse_weights
from .request_warnings import request_log, warn

_WORD = re.compile(r"[^\W_][\w'-]*")
_SHOWN = 80
"""Characters of unknown words that a warning shows."""


def warn_if_untrained(request: CheckedRequest, record: TrainingRecord | None, warned: set[str]) -> None:
    """Warns in one line of all limits of the training that a request leaves. Each limit is logged once.

    Args:
        request: the request.
        record: what the model was trained for; without it there is nothing to leave.
        warned: the limits that were logged before; gets those that are logged now.
    """
    if record is None:
        return

    def log_new(_: str) -> None:
        if new := {limit: told for limit, told in left.items() if limit not in warned}:
            warned.update(new)
            request_log.warning(_sentence(new))

    if left := _untrained(request, record):
        warn(f"untrained {', '.join(left)}", _sentence(left), log_new)


def _sentence(left: dict[str, str]) -> str:
    return f"the model was not trained for this request, whose clip may be poor: {'; '.join(left.values())}"


def _untrained(request: CheckedRequest, record: TrainingRecord) -> dict[str, str]:
    """What a request has that the training had not, by the limit that it leaves."""
    found = {}
    if (request.width, request.height) != (record.width, record.height):
        found["size"] = f"{request.width}x{request.height} instead of {record.width}x{record.height}"
    if request.frames != record.frames:
        found["frames"] = f"{request.frames} frame{'' if request.frames == 1 else 's'} instead of {record.frames}"
    if not record.min_keyframes <= len(request.keyframes) <= record.max_keyframes:
        given = len(request.keyframes)
        found["keyframes"] = f"{given or 'no'} keyframe{'' if given == 1 else 's'} instead of {record.keyframes}"
    if record.words is not None and (unknown := _words(request) - set(record.words)):
        found["words"] = f"unknown words: {shorten(', '.join(sorted(unknown)), _SHOWN, placeholder=' ...')}"
    return found


def _words(request: CheckedRequest) -> set[str]:
    """The words of the prompts that the model reads, in lower case; without the numbers of weights."""
    texts = request.texts
    if request.prompt_weights:
        texts = ["".join(fragment.text for fragment in parse_weights(text)) for text in texts]
    return {word for text in texts for word in _WORD.findall(text.lower())}
