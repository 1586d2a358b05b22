"""The URLs of the endpoint and of its requests."""

import re
from collections.abc import Iterable
from urllib.parse import quote

QUEUE_PREFIX = "/queue"
"""A POST to the endpoint under this prefix is a submission. Other paths mean the same with and without it."""

PROXY_PATH = "/api/fal/proxy"
"""The one path of fal's server-side proxy."""


def request_urls(base_url: str, endpoint: str, request_id: str) -> dict[str, str]:
    """Returns the URLs of a request, as clients get them."""
    response = f"{base_url}/{endpoint}/requests/{request_id}"
    return {"response_url": response, "status_url": f"{response}/status", "cancel_url": f"{response}/cancel"}


def request_path(endpoints: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern for a request's path and the paths below it.

    Group 1 is the name of the endpoint, group 2 the request's id, group 3 the rest.
    """
    names = "|".join(map(re.escape, endpoints))
    return re.compile(rf"/({names})/requests/([0-9A-Za-z-]{{1,64}})(/.*)?")


def stored_file_url(base_url: str, file_id: str, name: str) -> str:
    """Returns the URL of a file, which anybody may fetch."""
    return f"{base_url}/files/{file_id}/{quote(name, safe='')}"
