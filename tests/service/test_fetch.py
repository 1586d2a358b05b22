"""Downloads from hostile servers over real sockets; only the name servers are fakes."""

import asyncio
import contextlib
import datetime
import errno
import io
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from random import Random
from typing import Any

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sparsectrl_lcm.service.network import downloads as fetching
from sparsectrl_lcm.service.network.downloads import FetchError, FetchTooLarge, fetch, guarded_client
from sparsectrl_lcm.service.network.public_addresses import AddressRefused, Allowed, GuardedBackend, is_public

LOOPBACK = ("127.0.0.0/8", "::1")
PUBLIC = "93.184.215.14"
NOT_REACHED = "cannot be reached, or is not public"

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Server:
    """Reads the head of a request on each connection, then answers with what `answer` writes."""

    def __init__(self, answer: bytes | Callable[[Writer], Awaitable[None]]) -> None:
        self.answer = answer
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.port = 0

    async def handle(self, reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            lengths = [int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length:")]
            self.bodies.append(await reader.readexactly(sum(lengths)))
            if isinstance(self.answer, bytes):
                writer.write(self.answer)
                await writer.drain()
            else:
                await self.answer(writer)
        writer.close()


@asynccontextmanager
async def serving(
    answer: bytes | Callable[[Writer], Awaitable[None]], host: str = "127.0.0.1", **options: Any
) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.handle, host, 0, **options)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(where: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


async def get(url: str, **changes: Any) -> bytes:
    options = {"limit_bytes": 1000, "seconds": 5.0, "redirects": 3, "allow": LOOPBACK} | changes
    file = io.BytesIO()
    await fetch(url, file, **options)
    return file.getvalue()


def fetched(answer: Any, path: str = "/image.png", **changes: Any) -> tuple[bytes, Server]:
    async def run() -> tuple[bytes, Server]:
        async with serving(answer) as server:
            return await get(f"http://127.0.0.1:{server.port}{path}", **changes), server

    return asyncio.run(run())


# RFC 6890, IANA's special-purpose registries, and addresses that embed other addresses
NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
    172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255
    198.51.100.1 203.0.113.9 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::2 ::7f00:1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
    64:ff9b:1::808:808 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:db8::1
    2002:7f00:1:: 2002:808:808::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1
    ff02::1
"""


@pytest.mark.parametrize(
    "text",
    NOT_PUBLIC.split(),
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


PUBLIC_ADDRESSES = """
    1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 223.255.255.255
    2606:4700::1111 2a00:1450:4001::5 ::ffff:8.8.8.8 64:ff9b::808:808
"""


@pytest.mark.parametrize(
    "text",
    PUBLIC_ADDRESSES.split(),
)
def test_addresses_that_are_public(text: str) -> None:
    assert is_public(ip_address(text))


def test_public_is_never_more_than_what_python_calls_global() -> None:
    random = Random(3)
    for _ in range(5_000):
        four = IPv4Address(random.getrandbits(32))
        six = IPv6Address((0x2000 + random.getrandbits(13)) << 112 | random.getrandbits(112))
        for address in (four, six):
            assert not is_public(address) or (address.is_global and not address.is_multicast)
        for shift in (IPv6Address("::ffff:0:0"), IPv6Address("64:ff9b::")):
            assert is_public(IPv6Address(int(shift) | int(four))) == is_public(four)


def test_what_is_let_through() -> None:
    allowed = Allowed.parse(["Keyframes.Internal.", "10.1.0.0/16", "192.168.7.7", "[fd00::1]", "fd01::/16"])
    for host, address, expected in [
        ("keyframes.internal", "127.0.0.1", True),
        ("KEYFRAMES.internal.", "fd77::1", True),
        ("other.internal", "127.0.0.1", False),
        ("keyframes.internal.evil.test", "127.0.0.1", False),
        ("x", "10.1.255.255", True),
        ("x", "10.2.0.0", False),
        ("x", "::ffff:10.1.0.1", True),
        ("x", "192.168.7.7", True),
        ("x", "192.168.7.8", False),
        ("x", "fd00::1", True),
        ("x", "fd00::2", False),
        ("x", "fd01::2", True),
        ("x", "8.8.8.8", True),
    ]:
        assert allowed.may_reach(host, ip_address(address)) is expected, (host, address)


@pytest.mark.parametrize(
    "entry", ["http://10.0.0.1", "host:80", "", "10.0.0.0/33", "a b", "*.internal", "10.0.0.0/8/8"]
)
def test_what_cannot_be_let_through(entry: str) -> None:
    with pytest.raises(ValueError, match="allow_private"):
        Allowed.parse([entry])


def test_download() -> None:
    body, server = fetched(ok(b"picture"), "/a%20b.png?x=1&y=%2F#fragment")
    assert body == b"picture"
    head = server.heads[0].split("\r\n")
    assert head[0] == "GET /a%20b.png?x=1&y=%2F HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in head
    assert [line for line in head if line.lower().startswith("accept-encoding")] == ["Accept-Encoding: identity"]


def test_chunked_and_unbounded_answers() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
    assert fetched(chunked)[0] == b"abcdefg"
    assert fetched(b"HTTP/1.0 200 OK\r\n\r\nto the end")[0] == b"to the end"
    assert fetched(ok(b"x" * 1000))[0] == b"x" * 1000


LOOPBACK_SPELLINGS = """
    127.0.0.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 127.1 localhost localhost. 127.0.0.1.
    0.0.0.0 0 [::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:0:0:1] LOCALHOST %6c%6fcalhost
"""


@pytest.mark.parametrize(
    "host",
    [
        *LOOPBACK_SPELLINGS.split(),
        "１２７.０.０.１",
        "127。0。0。1",
        "①②⑦.0.0.1",
    ],
)
def test_no_spelling_of_loopback_is_reached(host: str) -> None:
    async def run() -> Server:
        async with serving(ok(b"secret")) as server:
            with pytest.raises(FetchError) as raised:
                await get(f"http://{host}:{server.port}/", allow=())
            message = str(raised.value)
            assert NOT_REACHED in message or "not a URL" in message
            return server

    assert asyncio.run(run()).heads == []


@pytest.mark.parametrize("family", ["127.0.0.1", "::1"])
def test_numbers_and_names_reach_loopback_where_it_is_let_through(family: str) -> None:
    """Shows that the test above refuses for the intended reason."""

    async def run() -> list[bytes]:
        hosts = ["127.0.0.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"] if family == "127.0.0.1" else ["[::1]"]
        try:
            async with serving(ok(b"ok"), family) as server:
                return [await get(f"http://{host}:{server.port}/") for host in hosts]
        except OSError:
            pytest.skip("no IPv6 here")

    assert set(asyncio.run(run())) == {b"ok"}


PRIVATE_HOSTS = """
    169.254.169.254 10.0.0.1 [64:ff9b::7f00:1] [2002:7f00:1::] [fe80::1] [fd00:ec2::254] 224.0.0.1
    100.64.0.1 255.255.255.255 [ff02::1] 0.0.0.0 192.168.0.1 2852039166 0xa9fea9fe
"""


@pytest.mark.parametrize(
    "host",
    PRIVATE_HOSTS.split(),
)
def test_private_hosts_are_refused_before_anything_is_sent(host: str) -> None:
    with pytest.raises(FetchError, match=NOT_REACHED) as raised:
        asyncio.run(get(f"http://{host}/latest/meta-data/", allow=(), seconds=30.0))
    assert "not public" in raised.value.reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://127.0.0.1/x", "not an http"),
        ("file:///etc/passwd", "not an http"),
        ("gopher://127.0.0.1/", "not an http"),
        ("unix:///run/docker.sock", "not an http"),
        ("//127.0.0.1/", "not an http"),
        ("image.png", "not an http"),
        ("", "not an http"),
        ("http://", "not an http"),
        ("http:///etc/passwd", "not an http"),
        ("http://user:password@127.0.0.1/", "a password"),
        ("http://user@127.0.0.1/", "a password"),
        ("http://127.0.0.1:99999/", "not a URL"),
        ("http://127.0.0.1:0/", "not a URL"),
        ("http://127.0.0.1:x/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://a\nb/", "not a URL"),
        ("http://a\r\nX: y/", "not a URL"),
        ("http://xn--\u00e4/", "not a URL"),
        ("http://xn--a/", None),
        ("http://a..b/", None),
        ("http://" + "a" * 64 + ".test/", None),
        ("http://" + "ä" * 64 + ".test/", None),
        ("http://127.0.0.1/" + "x" * 2048, "longer than 2048"),
        ("http://127.0.0.1:1/", NOT_REACHED),
        ("http://name.invalid/", NOT_REACHED),
    ],
)
def test_urls_that_lead_nowhere(url: str, reason: str) -> None:
    async def unknown(host: str, port: int) -> list[str]:
        if host.startswith("127."):
            return [host]
        host.encode("idna")
        raise OSError("unknown name")

    with pytest.raises(FetchError, match=reason):
        asyncio.run(get(url, resolver=unknown))


class Names:
    """Name servers that return one list of addresses after the other."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses of all connections. They are redirected to loopback, so that public addresses have a server."""
    addresses: list[str] = []
    connect = httpcore.AnyIOBackend.connect_tcp

    async def redirected(self: Any, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        addresses.append(host)
        return await connect(self, "127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", redirected)
    yield addresses


def test_the_address_that_was_checked_is_the_one_connected_to(connected: list[str]) -> None:
    """DNS rebinding: the name resolves to a public address at the check, and to loopback the next time."""

    async def run() -> None:
        async with serving(ok(b"picture")) as server:
            url = f"http://keyframes.test:{server.port}/"
            names = Names([PUBLIC], ["127.0.0.1"])
            assert await get(url, allow=(), resolver=names) == b"picture"
            assert (names.asked, connected) == (["keyframes.test"], [PUBLIC])
            assert f"Host: keyframes.test:{server.port}" in server.heads[0]
            with pytest.raises(FetchError, match=NOT_REACHED):
                await get(url, allow=(), resolver=names)
            assert (len(server.heads), connected) == (1, [PUBLIC])

    asyncio.run(run())


def test_rebinding_between_redirects(connected: list[str]) -> None:
    async def run() -> None:
        async with serving(redirect("/again")) as server:
            with pytest.raises(FetchError, match=NOT_REACHED):
                names = Names([PUBLIC], ["127.0.0.1"])
                await get(f"http://keyframes.test:{server.port}/", allow=(), resolver=names)
            assert len(server.heads) <= 2  # the connection to the checked address may be reused
            assert set(connected) == {PUBLIC}

    async def closing(writer: Writer) -> None:
        writer.write(redirect("/again").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        await writer.drain()

    async def run_closing() -> None:
        async with serving(closing) as server:
            with pytest.raises(FetchError, match=NOT_REACHED):
                names = Names([PUBLIC], ["127.0.0.1"])
                await get(f"http://keyframes.test:{server.port}/", allow=(), resolver=names)
            assert len(server.heads) == 1
            assert connected == [PUBLIC]

    asyncio.run(run_closing())
    connected.clear()
    asyncio.run(run())


@pytest.mark.parametrize(
    "answers", [[PUBLIC, "127.0.0.1"], ["10.0.0.1", PUBLIC], ["2606:4700::1111", "::ffff:10.0.0.1"]]
)
def test_one_private_address_refuses_the_host(answers: list[str], connected: list[str]) -> None:
    with pytest.raises(FetchError, match=NOT_REACHED):
        asyncio.run(get("http://mixed.test/", allow=(), resolver=Names(answers)))
    assert connected == []


def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = httpcore.AnyIOBackend.connect_tcp
    tried: list[str] = []

    async def some(self: Any, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        tried.append(host)
        if len(tried) < 3:
            raise httpcore.ConnectTimeout if len(tried) == 1 else httpcore.ConnectError
        return await connect(self, "127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", some)

    async def run() -> bytes:
        async with serving(ok(b"third")) as server:
            names = Names(["2606:4700::1111", PUBLIC, "1.1.1.1"])
            return await get(f"http://many.test:{server.port}/", allow=(), resolver=names)

    assert asyncio.run(run()) == b"third"
    assert tried == ["2606:4700::1111", PUBLIC, "1.1.1.1"]


PRIVATE_TARGETS = """
    http://127.0.0.1:{port}/ http://2130706433:{port}/ //localhost:{port}/ http://[::1]:{port}/
    http://10.0.0.1/ http://169.254.169.254/ http://[::ffff:127.0.0.1]:{port}/
"""


@pytest.mark.parametrize(
    "where",
    PRIVATE_TARGETS.split(),
)
def test_redirects_to_private_addresses(where: str) -> None:
    async def run() -> None:
        async with serving(ok(b"secret")) as inside:
            target = where.format(port=inside.port)
            async with serving(redirect(target)) as outside:
                names = Names(["127.0.0.1"])
                with pytest.raises(FetchError, match=NOT_REACHED):
                    await get(f"http://open.test:{outside.port}/", allow=("open.test",), resolver=resolve_with(names))
                assert names.asked == ["open.test"]
                assert len(outside.heads) == 1
            assert inside.heads == []

    asyncio.run(run())


def resolve_with(names: Names) -> Any:
    """Fake answers for names that end in .test, the system's for others."""
    from sparsectrl_lcm.service.network.public_addresses import resolve

    async def resolver(host: str, port: int) -> list[str]:
        return await names(host, port) if host.endswith(".test") else await resolve(host, port)

    return resolver


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("file:///etc/passwd", "not an http"),
        ("ftp://127.0.0.1/", "not an http"),
        ("http://user:password@127.0.0.1/", "a password"),
        ("data:image/png;base64,AA==", "not an http"),
        ("http://127.0.0.1:99999/", "not a URL"),
        ("/" + "x" * 2048, "longer than 2048"),
    ],
)
def test_redirects_that_lead_nowhere(where: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason):
        fetched(redirect(where))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int) -> None:
    async def run() -> None:
        async with serving(ok(b"picture")) as last:
            async with serving(redirect(f"http://127.0.0.1:{last.port}/b?c=d", status)) as first:
                assert await get(f"http://127.0.0.1:{first.port}/a") == b"picture"
                with pytest.raises(FetchError, match="more than 0 times"):
                    await get(f"http://127.0.0.1:{first.port}/a", redirects=0)
            assert last.heads[0].startswith("GET /b?c=d HTTP/1.1")

    asyncio.run(run())


def test_redirects_without_end() -> None:
    async def run() -> None:
        async with serving(redirect("again", 308)) as server:
            with pytest.raises(FetchError, match="more than 3 times"):
                await get(f"http://127.0.0.1:{server.port}/a")
            assert len(server.heads) <= 4

    asyncio.run(run())


@pytest.mark.parametrize(
    "status", ["204 No Content", "206 Partial", "304 Same", "401 Who", "404 No", "500 Oh", "302 No"]
)
def test_only_200_is_a_file(status: str) -> None:
    with pytest.raises(FetchError, match="answers no file") as raised:
        fetched(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
    assert status[:3] not in str(raised.value)  # an allowed private host may be internal
    assert status[:3] in raised.value.reason


def test_the_status_of_a_public_host_is_told(connected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "is_public", lambda address: address == ip_address("127.0.0.1"))  # the peer here

    async def run() -> None:
        async with serving(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n") as server:
            await get(f"http://public.test:{server.port}/", allow=(), resolver=Names([PUBLIC]))

    with pytest.raises(FetchError, match="answers 404"):
        asyncio.run(run())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
def test_nothing_is_decompressed(encoding: str) -> None:
    with pytest.raises(FetchError, match="compresses"):
        fetched(ok(b"x", f"Content-Encoding: {encoding}"))


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 1001),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
    ],
)
def test_answers_that_are_too_large(answer: bytes) -> None:
    with pytest.raises(FetchTooLarge, match="more than 1000 bytes"):
        fetched(answer)


def test_an_answer_without_end() -> None:
    sent = 0

    async def endless(writer: Writer) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    with pytest.raises(FetchTooLarge):
        fetched(endless, limit_bytes=2**20)
    assert sent < 64 * 2**20  # the capacity of the system's buffers


def test_a_disk_that_is_full_is_not_the_hosts_fault() -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def run() -> None:
        async with serving(ok(b"picture")) as server:
            options = {"limit_bytes": 1000, "seconds": 5.0, "redirects": 3, "allow": LOOPBACK}
            await fetch(f"http://127.0.0.1:{server.port}/", Full(), **options)

    with pytest.raises(OSError, match="No space"):
        asyncio.run(run())


def test_what_the_system_says_of_a_connection_is_an_error_of_httpx() -> None:
    with pytest.raises(httpx.NetworkError, match="bad record"), fetching._mapped_errors():
        raise ssl.SSLError("bad record")


async def silent(writer: Writer) -> None:
    await asyncio.sleep(60)


async def dripping_body(writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def dripping_head(writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def informing(writer: Writer) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def stalled(writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    await asyncio.sleep(60)


@pytest.mark.parametrize("answer", [silent, dripping_body, dripping_head, informing, stalled])
def test_time_is_bounded(answer: Any) -> None:
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"longer than 0\.3 seconds"):
        fetched(answer, seconds=0.3)
    assert time.monotonic() - start < 5


def test_the_time_of_a_name_server_counts() -> None:
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    with pytest.raises(FetchError, match=r"longer than 0\.2 seconds"):
        asyncio.run(get("http://slow.test/", seconds=0.2, resolver=slow))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\x01\x02",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http(answer: bytes) -> None:
    with pytest.raises(FetchError, match="does not speak HTTP"):
        fetched(answer)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serving(ok(b"proxied")) as proxy, serving(ok(b"direct")) as server:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            assert await get(f"http://127.0.0.1:{server.port}/") == b"direct"
            assert proxy.heads == []

    asyncio.run(run())


def test_the_client_of_webhooks() -> None:
    """It does not follow the redirect of a POST, and raises refusals as errors of httpx."""

    async def run() -> None:
        async with serving(redirect("http://127.0.0.1:1/")) as server, guarded_client(("127.0.0.1",)) as client:
            response = await client.post(f"http://127.0.0.1:{server.port}/hook", json={"a": 1})
            assert response.status_code == 302
            assert server.bodies == [b'{"a":1}']
        async with guarded_client(()) as client:
            for url in (f"http://127.0.0.1:{server.port}/", "http://user:password@example.com/", "ftp://example.com/"):
                with pytest.raises(AddressRefused):
                    await client.post(url, json={})
            with pytest.raises(httpx.ConnectError):
                await client.post("http://localhost:1/", json={})
        assert len(server.heads) == 1

    asyncio.run(run())


def test_the_client_keeps_no_cookies_and_its_connections() -> None:
    async def talking(writer: Writer) -> None:
        writer.write(ok(b"", "Set-Cookie: a=b"))
        await writer.drain()

    async def run() -> None:
        async with serving(talking) as server, guarded_client(LOOPBACK) as client:
            for _ in range(2):
                await client.post(f"http://127.0.0.1:{server.port}/")
        assert len(server.heads) == 2
        assert "cookie" not in server.heads[1].lower()

    asyncio.run(run())


def test_no_socket_of_the_machine() -> None:
    with pytest.raises(AddressRefused):
        asyncio.run(GuardedBackend(Allowed()).connect_unix_socket("/run/docker.sock"))


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a server with a certificate for `name`, and of a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(
        key.private_bytes(encoding, form, serialization.NoEncryption()) + made.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


def test_certificates_are_checked_for_the_name(tmp_path: Path, connected: list[str]) -> None:
    """The connection is pinned to an address, but TLS still sends and checks the host name."""
    server_context, client_context = certificate(tmp_path, "keyframes.test")
    asked: list[str | None] = []
    server_context.sni_callback = lambda _, name, __: asked.append(name)

    async def run() -> None:
        client = guarded_client((), certificates=client_context, resolver=Names([PUBLIC]))
        async with serving(ok(b"picture"), ssl=server_context) as server, client:
            response = await client.get(f"https://keyframes.test:{server.port}/")
            assert response.content == b"picture"
            assert f"Host: keyframes.test:{server.port}" in server.heads[0]
            with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
                await client.get(f"https://other.test:{server.port}/")
            with pytest.raises(FetchError, match=NOT_REACHED):  # no trusted authority signed it
                await get(f"https://keyframes.test:{server.port}/", allow=(), resolver=Names([PUBLIC]))
            assert len(server.heads) == 1

    asyncio.run(run())
    assert asked == ["keyframes.test", "other.test", "keyframes.test"]
    assert set(connected) == {PUBLIC}


def test_a_host_that_never_ends_its_interim_responses_is_left() -> None:
    async def endless(writer: Writer) -> None:
        for _ in range(1000):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
            await writer.drain()
        writer.write(ok(b"late"))

    with pytest.raises(FetchError, match="does not speak HTTP"):
        fetched(endless)
    body = b"abc" * 300_000
    assert fetched(b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + ok(body), limit_bytes=10**6)[0] == body
