"""The URLs of the endpoint and of its requests."""

import re
from urllib.parse import quote

QUEUE_PREFIX = "/queue"
"""Under this prefix a POST to the endpoint is a submission; the rest of the path is as without it."""


def request_urls(base_url: str, endpoint: str, request_id: str) -> dict[str, str]:
    """Returns the URLs of a request that clients follow."""
    response = f"{base_url}/{endpoint}/requests/{request_id}"
    return {"response_url": response, "status_url": f"{response}/status", "cancel_url": f"{response}/cancel"}


def request_path(endpoint: str) -> re.Pattern[str]:
    """Matches the path of a request, or below it; group 1 is the request's id, group 2 what follows it."""
    return re.compile(rf"/{re.escape(endpoint)}/requests/([0-9A-Za-z-]{{1,64}})(/.*)?")


def stored_file_url(base_url: str, file_id: str, name: str) -> str:
    """Returns the URL of a file, which anybody may fetch."""
    return f"{base_url}/files/{file_id}/{quote(name, safe='')}"
