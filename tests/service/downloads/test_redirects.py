"""Redirects: followed a few times, and only to public hosts."""

import asyncio
from typing import Any

import pytest
from sparsectrl_lcm.service.network.downloads import FetchError

from .conftest import NOT_REACHED, Names, fetched, get, ok, redirect, serving

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
