"""Turns an HTTP request into a request in the queue."""

import asyncio
import dataclasses
import hashlib
import json
import math
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from starlette.requests import Request

from .. import clock
from ..components import Endpoint, Service
from ..http.called_url import root_url
from ..http.request_bodies import read_body, received
from ..network.downloads import FetchError, check_url
from ..network.public_addresses import Allowed
from ..objects.file_metadata import lifetime_in_header
from ..protocol.errors import ServiceError, failed, infrastructure_error, quota_error
from ..protocol.input_parsing import parse_input, parse_json
from ..store import NewRequest, OtherInput, QueueFull, QuotaExceeded, Submitted
from ..store.records import LOW, NORMAL

OFF = {"0", "false", "no"}
ON = {"1", "true", "yes"}
"""Values that switch a fal header on."""
SMALL_BODY = 64 * 1024
"""Larger bodies wait on disk until there is room in memory."""
IDEMPOTENCY_KEY = 255
"""Most characters of an idempotency key."""


async def accept(
    service: Service, endpoint: Endpoint, request: Request, key_id: str, kind: Literal["queue", "run"]
) -> Submitted:
    """Puts a request into the queue of an endpoint.

    As on fal, a submission with wrong input is accepted, and its result is the error. A submission that repeats the
    `Idempotency-Key` of an earlier one gets the request of that one.

    Raises:
        ServiceError: 400 for a wrong header, 413 for a body that is too large, 422 for a body that is not a JSON
            object, for a run with wrong input and for a repeated `Idempotency-Key` with another input, 429 if too many
            requests wait or bodies arrive, 503 for a run while the server shuts down, 507 if the key has no bytes left
            or the disk is full.
    """
    if kind == "run" and service.draining:
        raise infrastructure_error("runner_scheduling_failure", "The server is about to stop")
    new = _request_of_headers(service, endpoint, request, key_id, kind)
    async with _given_input(service, request, key_id) as given:
        return await _submit(service, endpoint, request, new, given)


def _request_of_headers(
    service: Service, endpoint: Endpoint, request: Request, key_id: str, kind: Literal["queue", "run"]
) -> NewRequest:
    """Returns a new request with the options from headers and query."""
    settings, query, headers = service.settings, request.query_params, request.headers
    now = clock.now()
    timeout = _timeout(headers.get("X-Fal-Request-Timeout"))
    return NewRequest(
        id=request.state.request_id,
        key_id=key_id,
        endpoint=endpoint.name,
        input={},
        created_at=now,
        base_url=root_url(service.settings, request),
        kind=kind,
        priority=LOW if headers.get("X-Fal-Queue-Priority", "").lower() == "low" else NORMAL,
        start_by=None if timeout is None else now + timeout,
        keep_io=headers.get("X-Fal-Store-IO", "").lower() not in OFF,
        retry=headers.get("X-Fal-No-Retry", "").lower() not in ON,
        object_seconds=lifetime_in_header(headers, settings),
        webhook=_webhook(query.get("fal_webhook"), settings.allow_private),
        idempotency_key=_idempotency_key(headers.get("Idempotency-Key")) if kind == "queue" else None,
    )


@asynccontextmanager
async def _given_input(service: Service, request: Request, key_id: str) -> AsyncIterator[dict[str, Any]]:
    """Yields the input: the body, or the query of a GET. Only a few large bodies are in memory at once."""
    limit = service.settings.body_bytes
    if request.method == "GET":
        yield {name: value for name, value in request.query_params.items() if not name.startswith("fal_")}
    elif _is_small(request):
        yield parse_json(await read_body(service, request, limit))
    else:
        async with received(service, request, limit, key_id) as body, service.large_bodies:
            yield await asyncio.to_thread(lambda: parse_json(body.path.read_bytes()))


async def _submit(
    service: Service, endpoint: Endpoint, request: Request, new: NewRequest, given: dict[str, Any]
) -> Submitted:
    settings = service.settings
    limits = {"limit": settings.queue, "key_limit": settings.key_queue, "key_bytes": settings.key_bytes}
    limits |= _endpoint_limit(request.query_params.get("fal_max_queue_length"))
    outcome = None
    wrong = None
    if new.idempotency_key is not None:
        new = dataclasses.replace(new, fingerprint=await asyncio.to_thread(_fingerprint, given))
    try:
        weights = tuple(settings.weights.get(endpoint.name, ()))
        order = (given, settings.prompt_characters, endpoint.frames, settings.extensions, weights)
        parsed = parse_input(*order) if _is_small(request) else await asyncio.to_thread(parse_input, *order)
        new = dataclasses.replace(new, input=parsed.stored())
    except ServiceError as error:
        wrong, outcome = error, failed(error)
        if new.kind == "run":
            new = dataclasses.replace(new, webhook=None)
    try:
        made = await service.board.submit(new, **limits, outcome=outcome)
    except QueueFull as error:
        raise ServiceError(429, str(error), "queue_full") from None
    except QuotaExceeded as error:
        raise quota_error(error) from None
    except OtherInput:
        detail = "Idempotency-Key: it was used with another input; give each submission its own"
        raise ServiceError(422, detail, "bad_request") from None
    if wrong is not None and new.kind == "run":  # stored nevertheless, since it counts among the key's `key_unstarted`
        raise wrong
    if made.is_new:
        service.metrics.submitted.labels(new.endpoint, new.kind).inc()
    return made


def _is_small(request: Request) -> bool:
    if "Transfer-Encoding" in request.headers:
        return False
    length = request.headers.get("Content-Length", "0")
    return not length.isdigit() or int(length) <= SMALL_BODY


def _fingerprint(given: dict[str, Any]) -> str:
    """Returns a hash of the input. Databases hold it: another formula would refuse what a client repeats."""
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def _idempotency_key(text: str | None) -> str | None:
    if text is not None and not (0 < len(text) <= IDEMPOTENCY_KEY and text.isascii() and text.isprintable()):
        detail = f"Idempotency-Key: give 1 to {IDEMPOTENCY_KEY} printable ASCII characters"
        raise infrastructure_error("bad_request", detail)
    return text


def _timeout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise infrastructure_error("bad_request", "X-Fal-Request-Timeout: give seconds above 0")
    return seconds


def _webhook(url: str | None, allow: Sequence[str]) -> str | None:
    """Checks the URL of a webhook. An IP address is checked now, a host name at each delivery."""
    if not url:
        return None
    try:
        parsed = check_url(url)
        urlsplit(url)  # the store reads the host with it
    except (FetchError, ValueError) as error:
        raise infrastructure_error("bad_request", f"fal_webhook: {error}") from None
    try:  # accepts every spelling of an address that the system does, such as 0x7f.1
        (*_, where), *_ = socket.getaddrinfo(parsed.host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return url
    if not Allowed.parse(allow).may_reach(parsed.host, ip_address(where[0])):
        raise infrastructure_error("bad_request", "fal_webhook: its host is not public")
    return url


def _endpoint_limit(text: str | None) -> dict[str, int]:
    """Returns the argument of `SqlStore.submit` for a caller who does not want to wait behind more than so many."""
    if text is None:
        return {}
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise infrastructure_error("bad_request", "fal_max_queue_length: give a whole number")
    return {"endpoint_limit": int(text) + 1}  # the given number may wait ahead of this one
