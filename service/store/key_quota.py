"""The bytes that are stored for an API key, and their limit."""

from sqlalchemy import Connection, func, select

from . import tables

files, requests = tables.files, tables.requests
FILE_BYTES = 64 * 1024
"""Counted for each file in addition to its bytes, which bounds the number of files as well."""


class QuotaExceeded(Exception):
    """A key would have more bytes stored than it may have."""


def check_quota(connection: Connection, key_id: str, more: int, limit: int) -> None:
    """Checks whether `more` bytes may be stored for a key.

    What counts are its files (uploads and their parts, clips) and the inputs of its requests that have not ended. A
    writer has to hold the key's lock until its transaction ends, as others could add to the sum meanwhile.

    Raises:
        QuotaExceeded: there would be more than `limit` bytes.
    """
    sizes = select(func.coalesce(func.sum(files.c.size), 0), func.count()).where(files.c.key_id == key_id)
    kept = (requests.c.key_id == key_id) & requests.c.input_bytes.is_not(None)
    inputs = select(func.coalesce(func.sum(requests.c.input_bytes), 0)).where(kept)
    of_files, count = connection.execute(sizes).one()
    stored = int(of_files) + count * FILE_BYTES + int(connection.execute(inputs).scalar_one())
    if stored + more > limit:
        reason = f"{stored} of this key's {limit} bytes are stored, and {more} more do not fit"
        raise QuotaExceeded(f"{reason}; files make room when they expire")


def lock_name(key_id: str) -> str:
    """Returns the name of the lock under which bytes are added for a key."""
    return f"bytes of {key_id}"
