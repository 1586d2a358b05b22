"""Signed tokens that expire. They hold the permission to upload or call, so that the store need not keep it."""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any, Literal

from ..protocol.errors import ServiceError

Kind = Literal["bearer", "upload", "multipart", "app"]

_STATUS: dict[Kind, int] = {"bearer": 401, "upload": 403, "multipart": 403, "app": 401}
_NAMES: dict[Kind, str] = {
    "bearer": "storage token",
    "upload": "upload URL",
    "multipart": "id of this multipart upload",
    "app": "token",
}
MAX_LENGTH = 4096
"""Most characters of a token. Longer ones are not read."""


def make_token(secret: bytes, kind: Kind, claims: Mapping[str, Any], expires_at: float) -> str:
    """Signs claims (JSON values). They are valid until `expires_at`, in seconds since 1970. The token is URL-safe."""
    payload = json.dumps({**claims, "exp": expires_at}, separators=(",", ":"))
    text = _text(payload.encode())
    return f"{text}.{_signature(secret, kind, text)}"


def read_token(secret: bytes, kind: Kind, token: str, now: float) -> dict[str, Any]:
    """Returns the claims of a token that was signed with this secret for this kind of use.

    Raises:
        ServiceError: the token is forged or has expired. The status is 401 for a caller's token, 403 for an upload's.
    """
    text, _, signature = token.partition(".")
    expected = _signature(secret, kind, text) if len(token) <= MAX_LENGTH else ""
    if not expected or not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
        raise ServiceError(_STATUS[kind], f"The {_NAMES[kind]} is not valid")
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    if claims.pop("exp") <= now:
        raise ServiceError(_STATUS[kind], f"The {_NAMES[kind]} has expired")
    return claims


def _signature(secret: bytes, kind: Kind, text: str) -> str:
    # the kind is signed too, so that a token is valid for one kind of use only
    message = f"sparsectrl-lcm {kind} {text}".encode("utf-8", "replace")
    return _text(hmac.digest(secret, message, hashlib.sha256))


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
