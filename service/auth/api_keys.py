"""API keys: `id:secret`. The store has only the SHA-256 of the secret, which is enough for 256 random bits."""

import hashlib
import hmac
import secrets
import time

from ..store import KeyRow, SqlStore

ANONYMOUS = "anonymous"
"""The key id of callers without a key, on a server that accepts them."""


def new_key(name: str) -> tuple[KeyRow, str]:
    """Returns a key for the store, and as clients send it. It is valid once the store has it."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return KeyRow(key_id, name, _hash(secret), time.time()), f"{key_id}:{secret}"


def create_key(store: SqlStore, name: str) -> str:
    """Creates a key and returns it as clients send it. It cannot be shown again."""
    row, key = new_key(name)
    store.add_key(row)
    return key


class Keyring:
    """Checks keys, and remembers valid ones for `seconds`, so that polling rarely reaches the store.

    Args:
        store: holds the keys.
        seconds: how long a key may still be accepted after it was revoked.
    """

    def __init__(self, store: SqlStore, seconds: float = 2.0) -> None:
        self._store = store
        self._seconds = seconds
        self._known: dict[str, tuple[str, float]] = {}  # hash of the credentials -> key id, end on the monotonic clock

    def remembered(self, credentials: str) -> str | None:
        """Returns the id of a key that was checked within the last `seconds`, otherwise None."""
        known = self._known.get(_hash(credentials))
        return known[0] if known is not None and known[1] > time.monotonic() else None

    def check(self, credentials: str) -> str | None:
        """Looks the key `id:secret` up in the store. Returns its id, or None if the key is not valid. Blocks."""
        key_id, _, secret = credentials.partition(":")
        row = self._store.get_key(key_id) if secret and len(credentials) < 512 else None
        if row is None or row.revoked_at is not None or not hmac.compare_digest(row.secret_hash, _hash(secret)):
            self._known.pop(_hash(credentials), None)
            return None
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[_hash(credentials)] = (row.id, time.monotonic() + self._seconds)
        return row.id


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
