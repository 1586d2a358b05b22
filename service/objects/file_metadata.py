"""The name, content type and lifetime that a client gives a file: read from headers, and made safe."""

import json
import math
import mimetypes
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress

from ..protocol.errors import infrastructure_error
from ..settings import Settings

MAX_NAME = 100
"""Longest file name, in bytes of UTF-8."""
OCTETS = "application/octet-stream"

_CONTENT_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}")


def safe_name(text: str | None, content_type: str = OCTETS) -> str:
    """Reduces a user's file name to letters, digits, "_", "-" and "."; never empty, never hidden."""
    name = unicodedata.normalize("NFC", text or "").replace("\\", "/").rpartition("/")[2]
    name = re.sub(r"[^\w.-]+", "_", name).strip("._")
    stem, dot, ending = name.rpartition(".")
    if not dot:
        stem, ending = name, ""
    if not stem:
        stem, ending = "file", (mimetypes.guess_extension(content_type) or ".bin")[1:]
    ending = ending[:16]
    while len(f"{stem}.{ending}".encode()) > MAX_NAME:
        stem = stem[:-1]
    return f"{stem}.{ending}" if ending else stem


def safe_content_type(text: object) -> str:
    """Returns a content type without its parameters, or `application/octet-stream` if it is not one."""
    kind = str(text or "").partition(";")[0].strip().lower()
    return kind if _CONTENT_TYPE.fullmatch(kind) else OCTETS


def name_in_header(headers: Mapping[str, str]) -> str | None:
    """Returns the file name that a client sent. Headers are read as Latin-1, but the name is UTF-8."""
    text = headers.get("X-Fal-File-Name")
    if text is None:
        return None
    with suppress(UnicodeError):
        return text.encode("latin-1").decode()
    return text


def lifetime_in_header(headers: Mapping[str, str], settings: Settings) -> float | None:
    """Returns the lifetime in seconds that a client asks for, which is bounded, or the usual one.

    The header's access rules are ignored: URLs are public.

    Raises:
        ServiceError: 400 if the header does not have the form that fal's clients send.
    """
    text = headers.get("X-Fal-Object-Lifecycle") or headers.get("X-Fal-Object-Lifecycle-Preference")
    if not text:
        return settings.object_seconds
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    seconds = value.get("expiration_duration_seconds") if isinstance(value, dict) else math.nan
    if seconds is None:
        return settings.object_seconds
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        detail = 'X-Fal-Object-Lifecycle: give {"expiration_duration_seconds": n} with n above 0'
        raise infrastructure_error("bad_request", detail)
    return float(min(seconds, settings.most_object_seconds))
