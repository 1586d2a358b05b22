"""The last clips of an API key, for the page."""

from typing import Any
from urllib.parse import urlsplit

from ..auth.api_keys import ANONYMOUS
from ..components import Service

MOST = 12
"""How many clips the page shows."""


async def last_clips(service: Service, key_id: str, base: str) -> list[dict[str, Any]]:
    """Returns the last clips of a key, newest first. Callers without a key do not see each other's.

    Args:
        service: the service.
        key_id: the caller's API key.
        base: scheme and authority of the URLs. Other clients of the key may have used another host name of this server.

    Returns:
        For each, the request's id and endpoint, when it ended in seconds since 1970, its seed as text, since
        JavaScript's numbers cannot hold all digits, the clip's URL, and its number of frames, which is None for a
        clip of an earlier version.
    """
    rows = [] if key_id == ANONYMOUS else await service.store.read(service.store.clips, key_id, MOST)
    return [
        {
            "id": row.id,
            "endpoint": row.endpoint,
            "at": row.finished_at,
            "seed": str(row.outcome.body["seed"]),
            "url": base + urlsplit(row.outcome.body["video"]["url"]).path,
            "frames": row.outcome.frames,
        }
        for row in rows
        if row.outcome is not None
    ]
