"""The URLs of the endpoint and of its requests."""

import re
from urllib.parse import quote

DEFAULT_ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
"""The name of a server that is given no other, and of requests from before the database recorded it."""

QUEUE_PREFIX = "/queue"
"""A POST to the endpoint under this prefix is a submission. Other paths mean the same with and without it."""

PROXY_PATH = "/api/fal/proxy"
"""The one path of fal's server-side proxy."""


def request_urls(base_url: str, endpoint: str, request_id: str) -> dict[str, str]:
    """Returns the URLs of a request, as clients get them."""
    response = f"{base_url}/{endpoint}/requests/{request_id}"
    return {"response_url": response, "status_url": f"{response}/status", "cancel_url": f"{response}/cancel"}


def request_path(endpoint: str) -> re.Pattern[str]:
    """Returns a pattern for a request's path and the paths below it. Group 1 is the request's id, group 2 the rest."""
    return re.compile(rf"/{re.escape(endpoint)}/requests/([0-9A-Za-z-]{{1,64}})(/.*)?")


def stored_file_url(base_url: str, file_id: str, name: str) -> str:
    """Returns the URL of a file, which anybody may fetch."""
    return f"{base_url}/files/{file_id}/{quote(name, safe='')}"
