"""HTTP requests to URLs from callers: only to public hosts, and limited in time and bytes."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import ip_address
from typing import BinaryIO
from urllib.parse import urljoin

import httpcore
import httpx

from .bounded_heads import BoundedHead
from .public_addresses import AddressRefused, Allowed, GuardedBackend, Resolve, is_public, resolve

MAX_URL = 2048
"""Longest URL, in characters."""
AGENT = "sparsectrl-lcm"
REDIRECTS = {301, 302, 303, 307, 308}

_CORE_ERRORS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
    httpcore.ConnectionNotAvailable,
)


class FetchError(Exception):
    """A download failed.

    The message is for the caller who gave the URL. It reveals nothing about hosts that are not public.

    Attributes:
        reason: the real reason, for the log.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class FetchTooLarge(FetchError):
    """The response has more bytes than allowed."""


def guarded_client(
    allow: Sequence[str],
    *,
    seconds: float = 15.0,
    certificates: ssl.SSLContext | None = None,
    resolver: Resolve = resolve,
) -> httpx.AsyncClient:
    """Returns a client for URLs from callers, which `check_url` has parsed.

    It follows no redirects (the location is in `response.extensions`), keeps no cookies and ignores proxies. A request
    raises `AddressRefused`, which is an `httpx.ConnectError`, if the URL leads to an address that is not public, has a
    scheme other than http and https, or holds a password. The client does not limit the total time and the size of the
    response; `fetch` does.

    Args:
        allow: host names, addresses or networks that may be reached even if they are not public.
        seconds: longest wait for a connection, or for more of the response.
        certificates: the authorities to trust; None means certifi's, or those in SSL_CERT_FILE.
        resolver: resolves host names; tests pass their own.

    Raises:
        InvalidRequest: an entry of `allow` is not a host name, address or network.
    """
    transport = _GuardedTransport(certificates or _certificates(), GuardedBackend(Allowed.parse(allow), resolver))
    return httpx.AsyncClient(
        transport=transport, trust_env=False, timeout=seconds, headers={"User-Agent": AGENT, "Accept": "*/*"}
    )


@lru_cache(1)
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


async def fetch(
    url: str,
    file: BinaryIO,
    *,
    limit_bytes: int,
    seconds: float,
    redirects: int,
    allow: Sequence[str],
    resolver: Resolve = resolve,
) -> None:
    """Downloads a URL into a file, chunk by chunk, so that slow downloads take no memory.

    Args:
        url: http or https.
        file: receives the bytes.
        limit_bytes: largest response.
        seconds: longest time in total.
        redirects: how many are followed.
        allow: as `guarded_client` takes it.
        resolver: resolves host names; tests pass their own.

    Raises:
        FetchTooLarge: the response is larger.
        FetchError: there is no response, or its status is not 200.
        OSError: the file cannot be written.
    """
    try:
        async with asyncio.timeout(seconds), guarded_client(allow, seconds=seconds, resolver=resolver) as client:
            for _ in range(redirects + 1):
                async with client.stream("GET", check_url(url), headers={"Accept-Encoding": "identity"}) as response:
                    if response.status_code not in REDIRECTS or "location" not in response.extensions:
                        return await _save(response, file, limit_bytes)
                    url = _next(response)
        raise FetchError(f"it redirects more than {redirects} times")
    except TimeoutError:
        raise FetchError(f"it takes longer than {seconds:g} seconds") from None
    except httpx.TimeoutException as error:
        raise FetchError(f"it takes longer than {seconds:g} seconds", repr(error)) from None
    except httpx.ConnectError as error:  # one message for every reason, so that nobody can map the internal network
        raise FetchError("its host cannot be reached, or is not public", str(error)) from None
    except httpx.HTTPError as error:
        raise FetchError("its host broke off, or does not speak HTTP", repr(error)) from None


def check_url(url: str) -> httpx.URL:
    """Parses a URL from a caller.

    Raises:
        FetchError: the URL is not http or https, is too long, or holds a user name or a password.
    """
    if len(url) > MAX_URL:
        raise FetchError(f"it is longer than {MAX_URL} characters")
    try:
        parsed = httpx.URL(url)
        _ = parsed.host  # httpx decodes international names only when asked
    except (httpx.InvalidURL, UnicodeError) as error:
        raise FetchError("it is not a URL", str(error)) from None
    _check(parsed)
    return parsed


def _check(url: httpx.URL) -> None:
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise FetchError("it is not an http or https URL")
    if url.port is not None and not 0 < url.port < 65536:
        raise FetchError("it is not a URL")
    if url.userinfo:
        raise FetchError("it holds a user name or a password")


def _next(response: httpx.Response) -> str:
    try:
        return urljoin(str(response.url), str(response.extensions["location"]))
    except ValueError as error:
        raise FetchError("it redirects to something that is not a URL", repr(error)) from None


async def _save(response: httpx.Response, file: BinaryIO, limit: int) -> None:
    if response.status_code != 200:
        shown = f"its host answers {response.status_code}" if _from_outside(response) else "its host answers no file"
        raise FetchError(shown, f"status {response.status_code}")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise FetchError("its host compresses the answer, unasked")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > limit:
        raise FetchTooLarge(f"it has more than {limit} bytes")
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > limit:
            raise FetchTooLarge(f"it has more than {limit} bytes")
        await asyncio.to_thread(file.write, chunk)


def _from_outside(response: httpx.Response) -> bool:
    """Returns whether the response came from a public address, not from one that only `allow` permits."""
    stream = response.extensions.get("network_stream")
    address = stream.get_extra_info("server_addr") if stream is not None else None
    return address is not None and is_public(ip_address(address[0]))


class _GuardedTransport(httpx.AsyncBaseTransport):
    """httpcore's connections over a `GuardedBackend`, which httpx's own transport cannot use."""

    def __init__(self, certificates: ssl.SSLContext, backend: GuardedBackend) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=certificates, max_connections=100, keepalive_expiry=5.0, network_backend=backend
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            _check(request.url)
        except FetchError as error:
            raise AddressRefused(str(error)) from None
        assert isinstance(request.stream, httpx.AsyncByteStream)
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        with _mapped_errors():
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    request.method,
                    url,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        stream = response.extensions.get("network_stream")
        if isinstance(stream, BoundedHead):
            stream.head_read()
        # httpx would keep cookies, and it fails on an invalid location even if it does not follow redirects
        headers = httpx.Headers([one for one in response.headers if one[0].lower() != b"set-cookie"])
        extensions = dict(response.extensions)
        if "Location" in headers:
            extensions["location"] = headers.pop("Location")
        return httpx.Response(response.status, headers=headers, stream=_Body(response), extensions=extensions)

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _mapped_errors():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._response.aclose()


@contextmanager
def _mapped_errors() -> Iterator[None]:
    """Turns httpcore's exceptions into httpx's of the same name, and OSError into NetworkError."""
    try:
        yield
    except _CORE_ERRORS as error:
        raise getattr(httpx, type(error).__name__, httpx.TransportError)(str(error)) from error
    except OSError as error:
        raise httpx.NetworkError(str(error)) from error
