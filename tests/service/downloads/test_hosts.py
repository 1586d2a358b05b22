"""Hosts: no spelling of a private one is reached, also if a name changes its address."""

import asyncio
from typing import Any

import httpcore
import pytest
from sparsectrl_lcm.service.network.downloads import FetchError

from .conftest import NOT_REACHED, PUBLIC, Names, Server, Writer, get, ok, redirect, serving

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
